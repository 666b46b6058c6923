"""The record of which versions of torch the tests were run with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.versions import run_of, table, with_run, with_table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one"/><testcase classname="tests.a" name="test_two"/>
<testcase classname="tests.a" name="test_bad"><failure/></testcase>
<testcase classname="tests.b" name="test_broken"><error/></testcase>
<testcase classname="tests.b" name="test_left_out"><skipped/></testcase>
</testsuite></testsuites>"""


def report(path: Path, text: str = REPORT) -> Path:
    written = path / "tests.xml"
    written.write_text(text, encoding="utf-8")
    return written


def test_outcomes_are_counted(tmp_path: Path) -> None:
    run = run_of(report(tmp_path), "2.14.1", "3.13.0")
    assert [run[name] for name in ("torch", "python", "passed", "failed", "skipped")] == ["2.14.1", "3.13.0", 2, 2, 1]
    assert run["failures"] == ["tests.a.test_bad", "tests.b.test_broken"]


def test_a_run_without_tests_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no test passed"):
        run_of(report(tmp_path, "<testsuites/>"), "2.14.1", "3.13.0")


def test_the_last_run_of_a_minor_version_counts(tmp_path: Path) -> None:
    runs: list[dict[str, object]] = []
    for torch in ("2.15.0", "2.9.1", "2.14.0", "2.14.1"):
        runs = with_run(runs, run_of(report(tmp_path), torch, "3.13.0"))
    assert [run["torch"] for run in runs] == ["2.9.1", "2.14.1", "2.15.0"]
    page = with_table("before\n<!-- begin: python -m benchmarks.versions -->\nold\n<!-- end -->\nafter", runs)
    assert table(runs) in page
    assert "old" not in page
    assert page.endswith("\nafter")

"""Which versions of torch have the core of the tests been run with, and what came of it?

    python -m benchmarks.versions TESTS.xml [--results benchmarks/results/versions.json] [--readme README.md]

`.ci/versions` calls it, in the environment that ran the tests: it reads what pytest wrote (`--junitxml`), puts counts
and versions into the results, and the table of all results between two marks in the README.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from tabulate import tabulate

from benchmarks.marked import placed

BEGIN = "<!-- begin: python -m benchmarks.versions -->"
HEADINGS = ("torch", "Python", "passed", "failed", "skipped", "date")

Run = dict[str, Any]
"""A value for each of the headings, and the tests that failed."""


def run_of(report: Path, torch: str, python: str) -> Run:
    """What a report of pytest's says about a run of the tests."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failures.append(f"{case.get('classname')}.{case.get('name')}")
    if not counts["passed"]:
        raise SystemExit(f"{report}: no test passed; this is no run of the tests")
    date = dt.datetime.now(dt.UTC).date().isoformat()
    return {"torch": torch, "python": python, **counts, "date": date, "failures": sorted(set(failures))}


def minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    first, second = re.findall(r"\d+", version)[:2]
    return int(first), int(second)


def with_run(runs: Sequence[Run], run: Run) -> list[Run]:
    """The runs, one a minor version of torch, in order: the last one counts."""
    others = [each for each in runs if minor(each["torch"]) != minor(run["torch"])]
    return sorted([*others, run], key=lambda each: minor(each["torch"]))


def table(runs: Sequence[Run]) -> str:
    """A row a run, in markdown."""
    return tabulate(
        [[run[name.lower()] for name in HEADINGS] for run in runs], HEADINGS, tablefmt="github", disable_numparse=True
    )


def with_table(page: str, runs: Sequence[Run]) -> str:
    """The page with the table in its place."""
    return placed(page, BEGIN, table(runs))


def main() -> None:
    """Add a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/versions.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    given = parser.parse_args()
    runs = json.loads(given.results.read_text(encoding="utf-8")) if given.results.exists() else []
    runs = with_run(runs, run_of(given.report, importlib.metadata.version("torch"), platform.python_version()))
    given.results.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    given.readme.write_text(with_table(given.readme.read_text(encoding="utf-8"), runs), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command line, as far as it needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxckpt import __version__
from fxckpt.cli.main import main
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.report.page import page
from fxckpt.core.report.table import plan_text
from fxckpt.core.schedule import Schedule


@pytest.fixture
def plan() -> Plan:
    storages = (Storage("w", 8, "parameter"), Storage("a", 8, "activation"), Storage("d", 8, "backward"))
    ops = (Op("f", "aten.relu.default", (0,), (1,), time_us=1.0), Op("b", "aten.neg.default", (1,), (2,), time_us=1.0))
    return Plan(Graph(ops, storages, 1, gradients=(2,)), Schedule((0, 0, 1), 1), "hand", "hand", 64)


def test_explain_prints_the_plan(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    assert main(["explain", str(file)]) == 0
    assert capsys.readouterr().out == plan_text(plan)
    assert main(["explain", str(file), "--all"]) == 0
    assert capsys.readouterr().out == plan_text(plan, all=True)


def test_explain_needs_no_torch(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    program = "import sys; sys.modules['torch'] = None; from fxckpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "explain", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == plan_text(plan)


def test_explain_writes_pictures(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    names = {"--html": "plan.html", "--timeline": "plan.svg", "--animate": "plan.gif"}
    assert (
        main(["explain", str(file), *(x for option, name in names.items() for x in (option, str(tmp_path / name)))])
        == 0
    )
    assert capsys.readouterr().out == plan_text(plan)
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == page(plan)
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert (tmp_path / "plan.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--html", "nowhere/plan.html", "No such file"),
        ("--timeline", "nowhere/plan.svg", "No such file"),
        ("--timeline", "plan.docx", "Format 'docx' is not supported"),
        ("--animate", "nowhere/plan.gif", "there is no folder"),
        ("--animate", "plan.mp4", "name the file plan.gif"),
    ],
)
def test_pictures_that_cannot_be_written_are_refused(
    option: str, name: str, message: str, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    assert main(["explain", str(file), option, str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "not text"),
        (b"{", "not JSON"),
        (b"[]", "not a plan"),
        (b'{"fxckpt_plan": 1}', "no 'graph'"),
    ],
)
def test_what_is_no_plan_is_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    assert main(["explain", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"fxckpt: can't read {file}: ")
    assert message in shown.err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fxckpt {__version__}\n")


def test_a_reader_that_leaves_early_is_no_error(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fxckpt", "explain", str(file)], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["explain"], ["plan", "a:b"]])
def test_wrong_arguments_end_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err

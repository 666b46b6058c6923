"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown_by(name: str, *options: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *options]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("page", "written"), [("README.md", set()), ("docs/guide.md", {"plan.html", "plan.gif"})], ids=["README", "guide"]
)
def test_the_code_of_a_page_runs_as_it_stands(page: str, written: set[str], tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / page).read_text(encoding="utf-8"), re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error", "-c", "".join(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recompute" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == written


def test_quickstart_shows_a_plan_that_was_measured() -> None:
    shown = shown_by("quickstart.py")
    assert "measured" in shown
    assert "recompute" in shown


def test_from_scratch_saves_memory_and_changes_no_gradient() -> None:
    lines = shown_by("from_scratch.py").splitlines()[1:]
    assert len(lines) == 4
    assert all(line.endswith("identical") for line in lines)
    peaks = [float(line.split(" MiB")[0].split()[-1]) for line in lines]
    everything, matmuls_and_sums, every_fourth_layer, nothing = peaks
    assert every_fourth_layer < matmuls_and_sums < everything == nothing


def test_from_scratch_fits_on_two_pages() -> None:
    assert len((EXAMPLES / "from_scratch.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_ones_own_solver_is_served_like_any_other() -> None:
    lines = shown_by("own_solver.py").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["recompute_cheap_ops", "selective", "auto"]
    assert lines[3] == "gradients identical: True"


def test_what_networkx_says_of_a_step() -> None:
    lines = shown_by("graph_analysis.py").splitlines()
    assert lines[0].startswith("5 tensors")  # the first layer's output and what each block returns
    assert [line.split()[-1] for line in lines[1:6]] == ["0", "1", "2", "3", "4"]
    assert lines[-1].endswith("inner.3")


def test_a_plan_for_another_gpu() -> None:
    sizes = ("--layers", "2", "--width", "256", "--length", "128", "--budget", "1GB")
    lines = shown_by("other_gpu.py", *sizes).splitlines()
    assert [line.split(" plain")[0].strip() for line in lines] == ["A100", "H100", "RTX 4090"]


def test_reading_a_plan(tmp_path: Path) -> None:
    shown = shown_by("reading_a_plan.py", "--pictures", str(tmp_path))
    assert "_again = aten." in shown
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.html", "timeline.svg"}


def test_unet_on_digits_learns_the_same() -> None:
    assert "losses identical: True" in shown_by("unet_digits.py", "--quick")


def test_fine_tuning_with_the_trainer_learns_the_same() -> None:
    assert "losses identical: True" in shown_by("hf_trainer.py", "--quick")

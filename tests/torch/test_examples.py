"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def shown_by(name: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


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

"""`benchmarks.gpu` tried on a CPU: its scheduler, what it measures at tiny sizes, and what is written of it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import limits
from benchmarks.gpu.__main__ import BEGIN
from benchmarks.gpu.bench import Bench, Built
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.jobs import KINDS, Job, jobs
from benchmarks.gpu.limits import limit, planning
from benchmarks.gpu.report import page, readme
from benchmarks.gpu.results import RESULTS, Results, read
from benchmarks.gpu.scheduler import Row, Scheduler
from benchmarks.gpu.timing import frontier, host
from benchmarks.gpu.worker import MEASUREMENTS, measured
from benchmarks.marked import placed
from benchmarks.models.cases import CASES

ROOT = Path(__file__).parents[2]

STUB = """
import json, os, sys, time
task = json.loads(sys.stdin.readline() or sys.exit())
start = time.monotonic()
settings = task["settings"]
print("so far so good", flush=True)
time.sleep(settings.get("seconds", 0))
if "signal" in settings:
    os.kill(os.getpid(), settings["signal"])
if "exit" in settings:
    sys.exit(settings["exit"])
with open(task["result"], "w") as file:
    json.dump({"status": "done", "began": start, "ended": time.monotonic(), "device": task["device"]}, file)
"""


def job(number: int, *, is_alone: bool = False, timeout_s: float = 60, **settings: float) -> Job:
    return Job("stub", {"number": number, **settings}, is_alone, timeout_s)


def run(jobs: list[Job], *, seconds: float = 60, parallel: int = 2) -> dict[int, Row]:
    """The rows by number, in the order in which they came."""
    found: dict[int, Row] = {}

    def report(job: Job, row: Row) -> None:
        assert job.settings["number"] not in found
        found[job.settings["number"]] = row

    command = (sys.executable, "-S", "-c", STUB)
    Scheduler(command, {"device": "cpu"}, parallel, report).run(jobs, seconds)
    return found


# The scheduler


def test_a_crash_and_a_timeout_are_rows_and_the_others_run() -> None:
    found = run([job(0, exit=3), job(1, signal=11), job(2, seconds=600, timeout_s=0.5), job(3)])
    assert {number: row["status"] for number, row in found.items()} == {
        0: "crashed",
        1: "crashed",
        2: "timed out",
        3: "done",
    }
    assert found[0]["error"] == "exit status 3"
    assert found[1]["error"] == "SIGSEGV"
    assert "so far so good" in found[1]["trace"]
    assert "so far so good" in found[2]["trace"]
    assert found[3]["device"] == "cpu"


def test_nothing_runs_beside_what_is_to_be_alone() -> None:
    found = run([job(n, is_alone=n in (2, 3), seconds=0.2) for n in range(6)], parallel=3)
    times = {number: (row["began"], row["ended"]) for number, row in found.items()}
    for alone in (2, 3):
        for other in times.keys() - {alone}:
            before, after = sorted((times[alone], times[other]))
            assert before[1] <= after[0], (alone, other)
    assert max(times[0][0], times[1][0]) < min(times[0][1], times[1][1])  # these two ran at once


def test_when_the_time_is_up_the_report_is_complete() -> None:
    found = run([job(0), *(job(n, seconds=600) for n in range(1, 5))], seconds=2)
    assert sorted(found) == list(range(5))
    assert found[0]["status"] == "done"
    assert {found[n]["status"] for n in range(1, 5)} == {"not run"}
    assert found[1]["error"] == "the time was up while it ran"
    assert found[4]["error"] == "no time was left"


# Jobs


@pytest.mark.parametrize("quick", [False, True])
def test_every_job_is_a_call_of_its_measurement(quick: bool) -> None:
    found = list(jobs(quick=quick))
    assert len({job.name for job in found}) == len(found)
    assert {job.kind for job in found} == {*KINDS, "prepare"}
    for one in found:
        inspect.signature(MEASUREMENTS[one.kind]).bind(Bench(), **one.settings)
        assert json.loads(json.dumps(one.settings)) == one.settings


def test_every_case_is_compared_in_both_types() -> None:
    found = {(one.settings["case"], one.settings["types"]) for one in jobs(quick=True) if one.kind == "correctness"}
    assert found == {(case.name, types) for case in CASES for types in ("float32", "bf16")}


# Measurements


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a measurement sets for its process is put back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    yield
    torch.use_deterministic_algorithms(False)


class Inexact(Bench):
    """A planned model whose parameters are slightly other ones."""

    def optimized(self, built: Built, budget: int | float, **options: Any) -> nn.Module:
        with torch.no_grad():
            next(built[0].parameters()).mul_(1.0001)
        return super().optimized(built, budget, **options)


class Careless(Bench):
    """A planned model that draws a random number which the plain one doesn't draw."""

    def optimized(self, built: Built, budget: int | float, **options: Any) -> nn.Module:
        optimized = super().optimized(built, budget, **options)
        optimized.register_forward_pre_hook(drawing)
        return optimized


def drawing(*_: Any) -> None:
    torch.rand(1)


@pytest.mark.usefixtures("own_settings")
def test_a_planned_step_is_compared_with_eager() -> None:
    found = correctness(Bench("cpu"), case="mlp", types="bf16", budget=0.8, deterministic=True)
    assert found["differing"] == found["eager_differing"] == []
    assert found["compared"] == 2 + 14  # loss, random state, and a weight and a bias for each of seven layers
    assert found["deterministic"]
    assert torch.are_deterministic_algorithms_enabled()
    assert found["peak_bytes"] <= found["budget_bytes"] < found["plain_bytes"]
    assert found["repeats"] > 0


@pytest.mark.usefixtures("own_settings")
def test_other_bits_are_seen() -> None:
    found = correctness(Inexact("cpu"), case="mlp", types="float32", budget=1.0, deterministic=False)
    assert "loss" in found["differing"]
    assert "gradient of model.head.weight" in found["differing"]
    assert "random state" not in found["differing"]


@pytest.mark.usefixtures("own_settings")
def test_other_random_states_are_seen() -> None:
    found = correctness(Careless("cpu"), case="mlp", types="float32", budget=1.0, deterministic=False)
    assert found["differing"] == ["random state"]


def test_ways_to_save_memory_are_measured_beside_eager() -> None:
    bench = Bench("cpu", tiny=True)
    found = {way: frontier(bench, subject="gpt", way=way) for way in ("checkpoint", "selective")}
    found["fxckpt"] = frontier(bench, subject="gpt", way="fxckpt", budget=0.8)
    for row in found.values():
        assert row["gradient_difference"] == 0
        assert row["peak_bytes"] < row["plain_bytes"]
        assert row["samples_per_s"] * row["step_us"] == pytest.approx(128e6)  # two times 64 tokens
    assert found["fxckpt"]["peak_bytes"] <= found["fxckpt"]["budget_bytes"] == int(0.8 * found["fxckpt"]["plain_bytes"])
    below = frontier(bench, subject="gpt", way="fxckpt", budget=0.1)
    assert below["floor_bytes"] > 0.1 * below["plain_bytes"]
    assert "peak_bytes" not in below


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compile", "compiled checkpoint"])
def test_compiled_steps_are_measured_beside_eager(way: str) -> None:
    found = frontier(Bench("cpu", tiny=True), subject="gpt", way=way, budget=1.0)
    assert found["gradient_difference"] < 1e-2
    assert found["step_us"] > 0


def test_what_trains_under_a_limit_is_told() -> None:
    found = limit(Bench("cpu", tiny=True), subject="resnet50", fraction=0.9)
    assert found["eager"] == "trained"  # a CPU has no limit
    assert found["attempts"] == [[1.0, "trained"]]
    assert found["budget_bytes"] == found["limit_bytes"] < found["plain_bytes"]
    assert len(found["losses"]) == 4


def test_running_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(torch.Tensor, "sub_", exhausted)
    monkeypatch.setattr(limits, "SHARES", (0.99,))
    found = limit(Bench("cpu", tiny=True), subject="resnet50", fraction=0.95)
    assert found["eager"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert found["attempts"] == [[0.99, found["eager"]]]
    assert "losses" not in found


@pytest.mark.slow
@pytest.mark.usefixtures("own_settings")
def test_launching_and_planning_are_timed(tmp_path: Path) -> None:
    bench = Bench("cpu", tiny=True, folder=tmp_path)
    first = planning(bench, subject="resnet50", budget=0.95, cache="cold")
    second = planning(bench, subject="resnet50", budget=0.95, cache="warm")
    assert first["ops"] == second["ops"] > 0
    launched = host(bench, model="resnet50")
    assert launched["repeats"] == 0
    assert launched["time"]["median"] > 0


def test_an_error_is_a_result() -> None:
    found = measured("frontier", {"subject": "no such model", "way": "eager"}, Bench("cpu"))
    assert found["status"] == "failed"
    assert found["error"] == "KeyError: 'no such model'"
    assert "timing.py" in found["trace"]


# Results


CORRECT: Row = {
    "status": "done",
    "seconds": 2.0,
    "deterministic": True,
    "compared": 16,
    "eager_differing": [],
    "differing": [],
    "planning_s": 1.0,
    "floor_bytes": None,
    "plain_bytes": 2000,
    "budget_bytes": 1000,
    "predicted_bytes": 1000,
    "peak_bytes": 1000,
    "repeats": 3,
}
TIMED: Row = {
    "status": "done",
    "seconds": 2.0,
    "plain_bytes": 4 * 2**20,
    "peak_bytes": 3 * 2**20,
    "plain_us": 1000.0,
    "step_us": 1100.0,
    "time": {"low": 1.0, "median": 1.1, "high": 1.2},
    "samples_per_s": 1000.0,
    "gradient_difference": 0.0,
    "first_call_s": 3.0,
    "budget_bytes": 3 * 2**20,
}
LIMITED: Row = {
    "status": "done",
    "seconds": 2.0,
    "plain_bytes": 10 * 2**20,
    "limit_bytes": 8 * 2**20,
    "eager": "OutOfMemoryError: CUDA out of memory",
    "attempts": [[1.0, "OutOfMemoryError: …"], [0.95, "trained"]],
    "budget_bytes": 7 * 2**20,
    "allocated_bytes": 7 * 2**20,
    "reserved_bytes": 8 * 2**20,
}


def chosen(kind: str, **settings: Any) -> Job:
    return next(one for one in jobs() if one.kind == kind and settings.items() <= one.settings.items())


def test_a_row_is_replaced_by_a_newer_one_but_not_by_none(tmp_path: Path) -> None:
    results, one = Results(tmp_path), chosen("correctness", case="mlp")
    results.told({"device": "A"})
    results.add(one, {"status": "failed", "seconds": 1, "error": "no"})
    results.add(one, dict(CORRECT))
    results.add(one, {"status": "not run", "seconds": 0, "error": "no time was left"})
    assert [row["status"] for row in read(tmp_path / RESULTS)["rows"]] == ["done"]
    again = Results(tmp_path)
    again.told({"device": "A"})
    assert len(read(tmp_path / RESULTS)["rows"]) == 1
    again.told({"device": "B"})
    assert read(tmp_path / RESULTS)["rows"] == []
    assert not list(tmp_path.glob("*.part"))


def test_the_page_tells_what_is_wrong(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.told({"device": "A"})
    results.add(chosen("correctness", case="mlp", types="float32"), {**CORRECT, "differing": ["loss", "b", "c"]})
    results.add(chosen("correctness", case="mlp", types="bf16"), {**CORRECT, "peak_bytes": 1100})
    results.add(chosen("frontier", subject="gpt", way="fxckpt"), {**TIMED, "budget_bytes": 2 * 2**20})
    results.add(
        chosen("frontier", subject="gpt", way="selective"), {"status": "crashed", "seconds": 1, "error": "SIGSEGV"}
    )
    text = page(results.data)
    assert text == (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "1 of 2 planned steps left the bits of eager's" in text
    assert "1 of 2 kept their budget; measured peaks are within 10.00% of the predicted ones" in text
    assert "| **3**: loss, b, … |" in text
    assert "**100 B over**" in text
    assert "**50.00% over**" in text
    assert "| frontier gpt selective None | crashed | SIGSEGV |" in text


def test_the_readme_has_the_sum_of_it(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert readme(results.data) == ""
    results.told({"device": "A", "torch": "2"})
    results.add(chosen("correctness", case="mlp"), dict(CORRECT))
    results.add(chosen("frontier", subject="gpt", way="fxckpt", budget=0.8), dict(TIMED))
    results.add(
        chosen("frontier", subject="gpt", way="fxckpt", budget=0.4),
        {"status": "done", "seconds": 1, "plain_bytes": 2**22, "floor_bytes": 2**21},
    )
    results.add(chosen("limit", subject="gpt"), dict(LIMITED))
    text = readme(results.data)
    assert text.startswith("### On a GPU: A\n")
    assert "1 of 1 kept their budget" in text
    assert "| **fxckpt** in 0.8 of eager's peak | 3.00 | 0.750 | 1.100 (1.000–1.200) | 1.1 | 1,000 | 0 | yes |" in text
    assert "| **fxckpt** in 0.4 of eager's peak | below the floor of 2.00 | 0.500 |" in text
    assert "under a hard limit of 8.00 MiB eager runs out of memory; planned in 7.00 MiB it trains" in text
    kept = {**results.data, "rows": [{**row, "eager": "trained"} for row in results.data["rows"]]}
    assert "hard limit" not in readme(kept)


def test_the_readme_is_that_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    data = read(ROOT / "benchmarks" / "results" / "gpu" / RESULTS)
    assert placed(text, BEGIN, readme(data)) == text


# The whole


@pytest.mark.slow
def test_it_runs_where_no_tables_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "tabulate.py").write_text("raise ImportError('it is not installed')\n", encoding="utf-8")
    command = (sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--minutes", "5")
    wanted = ("--only", "correctness", "--quick", "--match", "mlp", "--out", str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, *wanted], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = read(tmp_path / "out" / RESULTS)
    assert [row["status"] for row in data["rows"]] == ["done", "done"], data
    assert [row["differing"] for row in data["rows"]] == [[], []]
    assert data["machine"]["torch"] == torch.__version__


def test_neither_planning_nor_measuring_needs_tables() -> None:
    code = "import sys; sys.modules['tabulate'] = None; import benchmarks.gpu.__main__, benchmarks.gpu.worker"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

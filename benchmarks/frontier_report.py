"""What `benchmarks/frontier.py` finds out about a model, and how it is written down: JSON, a table, a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxckpt.core.simulate import Figures
from fxckpt.steps.comparison import Ratio


@dataclass(frozen=True)
class Point:
    """One way to run the step.

    Attributes:
        name: what it is.
        family: ways that differ in one setting only share it.
        peak_bytes: measured, all counted [B].
        flops_ratio: FLOPs of matrix products, convolutions and attention over those of the plain step.
        gradient_difference: the largest to the plain model's, of any element.
        budget_bytes: what it was told to keep to, if it takes a bound on the peak [B].
        predicted: by fxckpt, for its own plans.
        time: of a step over the plain model's; None if nothing was timed.
    """

    name: str
    family: str
    peak_bytes: int
    flops_ratio: float
    gradient_difference: float
    budget_bytes: int | None = None
    predicted: Figures | None = None
    time: Ratio | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the peak is within the budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True)
class Rival:
    """A peer, and fxckpt with the peer's peak as its budget, None if it can't keep to that.

    `time` is that of fxckpt's step over the peer's.
    """

    peer: Point
    fxckpt: Point | None
    time: Ratio | None = None


@dataclass(frozen=True)
class Result:
    """All that was measured on a model.

    Attributes:
        model: its name.
        plain: the model itself.
        plain_step_us: median time of its step; None if nothing was timed [µs].
        baseline: what fxckpt predicts for it.
        floor_bytes: the lowest budget that fxckpt takes [B].
        fxckpt: fxckpt in several budgets.
        rivals: the peers.
    """

    model: str
    plain: Point
    plain_step_us: float | None
    baseline: Figures
    floor_bytes: int
    fxckpt: tuple[Point, ...]
    rivals: tuple[Rival, ...]

    def faults(self) -> list[str]:
        """What fxckpt did not do: keep to a budget, give the plain model's gradients, reach a peer's peak."""
        ours = [*self.fxckpt, *(r.fxckpt for r in self.rivals if r.fxckpt is not None)]
        found = [f"{self.model}: peak {p.peak_bytes} in a budget of {p.budget_bytes}" for p in ours if not p.is_kept]
        found += [f"{self.model}: gradients differ by {p.gradient_difference}" for p in ours if p.gradient_difference]
        found += [f"{self.model}: can't reach the peak of {r.peer.name}" for r in self.rivals if r.fxckpt is None]
        return found


HEADERS = ("", "peak MiB", "time", "FLOPs", "gradients off by", "budget kept", "fxckpt: FLOPs", "time", "over peer's")


def table(result: Result) -> str:
    """Everything as a table in Markdown; times are ratios to the plain model's, with quartiles."""
    rows = [_cells(point) for point in (result.plain, *result.fxckpt)]
    for rival in result.rivals:
        ours = rival.fxckpt
        found = ("–", "–") if ours is None else (f"{ours.flops_ratio:.3f}", _ratio(ours.time))
        rows.append([*_cells(rival.peer), *found, _ratio(rival.time)])
    return tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def _cells(point: Point) -> list[str]:
    kept = "–" if point.budget_bytes is None else "yes" if point.is_kept else "**no**"
    difference = f"{point.gradient_difference:.1g}" if point.gradient_difference else "0"
    figures = f"{point.peak_bytes / 2**20:.2f}", _ratio(point.time), f"{point.flops_ratio:.3f}"
    return [point.name, *figures, difference, kept]


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else str(ratio)


def write(folder: Path, result: Result, *, runs: int) -> None:
    """Write `frontier_MODEL.json`, `.md` and, if times were taken, `.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"frontier_{result.model}"
    data = {"machine": machine(runs), **asdict(result)}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    title = f"# {result.model}: time against peak memory"
    note = f"{machine_text(machine(runs))} Floor of fxckpt: {result.floor_bytes / 2**20:.2f} MiB."
    path.with_suffix(".md").write_text(f"{title}\n\n{note}\n\n{table(result)}\n")
    if result.plain_step_us is not None:
        draw(path.with_suffix(".svg"), result, result.plain_step_us)


def machine(runs: int) -> dict[str, str | int]:
    """What the figures were taken with."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "runs": runs,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine_text(machine: Mapping[str, str | int]) -> str:
    """The same as a sentence."""
    return f"Measured with {', '.join(f'{name} {value}' for name, value in machine.items())}."


def read(path: Path) -> Result:
    """A result that was written as JSON."""
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["machine"]
    rivals = tuple(
        Rival(_point(r["peer"]), None if r["fxckpt"] is None else _point(r["fxckpt"]), _time(r["time"]))
        for r in data["rivals"]
    )
    return Result(
        **{
            **data,
            "plain": _point(data["plain"]),
            "baseline": Figures(**data["baseline"]),
            "fxckpt": tuple(map(_point, data["fxckpt"])),
            "rivals": rivals,
        }
    )


def _point(data: dict[str, Any]) -> Point:
    predicted = None if data["predicted"] is None else Figures(**data["predicted"])
    return Point(**{**data, "predicted": predicted, "time": _time(data["time"])})


def _time(data: dict[str, float] | None) -> Ratio | None:
    return None if data is None else Ratio(**data)


def draw(path: Path, result: Result, step_us: float) -> None:
    """The picture. Estimates are drawn as ratios to the estimate for the plain model, like measured times."""
    from matplotlib import pyplot as plt

    from fxckpt.core.report.plot import plot_curve

    scale = step_us / result.baseline.step_us
    predicted = [replace(p.predicted, step_us=p.predicted.step_us * scale) for p in result.fxckpt if p.predicted]
    baseline = replace(result.baseline, step_us=step_us)
    families = dict.fromkeys(r.peer.family for r in result.rivals)
    peers = {f: _series((r.peer for r in result.rivals if r.peer.family == f), step_us) for f in families}
    fig, ax = plot_curve(predicted, baseline=baseline, measured=_series(result.fxckpt, step_us), peers=peers)
    ax.set_title(f"{result.model}: fxckpt, estimated and measured, and what torch offers, measured")
    fig.savefig(path)
    plt.close(fig)


def _series(points: Iterable[Point], step_us: float) -> list[tuple[int, float]]:
    return [(p.peak_bytes, p.time.median * step_us) for p in points if p.time is not None]

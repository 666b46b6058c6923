"""Pictures that stand still: memory over a step, and time against memory. They need the extra `fxckpt[plot]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, log2
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fxckpt.core.report.palette import BLUE, GREY, KIND_COLOURS, ORANGE, SERIES, TEXT, VERMILION
from fxckpt.core.report.planned import Planned
from fxckpt.core.report.rows import short_target
from fxckpt.core.report.sampling import Axis, columns, ticks
from fxckpt.core.simulate import Figures, PeakKind, Timeline
from fxckpt.errors import FxckptError, MissingExtraError
from fxckpt.units import format_bytes, format_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": TEXT,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 10.0,
    "grid.alpha": 0.25,
    "grid.color": TEXT,
    "legend.framealpha": 0.0,
    "legend.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
_MOST_TICKS = 8
_MOST_COLUMNS = 1000
_HEADROOM = 1.2

Bytes = npt.NDArray[np.int64]


def plot_curve(
    points: Sequence[Figures],
    *,
    baseline: Figures,
    knee: Figures | None = None,
    budget_bytes: int | None = None,
    measured: Sequence[tuple[int, float]] = (),
    peers: Mapping[str, Sequence[tuple[int, float]]] = {},
) -> tuple[Figure, Axes]:
    """Time of a step against its peak.

    Args:
        points: predicted figures of plans; between two of them the one of lower peak is what fits.
        baseline: predicted figures of the plain model.
        knee: the point beyond which less memory gets dear, if it is to be marked.
        budget_bytes: drawn as a line [B].
        measured: peaks and times of real steps [B, µs].
        peers: the same of other ways to save memory, by name.

    Returns:
        The figure and its axes. The background is transparent.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing() as (fig, ax):
        curve = sorted((figures.peak_bytes, figures.step_us) for figures in (*points, baseline))
        ax.plot(*_columns(curve), color=BLUE, marker="o", markersize=4, drawstyle="steps-post", label="estimated")
        ax.plot(baseline.peak_bytes, baseline.step_us, "o", color=GREY, markersize=8, label="plain model")
        if knee is not None:
            ax.plot(knee.peak_bytes, knee.step_us, "o", color=VERMILION, markersize=8, label="knee")
        if measured:
            ax.plot(*_columns(measured), "o", color=ORANGE, fillstyle="none", markersize=8, label="measured")
        for number, (name, series) in enumerate(peers.items()):
            colour, mark = SERIES[number % len(SERIES)]
            ax.plot(*_columns(sorted(series)), mark, color=colour, markersize=6, label=name)
        if budget_bytes is not None:
            label = f"budget {format_bytes(budget_bytes)}"
            ax.axvline(budget_bytes, color=TEXT, linestyle="--", linewidth=1, label=label)
        ax.set_xlabel("peak memory")
        ax.set_ylabel("time of a step")
        ax.grid()
        bytes_axis(ax, "x")
        ax.yaxis.set_major_formatter(lambda value, _: format_us(value))
        if baseline.step_us > 0:
            _ratio_axis(ax, baseline.step_us)
        legend(ax)
    return fig, ax


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [peak_bytes for peak_bytes, _ in points], [step_us for _, step_us in points]


def _ratio_axis(ax: Axes, step_us: float) -> None:
    """The same times on the right, in steps of the plain model."""
    functions = (lambda us: np.asarray(us) / step_us, lambda ratio: np.asarray(ratio) * step_us)
    ratio = ax.secondary_yaxis("right", functions=functions)
    ratio.set_ylabel("× the plain model")


def plot_timeline(plan: Planned, *, axis: Axis = "time") -> tuple[Figure, Axes]:
    """Memory in use over the step, stacked by what it is for, with the plain model's outline and the budget.

    Args:
        plan: the plan.
        axis: "time" as the cost model has it, or "steps", each as wide as the other. Where there are thousands of
            steps, those of most bytes are drawn.

    Returns:
        The figure and its axes. The background is transparent.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FxckptError: there is no such axis, or the plan has no ops.
    """
    edges, steps = columns(plan.timeline, axis, _MOST_COLUMNS)
    plain_edges, plain_steps = columns(plan.baseline_timeline, axis, _MOST_COLUMNS)
    with drawing(10.0, 5.0) as (fig, ax):
        live_bytes = plan.timeline.live_bytes_by_kind
        for kind, low, high in _stacked({kind: live_bytes[kind][steps] for kind in KIND_COLOURS}):
            edge = _closed(low), _closed(high)
            area = ax.fill_between(edges, *edge, step="post", color=KIND_COLOURS[kind], linewidth=0, label=kind)
            area.set_antialiased(False)  # else the page shows between areas
        outline = _closed(plan.baseline_timeline.live_bytes[plain_steps])
        label = f"plain model, peak {format_bytes(plan.baseline.peak_bytes)}"
        ax.plot(plain_edges, outline, color=TEXT, linewidth=1, drawstyle="steps-post", label=label)
        highest = max(plan.predicted.peak_bytes, plan.baseline.peak_bytes)
        above = " (above)" if plan.budget_bytes > 1.5 * highest else ""
        label = f"budget {format_bytes(plan.budget_bytes)}{above}"
        ax.axhline(plan.budget_bytes, color=VERMILION, linestyle="--", linewidth=1.2, label=label)
        ax.set_xlim(0, max(edges[-1], plain_edges[-1]))
        ax.set_ylim(0, _HEADROOM * max(highest, 0 if above else plan.budget_bytes, 1))
        _label_peak(ax, plan.timeline, axis)
        _label_axes(ax, plan.timeline, axis)
        legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig, ax


def save_timeline(plan: Planned, file: str | PathLike[str]) -> None:
    """Write `plot_timeline` to a file, in the format that its name ends in.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FxckptError: there is no such format, the file can't be written, or the plan has no ops.
    """
    fig, _ = plot_timeline(plan)
    try:
        fig.savefig(file)
    except (OSError, ValueError) as error:
        raise FxckptError(f"can't write {file}: {error}") from error
    finally:
        pyplot().close(fig)


def _stacked(rows: Mapping[PeakKind, Bytes]) -> Iterator[tuple[PeakKind, Bytes, Bytes]]:
    """Each kind of which there is anything, with its lower and upper edge."""
    low = np.zeros_like(next(iter(rows.values())))
    for kind, row in rows.items():
        if row.any():
            yield kind, low, low + row
        low = low + row


def _closed(row: Bytes) -> Bytes:
    """One value more, for the right edge of the last column."""
    return np.append(row, row[-1])


def _label_peak(ax: Axes, timeline: Timeline, axis: Axis) -> None:
    step = timeline.peak_step
    op = timeline.graph.ops[timeline.schedule.order[step]]
    x = ticks(timeline, axis)[step]
    on_left = bool(x < ax.get_xlim()[1] / 2)
    place = f"{short_target(op.target)} in {op.module or '(model)'}"
    ax.plot(x, timeline.peak_bytes, "o", color=VERMILION, markersize=5, label="peak of the plan")
    ax.annotate(
        f"peak {format_bytes(timeline.peak_bytes)}\n{printable(place)}",
        (x, timeline.peak_bytes),
        xytext=(x, 0.98),
        textcoords=ax.get_xaxis_transform(),
        ha="left" if on_left else "right",
        va="top",
        arrowprops={"arrowstyle": "-", "color": VERMILION, "linewidth": 0.8, "relpos": (0 if on_left else 1, 0)},
        parse_math=False,
    )


def _label_axes(ax: Axes, timeline: Timeline, axis: Axis) -> None:
    begins = ticks(timeline, axis)
    in_time = begins is timeline.start_us
    if in_time:
        ax.xaxis.set_major_formatter(lambda value, _: format_us(value))
    ax.set_xlabel(
        "time of the step by the cost model" if in_time else "ops of the step, in the order in which they run"
    )
    ax.set_ylabel("memory in use")
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    bytes_axis(ax, "y")
    backward = begins[timeline.schedule.forward_steps]
    ax.axvline(backward, color=TEXT, linestyle=":", linewidth=1, label="backward starts")


def pyplot() -> ModuleType:
    """The module `matplotlib.pyplot`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingExtraError("drawing needs matplotlib: pip install 'fxckpt[plot]'") from error
    return plt


@contextmanager
def drawing(width: float = 8.0, height: float = 4.5) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure in the style of all pictures; sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = pyplot()
    with plt.rc_context(_STYLE):
        yield plt.subplots(figsize=(width, height), layout="constrained")


def bytes_axis(ax: Axes, which: Literal["x", "y"]) -> None:
    """Ticks at whole powers of two, or whole multiples of one, written as sizes."""
    from matplotlib.ticker import MultipleLocator

    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MultipleLocator(2 ** max(ceil(log2(max(high - low, 1) / _MOST_TICKS)), 0)))
    axis.set_major_formatter(lambda value, _: format_bytes(int(value)))


def printable(text: str) -> str:
    """A text in which what fonts can't show is a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text)


def legend(ax: Axes, **place: Any) -> None:
    """The legend of all areas, lines and points; names are taken as they are, neither hidden nor read as formulas."""
    drawn = [*ax.collections, *ax.lines]
    labels = [str(artist.get_label()) for artist in drawn]
    for text in ax.legend(drawn, labels, **place).get_texts():
        text.set_parse_math(False)

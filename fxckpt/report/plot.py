"""Pictures that stand still: memory over a step, and time against memory. They need the extra `fxckpt[plot]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, log2
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fxckpt.errors import MissingExtraError
from fxckpt.plans import Figures
from fxckpt.report.palette import BLUE, GREY, ORANGE, SERIES, TEXT
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


def plot_curve(
    points: Sequence[Figures],
    *,
    baseline: Figures,
    budget_bytes: int | None = None,
    measured: Sequence[tuple[int, float]] = (),
    peers: Mapping[str, Sequence[tuple[int, float]]] = {},
) -> tuple[Figure, Axes]:
    """Time of a step against its peak.

    Args:
        points: predicted figures of plans; between two of them the one of lower peak is what fits.
        baseline: predicted figures of the plain model.
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


@contextmanager
def drawing(width: float = 8.0, height: float = 4.5) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure in the style of all pictures; sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingExtraError("drawing needs matplotlib: pip install 'fxckpt[plot]'") from error
    with plt.rc_context(_STYLE):
        yield plt.subplots(figsize=(width, height), layout="constrained")


def bytes_axis(ax: Axes, which: Literal["x", "y"]) -> None:
    """Ticks at whole powers of two, or whole multiples of one, written as sizes."""
    from matplotlib.ticker import MultipleLocator

    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MultipleLocator(2 ** max(ceil(log2(max(high - low, 1) / _MOST_TICKS)), 0)))
    axis.set_major_formatter(lambda value, _: format_bytes(int(value)))


def legend(ax: Axes) -> None:
    """The legend of all areas, lines and points; names are taken as they are, neither hidden nor read as formulas."""
    drawn = [*ax.collections, *ax.lines]
    for text in ax.legend(drawn, [str(artist.get_label()) for artist in drawn]).get_texts():
        text.set_parse_math(False)

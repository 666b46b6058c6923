"""Pictures of plans: what is drawn is what `simulate` says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib import pyplot as plt
from matplotlib.collections import Collection

from fxckpt.core.graph import Graph
from fxckpt.core.plans import Plan
from fxckpt.core.report.palette import KIND_COLOURS
from fxckpt.core.report.plot import plot_curve, plot_timeline
from fxckpt.core.report.sampling import columns, ticks
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import PEAK_KINDS, Figures, simulate
from fxckpt.errors import FxckptError
from tests.support.strategies import chain, graphs_with_schedules

SCHEDULE = Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4)
HOSTILE = "$\\frac{</script>\n\x00\ud800"


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def make_plan(budget_bytes: int = 130) -> Plan:
    return Plan(chain(), SCHEDULE, "dp", "reference", budget_bytes)


def test_every_kind_has_a_colour_of_its_own() -> None:
    assert set(KIND_COLOURS) == set(PEAK_KINDS)
    assert len(set(KIND_COLOURS.values())) == len(PEAK_KINDS)


def thickness(area: Collection, place: float) -> float:
    """Height of a drawn area above a place on the horizontal axis."""
    edges = pairwise(np.asarray(area.get_paths()[0].vertices).tolist())
    crossed = [y for (x, y), (other, _) in edges if min(x, other) < place < max(x, other)]
    return float(max(crossed) - min(crossed))


@pytest.mark.parametrize("axis", ["time", "steps"])
def test_the_stack_is_that_of_the_simulation(axis: Literal["time", "steps"]) -> None:
    plan = make_plan()
    _, ax = plot_timeline(plan, axis=axis)
    middles = [(a + b) / 2 for a, b in pairwise(ticks(plan.timeline, axis).tolist())]
    drawn = {str(area.get_label()): [thickness(area, at) for at in middles] for area in ax.collections}
    assert drawn == {k: v.tolist() for k, v in plan.timeline.live_bytes_by_kind.items() if v.any()}
    assert [sum(column) for column in zip(*drawn.values(), strict=True)] == plan.timeline.live_bytes.tolist()


def test_the_timeline_names_the_peak_and_draws_plain_model_and_budget() -> None:
    plan = make_plan()
    _, ax = plot_timeline(plan)
    (label,) = [text.get_text() for text in ax.texts]
    assert label == "peak 122 B\nlayer_backward in (model)"
    lines = {str(line.get_label()): line for line in ax.lines}
    peak_us = plan.timeline.start_us[plan.timeline.peak_step]
    assert np.asarray(lines["peak of the plan"].get_xydata()).tolist() == [[peak_us, 122]]
    outline = np.asarray(lines["plain model, peak 139 B"].get_xydata())
    assert outline[:-1, 1].tolist() == plan.baseline_timeline.live_bytes.tolist()
    assert outline[:, 0].tolist() == plan.baseline_timeline.start_us.tolist()
    assert set(np.asarray(lines["budget 130 B"].get_ydata()).tolist()) == {130}
    assert np.asarray(lines["backward starts"].get_xdata()).tolist() == [10.0, 10.0]


def test_a_budget_far_above_does_not_flatten_the_picture() -> None:
    _, ax = plot_timeline(make_plan(budget_bytes=10**9))
    assert "budget 954 MiB (above)" in [str(line.get_label()) for line in ax.lines]
    assert ax.get_ylim()[1] < 200


def test_a_timeline_that_takes_no_time_is_drawn_by_steps() -> None:
    graph = replace(chain(), ops=tuple(replace(op, time_us=0.0) for op in chain().ops))
    assert ticks(simulate(graph, plain(graph)), "time").tolist() == list(range(9))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(FxckptError, match='"time" or "steps", not \'bytes\''):
        plot_timeline(make_plan(), axis="bytes")  # type: ignore[arg-type]
    with pytest.raises(FxckptError, match="no ops"):
        plot_timeline(Plan(Graph((), (), 0), Schedule((), 0), "dp", "reference", 1))


def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    ops = tuple(replace(op, target=HOSTILE, module=HOSTILE) for op in chain().ops)
    fig, ax = plot_timeline(Plan(replace(chain(), ops=ops), SCHEDULE, "dp", "reference", 130))
    fig.savefig(tmp_path / "timeline.svg")
    assert "$\\frac{</script>???" in ax.texts[0].get_text()


@settings(max_examples=40)
@given(graphs_with_schedules())
def test_few_columns_lose_no_peak(drawn: tuple[Graph, Schedule]) -> None:
    timeline = simulate(*drawn)
    if not len(timeline.schedule):
        return
    for most in (1, 2, 3, 100):
        edges, steps = columns(timeline, "time", most)
        assert len(edges) == len(steps) + 1 <= max(most, 1) + 1
        assert timeline.live_bytes[steps].max() == timeline.peak_bytes
        begins = ticks(timeline, "time")
        for left, right, step in zip(edges, edges[1:], steps, strict=False):
            assert begins[step] <= right
            assert begins[step + 1] >= left


def test_the_curve_holds_every_point_and_the_plain_model() -> None:
    points = [Figures(50, 130.0, 30.0, 0), Figures(80, 110.0, 10.0, 0)]
    peers = {"_checkpoint $x$": [(70, 140.0), (60, 150.0)]}
    _, ax = plot_curve(
        points,
        baseline=Figures(100, 100.0, 0.0, 0),
        knee=points[1],
        budget_bytes=90,
        measured=[(81, 112.0)],
        peers=peers,
    )
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in ax.lines}
    assert drawn["estimated"] == [[50, 130], [80, 110], [100, 100]]
    assert drawn["plain model"] == [[100, 100]]
    assert drawn["knee"] == [[80, 110]]
    assert drawn["measured"] == [[81, 112]]
    assert drawn["_checkpoint $x$"] == [[60, 150], [70, 140]]
    assert [x for x, _ in drawn["budget 90 B"]] == [90, 90]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(drawn)


def test_without_matplotlib_the_error_names_the_extra() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None
from fxckpt.errors import MissingExtraError
from fxckpt.core.plans import Plan
from fxckpt.core.schedule import plain
from tests.support.strategies import chain
try:
    Plan(chain(), plain(chain()), "dp", "reference", 1).plot_timeline()
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "drawing needs matplotlib: pip install 'fxckpt[plot]'\n", done.stderr

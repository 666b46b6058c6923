"""The film of a plan: cells are filled as far as their bytes are in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib.colors import to_rgb
from PIL import Image

from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.report.film import Scene, cells_of, picture
from fxckpt.core.report.palette import KIND_COLOURS
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.errors import FxckptError
from tests.support.strategies import chain, graphs_with_schedules

SCHEDULE = Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4)


def make_plan() -> Plan:
    return Plan(chain(), SCHEDULE, "dp", "reference", 130)


def test_backward_stands_below_the_forward_op_whose_result_it_reads() -> None:
    cells = cells_of(chain())
    assert cells.column == (0, 1, 2, 3, 2, 1, 0, 0)  # b3 reads a2, b2 reads a1, b1 reads a0, b0 the input
    assert cells.place[7] == (0, 2)
    assert cells.size_bytes[0].tolist() == [10, 20, 40, 1]
    assert cells.size_bytes[1].tolist() == [10 + 4 + 4, 20 + 4, 40 + 4, 0]


def test_large_graphs_have_few_columns() -> None:
    storages = [Storage("x", 1, "input"), *(Storage(f"a{i}", 1, "activation") for i in range(1000))]
    ops = [Op(f"f{i}", "f", (i,), (i + 1,)) for i in range(1000)]
    cells = cells_of(Graph(tuple(ops), tuple(storages), 1000))
    assert cells.size_bytes.shape == (2, 48)
    assert cells.size_bytes.sum() == 1000
    assert cells.size_bytes[0].min() >= 20
    assert list(cells.column) == sorted(cells.column)


@settings(max_examples=40)
@given(graphs_with_schedules())
def test_cells_hold_what_ops_have_in_memory(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    scene = Scene("plan", timeline, ())
    written = {storage for op in graph.ops for storage in op.writes}
    for step in range(len(schedule)):
        held_bytes = sum((part * scene.cells.size_bytes).sum() for part in scene.filled(step).values())
        alive = [life.storage for life in timeline.alive_at(step)]
        assert held_bytes == pytest.approx(sum(graph.storages[s].size_bytes for s in alive if s in written))


def test_what_a_picture_shows() -> None:
    scene = Scene("plan", make_plan().timeline, ())

    def colours(step: int, row: int, column: int) -> set[tuple[float, ...]]:
        half = np.split(picture(scene, step), 2)[row]
        return {tuple(pixel / 255) for pixel in half[:, column]}

    def is_kind(found: set[tuple[float, ...]], kind: str) -> bool:
        wanted = to_rgb(KIND_COLOURS[kind])  # type: ignore[index]  # a kind
        return all(pixel == pytest.approx(wanted, abs=1 / 255) for pixel in found)

    assert is_kind(colours(4, 0, 2), "saved")  # a2 is kept for b3
    assert is_kind(colours(7, 0, 1), "recomputed")  # a1 has been made again for b2
    assert colours(4, 0, 0) == colours(4, 0, 1) == {tuple(np.array([0xD4] * 3) / 255)}  # a0 and a1 are freed
    assert colours(4, 1, 0) == {tuple(np.array([0xF4] * 3) / 255)}  # backward of the first layer has not run
    assert is_kind(colours(4, 0, 3), "inputs and outputs")


def test_a_film_has_a_frame_an_op_of_the_longest_schedule(tmp_path: Path) -> None:
    file = tmp_path / "plan.gif"
    make_plan().animate(file, progress=False)
    with Image.open(file) as film:
        durations_ms = []
        for frame in range(getattr(film, "n_frames", 1)):
            film.seek(frame)
            durations_ms.append(film.info["duration"])
    longest = sum(durations_ms) // 90 - 12  # the last frame stays for twelve more
    assert longest >= len(SCHEDULE) > len(plain(chain()))
    assert len(durations_ms) >= longest - 1  # no frame is like the one before it, but the last


def test_progress_is_shown_on_stderr_if_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan().animate(tmp_path / "a.gif", progress=False)
    assert capsys.readouterr() == ("", "")
    make_plan().animate(tmp_path / "b.gif")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "drawing" in shown.err
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_what_cannot_be_animated_is_refused(tmp_path: Path) -> None:
    empty = replace(make_plan(), graph=Graph((), (), 0), schedule=Schedule((), 0))
    with pytest.raises(FxckptError, match="no ops"):
        empty.animate(tmp_path / "plan.gif")

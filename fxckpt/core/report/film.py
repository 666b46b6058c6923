"""A plan as a film: op by op over a step, what is in memory, beside the plain model and much recomputation.

After the animations in T. Salimans and Y. Bulatov, "Fitting larger networks into memory" (2018): the nodes of forward
stand in a row from the first to the last, those of backward below them, and backward walks from right to left. Here a
cell is a node or, in large graphs, some consecutive ones, and is filled as far as its bytes are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fxckpt.core.graph import Graph
from fxckpt.core.report.palette import KIND_COLOURS
from fxckpt.core.report.planned import Planned
from fxckpt.core.report.plot import pyplot
from fxckpt.core.report.sampling import columns, ticks
from fxckpt.core.simulate import PeakKind, Timeline, simulate
from fxckpt.core.solvers.baselines.sqrt import sqrt
from fxckpt.core.solvers.min_memory import min_memory
from fxckpt.errors import FxckptError
from fxckpt.units import format_bytes, format_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_MOST_COLUMNS = 48
_MOST_FRAMES = 100
_LAST_FRAMES = 12
_FRAME_MS = 90
_LARGE_OPS = 1000
_LEVELS = 12
_COLOURS = 96
_INK, _PAPER, _UNUSED, _FREED = "#333333", "#ffffff", "#f4f4f4", "#d4d4d4"

Pixels = npt.NDArray[np.uint8]


def animate(plan: Planned, file: str | PathLike[str], *, progress: bool = True) -> None:
    """Write a film of a step as a GIF: the plain model, least memory (`sqrt` in large graphs), and the plan.

    Args:
        plan: the plan.
        file: where to write; its name ends in ".gif".
        progress: show a progress bar on stderr.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FxckptError: the file's name does not end in ".gif" or it can't be written, or the plan has no ops.
    """
    if Path(file).suffix.lower() != ".gif":
        raise FxckptError(f"an animation is written as a GIF: name the file {Path(file).with_suffix('.gif').name}")
    if not Path(file).parent.is_dir():
        raise FxckptError(f"can't write {file}: there is no folder {Path(file).parent}")
    pyplot()
    ticks(plan.timeline, "steps")
    scenes = _scenes(plan)
    count = max(len(scene.steps) for scene in scenes)
    first, *rest = tqdm(_frames(scenes, count), total=count, desc="drawing", unit="frame", disable=not progress)
    try:
        first.save(file, save_all=True, append_images=[*rest, *rest[-1:] * _LAST_FRAMES], duration=_FRAME_MS, loop=0)
    except OSError as error:
        raise FxckptError(f"can't write {file}: {error.strerror}") from error


@dataclass(frozen=True)
class Scene:
    """One schedule in the film.

    Attributes:
        name: what it is.
        timeline: its simulation.
        steps: the step that each frame shows.
    """

    name: str
    timeline: Timeline
    steps: tuple[int, ...]

    @cached_property
    def cells(self) -> Cells:
        """Where its storages are drawn."""
        return cells_of(self.timeline.graph)

    def filled(self, step: int) -> dict[PeakKind, npt.NDArray[np.float64]]:
        """By kind, which part of each cell is in memory at a step; shape (2, columns)."""
        graph, cells = self.timeline.graph, self.cells
        filled = {kind: np.zeros_like(cells.size_bytes, dtype=np.float64) for kind in KIND_COLOURS}
        for kind, life in zip(self.timeline.kinds, self.timeline.lifetimes, strict=True):
            if life.born <= step <= life.dies and life.storage in cells.place:
                place = cells.place[life.storage]
                filled[kind][place] += graph.storages[life.storage].size_bytes / cells.size_bytes[place]
        return filled


@dataclass(frozen=True)
class Cells:
    """Places of storages: the row (0 what forward writes, 1 what backward writes) and the column.

    Attributes:
        place: for each storage that takes memory, its row and column.
        size_bytes: bytes of the storages of each cell, shape (2, columns) [B].
        column: the column of each op.
    """

    place: dict[int, tuple[int, int]]
    size_bytes: npt.NDArray[np.int64]
    column: tuple[int, ...]


def cells_of(graph: Graph) -> Cells:
    """A column for each forward op, or for as many consecutive ones as fit.

    A backward op stands below the last forward op of which it reads a result, or where the op before it stands; so does
    an alternative, which has no storages of its own here.
    """
    count = max(min(graph.forward_count, _MOST_COLUMNS), 1)
    column = [index * count // graph.forward_count for index in range(graph.forward_count)]
    latest = count - 1
    for op in graph.ops[graph.forward_count :]:
        producers = [graph.producer[s] for s in op.reads if 0 <= graph.producer[s] < graph.forward_count]
        latest = column[max(producers)] if producers else latest
        column.append(latest)
    place: dict[int, tuple[int, int]] = {}
    size_bytes = np.zeros((2, count), dtype=np.int64)
    for index, op in enumerate(graph.plain_ops):
        for storage in op.writes:
            if graph.storages[storage].size_bytes:
                place[storage] = int(index >= graph.forward_count), column[index]
                size_bytes[place[storage]] += graph.storages[storage].size_bytes
    return Cells(place, size_bytes, tuple(column))


def _scenes(plan: Planned) -> list[Scene]:
    """The three schedules, all at the same pace: an op a frame, or in long steps some ops a frame."""
    graph = plan.graph
    large = graph.plain_count > _LARGE_OPS
    least = simulate(graph, sqrt(graph, 0) if large else min_memory(graph, 0, effort="fast"))
    timelines = {
        "plain model": plan.baseline_timeline,
        "recomputing between checkpoints (sqrt)" if large else "recomputing for least memory (min_memory)": least,
        f"this plan ({plan.solver})": plan.timeline,
    }
    longest = max(len(timeline.schedule) for timeline in timelines.values())
    frames = min(longest, _MOST_FRAMES)
    scenes = []
    for name, timeline in timelines.items():
        most = -(-frames * len(timeline.schedule) // max(longest, 1))
        scenes.append(Scene(name, timeline, tuple(columns(timeline, "steps", most)[1].tolist())))
    return scenes


def picture(scene: Scene, step: int) -> Pixels:
    """The cells at a step as an image of shape (height, columns, 3): forward's row, and backward's below it."""
    from matplotlib.colors import to_rgb

    cells = scene.cells
    rows, count = cells.size_bytes.shape
    ran = np.zeros((rows, count), dtype=bool)
    for index in scene.timeline.schedule.order[: step + 1]:
        ran[int(index >= scene.timeline.graph.forward_count), cells.column[index]] = True
    image = np.where(ran[..., None, None], to_rgb(_FREED), to_rgb(_UNUSED)) * np.ones((1, 1, _LEVELS, 1))
    low = np.zeros((rows, count))
    for kind, part in scene.filled(step).items():
        high = np.clip(low + part, 0, 1)
        level = np.arange(_LEVELS)
        inside = (level >= np.floor(low * _LEVELS)[..., None]) & (level < np.ceil(high * _LEVELS)[..., None])
        image[inside & (part > 0)[..., None]] = to_rgb(KIND_COLOURS[kind])
        low = high
    pixels = np.rint(image[:, :, ::-1].transpose(0, 2, 1, 3).reshape(rows * _LEVELS, count, 3) * 255)
    return pixels.astype(np.uint8)


def _frames(scenes: list[Scene], count: int) -> Iterator[Image]:
    """The frames, in colours from one palette. What does not change is drawn once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL.Image import Dither, Quantize, fromarray

    fig = Figure(figsize=(9.6, 5.8), dpi=100, facecolor=_PAPER, layout="constrained")
    canvas = FigureCanvasAgg(fig)
    axes = fig.subplots(len(scenes), 2, width_ratios=(3, 2), squeeze=False)
    highest = max(scene.timeline.peak_bytes for scene in scenes)
    longest = max(len(scene.timeline.schedule) for scene in scenes)
    actors = [_Actors(scene, *pair, limits=(longest, highest)) for scene, pair in zip(scenes, axes, strict=True)]
    _legend(fig, scenes)
    canvas.draw()
    still = canvas.copy_from_bbox(fig.bbox)
    palette = fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(_COLOURS, Quantize.MAXCOVERAGE)
    for frame in range(count):
        canvas.restore_region(still)
        for actor in actors:
            actor.draw(frame)
        shown = fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        yield shown.quantize(palette=palette, dither=Dither.NONE)


class _Actors:
    """What moves in the film of one scene: cells, the running op, the cursor, and the figures."""

    def __init__(self, scene: Scene, cells: Axes, curve: Axes, *, limits: tuple[int, int]) -> None:
        from matplotlib.patches import Rectangle

        count = scene.cells.size_bytes.shape[1]
        self.scene = scene
        self.image = cells.imshow(picture(scene, 0), extent=(0, count, 0, 2), aspect="auto", interpolation="nearest")
        self.lines = cells.vlines(range(1, count), 0, 2, color=_PAPER, linewidth=1.5)
        self.floor = cells.axhline(1, color=_PAPER, linewidth=5)
        self.running = Rectangle((0, 0), 1, 1, fill=False, edgecolor=_INK, linewidth=1.5, clip_on=False)
        cells.add_patch(self.running)
        cells.set_yticks([0.5, 1.5], ["backward", "forward"], color=_INK)
        cells.set_xticks([])
        cells.set_title(scene.name, loc="left", fontsize=10, color=_INK)
        cells.tick_params(length=0)
        cells.spines[:].set_visible(False)
        live_bytes = scene.timeline.live_bytes
        curve.fill_between(range(len(live_bytes) + 1), np.append(live_bytes, live_bytes[-1]), step="post", color=_FREED)
        curve.set(xlim=(0, limits[0]), ylim=(0, limits[1] * 1.05), xticks=[], yticks=[])
        curve.spines[["top", "right"]].set_visible(False)
        self.cursor = curve.axvline(0, color=_INK, linewidth=1)
        self.title = curve.set_title("", loc="left", fontsize=9, color=_INK)
        self.moving = (self.image, self.lines, self.floor, self.running, self.cursor, self.title)
        for artist in self.moving:
            artist.set_animated(True)

    def draw(self, frame: int) -> None:
        """Draw what is to be seen in a frame; after its last op a scene stands still."""
        scene, timeline = self.scene, self.scene.timeline
        step = scene.steps[min(frame, len(scene.steps) - 1)]
        op = timeline.schedule.order[step]
        self.image.set_data(picture(scene, step))
        self.running.set_xy((scene.cells.column[op], int(op < timeline.graph.forward_count)))
        self.cursor.set_xdata([step + 0.5] * 2)
        now, peak = format_bytes(int(timeline.live_bytes[step])), format_bytes(timeline.peak_bytes)
        self.title.set_text(f"{now} in use, peak {peak}, {format_us(timeline.step_us)} a step")
        for artist in self.moving:
            assert artist.axes is not None
            artist.axes.draw_artist(artist)


def _legend(fig: Figure, scenes: list[Scene]) -> None:
    from matplotlib.patches import Patch

    seen = {kind for scene in scenes for kind in scene.timeline.kinds}
    drawn = [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items() if kind in seen]
    drawn += [Patch(color=_FREED, label="freed"), Patch(color=_UNUSED, label="not run yet")]
    fig.legend(handles=drawn, loc="outside lower center", ncols=len(drawn), fontsize=9, frameon=False, labelcolor=_INK)

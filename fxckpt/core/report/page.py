"""A plan as one page of HTML that needs no network: the template `page.html` with the plan as JSON in it.

Nothing of a plan becomes markup: the JSON has no `<`, and the page's script makes only text of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from fxckpt.core.report import rows, table
from fxckpt.core.report.palette import KIND_COLOURS
from fxckpt.core.report.planned import Planned
from fxckpt.core.report.prose import closing_text
from fxckpt.core.report.sampling import ticks
from fxckpt.core.simulate import PEAK_KINDS, Timeline
from fxckpt.errors import FxckptError

_PLACE = "{{plan}}"


def page(plan: Planned) -> str:
    """The page of a plan, the same for equal plans.

    Raises:
        FxckptError: the plan has no ops.
    """
    ticks(plan.timeline, "steps")
    template = files("fxckpt.core.report").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(_data(plan), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace(_PLACE, data, 1)


def save_page(plan: Planned, file: str | PathLike[str]) -> None:
    """Write the page of a plan.

    Raises:
        FxckptError: the file can't be written, or the plan has no ops.
    """
    text = page(plan)
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxckptError(f"can't write {file}: {error.strerror}") from error


def _data(plan: Planned) -> dict[str, Any]:
    timeline, schedule = plan.timeline, plan.schedule
    headers, figures = table.figures(plan)
    found = rows.rows(plan, fold=True)
    return {
        "advice": closing_text(plan),
        "facts": table.facts(plan),
        "figures": [headers, *figures],
        "budget_bytes": plan.budget_bytes,
        "order": schedule.order,
        "forward_steps": schedule.forward_steps,
        "again": schedule.repeated_steps(),
        "again_colour": KIND_COLOURS["recomputed"],
        "peak_step": timeline.peak_step,
        "kinds": _kinds(timeline),
        "kind_names": PEAK_KINDS,
        "baseline": _curve(plan.baseline_timeline),
        "columns": table.COLUMNS,
        "rows": [table.cells(plan.graph, row) for row in found],
        "row_keys": [_keys(row) for row in found],
        "row_storages": [row.storages for row in found],
        **_curve(timeline),
        **_wiring(timeline),
    }


def _curve(timeline: Timeline) -> dict[str, Any]:
    return {
        "peak_bytes": timeline.peak_bytes,
        "live_bytes": timeline.live_bytes.tolist(),
        "start_us": timeline.start_us.round(3).tolist(),
    }


def _kinds(timeline: Timeline) -> list[dict[str, Any]]:
    live_bytes = timeline.live_bytes_by_kind
    return [
        {"name": kind, "colour": colour, "live_bytes": live_bytes[kind].tolist()}
        for kind, colour in KIND_COLOURS.items()
        if live_bytes[kind].any()
    ]


def _wiring(timeline: Timeline) -> dict[str, Any]:
    """Ops, storages and lifetimes in the device's memory, column by column."""
    graph = timeline.graph
    lives = zip(timeline.lifetimes, timeline.kinds, strict=True)
    shown = [(life, kind) for life, kind in lives if graph.storages[life.storage].place == "device"]
    return {
        "ops": {
            "name": [op.name for op in graph.ops],
            "target": _shared(op.target for op in graph.ops),
            "module": _shared(op.module for op in graph.ops),
            "source": _shared(rows.source_text(op.source) for op in graph.ops),
            "workspace_bytes": [op.workspace_bytes for op in graph.ops],
        },
        "storages": {
            "name": [storage.name for storage in graph.storages],
            "bytes": [storage.size_bytes for storage in graph.storages],
            "producer": graph.producer,
        },
        "lifetimes": {
            "storage": [life.storage for life, _ in shown],
            "born": [life.born for life, _ in shown],
            "dies": [life.dies for life, _ in shown],
            "kind": [PEAK_KINDS.index(kind) for _, kind in shown],
        },
    }


def _shared(texts: Iterable[str]) -> dict[str, Any]:
    """A column in which equal texts are stored once."""
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(text, len(numbers)) for text in texts]
    return {"texts": list(numbers), "index": index}


def _keys(row: rows.Row) -> list[float | None]:
    """What a row is sorted by in each of `table.COLUMNS`; None where that is the text."""
    numbers = {"bytes": row.size_bytes, "time": row.time_us, "runs": max((d.runs for d in row.decisions), default=1)}
    return [numbers.get(name) for name in table.COLUMNS]

"""Rows of the report: what forward writes, grouped by module path and source line, equal repeated modules folded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from fxckpt.core.decisions import Action, Cause, Decision, decisions, reason
from fxckpt.core.graph import Graph
from fxckpt.core.report.planned import Planned


@dataclass(frozen=True)
class Row:
    """The tensors that one source line of one module, or of several equal ones, writes in forward.

    Attributes:
        modules: paths of the modules, in the order in which they run.
        source: "file:line".
        ops: indices of the forward ops.
        storages: indices of what they write.
        decisions: the decision for each of `storages`.
        size_bytes: sum over the storages [B].
        time_us: time of the ops, each once [µs].
    """

    modules: tuple[str, ...]
    source: str
    ops: tuple[int, ...]
    storages: tuple[int, ...]
    decisions: tuple[Decision, ...]
    size_bytes: int
    time_us: float


def rows(plan: Planned, *, fold: bool) -> list[Row]:
    """All rows, the largest first; with `fold`, equal modules with equal decisions share one."""
    graph, decided = plan.graph, decisions(plan.timeline, plan.baseline_timeline)
    places: dict[tuple[str, str], list[int]] = {}
    for index, op in enumerate(graph.ops[: graph.forward_count]):
        places.setdefault((op.module, op.source), []).append(index)
    single = [_row(graph, decided, (module,), source, ops) for (module, source), ops in places.items()]
    if fold:
        single = _fold(graph, decided, single)
    return sorted(single, key=lambda row: (-row.size_bytes, row.ops))


def _row(graph: Graph, decided: dict[int, Decision], modules: tuple[str, ...], source: str, ops: Iterable[int]) -> Row:
    ops = tuple(ops)
    storages = tuple(s for i in ops for s in graph.ops[i].writes)
    return Row(
        modules=modules,
        source=source,
        ops=ops,
        storages=storages,
        decisions=tuple(decided[s] for s in storages),
        size_bytes=graph.bytes_of(storages),
        time_us=sum(graph.ops[i].time_us for i in ops),
    )


def _fold(graph: Graph, decided: dict[int, Decision], single: list[Row]) -> list[Row]:
    alike: dict[object, list[Row]] = {}
    for row in single:
        calls = tuple((graph.ops[i].target, graph.ops[i].signature, len(graph.ops[i].writes)) for i in row.ops)
        outcome = tuple((d.action, d.runs, d.cause) for d in row.decisions)
        key = (_template(row.modules[0]), row.source, calls, outcome, row.size_bytes)
        alike.setdefault(key, []).append(row)
    return [
        _row(graph, decided, tuple(r.modules[0] for r in group), group[0].source, (i for r in group for i in r.ops))
        for group in alike.values()
    ]


def _template(module: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in module.split("."))


def module_text(modules: Sequence[str]) -> str:
    """The common form of module paths.

    >>> module_text(["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.5.mlp"])
    'blocks.{0-2,5}.mlp ×4'
    """
    if len(modules) == 1:
        return modules[0] or "(model)"
    columns = zip(*(module.split(".") for module in modules), strict=True)
    parts = []
    for column in columns:
        distinct = list(dict.fromkeys(column))
        parts.append(distinct[0] if len(distinct) == 1 else "{" + _ranges(sorted(map(int, distinct))) + "}")
    return f"{'.'.join(parts)} ×{len(modules)}"


def _ranges(numbers: Sequence[int]) -> str:
    texts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        texts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(texts)


def source_text(source: str) -> str:
    """A source line as people write it: relative to the working directory, or the file's name where it is elsewhere."""
    path, _, line = source.rpartition(":")
    if not path:
        return source or "-"
    if os.path.isabs(path):
        inside = path.startswith(os.getcwd().rstrip(os.sep) + os.sep) and "site-packages" not in path
        path = os.path.relpath(path) if inside else os.path.basename(path)
    return f"{path}:{line}"


def ops_text(graph: Graph, row: Row) -> str:
    """The op of a row that writes most bytes, and how many others there are."""
    kinds: dict[str, int] = {}
    for index in row.ops:
        op = graph.ops[index]
        name = short_target(op.target)
        kinds[name] = kinds.get(name, 0) + graph.bytes_of(op.writes)
    first = max(kinds, key=lambda name: kinds[name])
    return first if len(kinds) == 1 else f"{first} +{len(kinds) - 1}"


def short_target(target: str) -> str:
    """The name of an operator without namespace, overload and what marks it as internal.

    >>> short_target("aten.addmm.default"), short_target("aten.native_layer_norm.default")
    ('addmm', 'layer_norm')
    """
    parts = target.split(".")
    return (parts[1] if len(parts) > 2 else target).removeprefix("native_").strip("_")


def decision_text(row: Row) -> str:
    """The decisions of a row: "keep", "recompute", "keep 3, recompute 2" or "not needed by backward"."""
    counts: dict[Action, int] = {"keep": 0, "recompute": 0, "restore": 0}
    for decision in row.decisions:
        if decision.action != "discard":
            counts[decision.action] += 1
    made = {action: count for action, count in counts.items() if count}
    if not made:
        return "not needed by backward"
    if len(made) == 1:
        return next(iter(made))
    return ", ".join(f"{action} {count}" for action, count in made.items())


def runs_text(row: Row) -> str:
    """How often the ops of a row run: "1", or "1-2" where they differ."""
    runs = {d.runs for d in row.decisions} or {1}
    return str(min(runs)) if len(runs) == 1 else f"{min(runs)}-{max(runs)}"


def reason_text(graph: Graph, row: Row) -> str:
    """Why: the reason behind most of the bytes, with the times and bytes of all tensors that share it.

    That some are only steps in remaking others is said where there is nothing else to say.
    """
    causes: dict[tuple[Cause, str], list[tuple[int, Decision]]] = {}
    for storage, decision in zip(row.storages, row.decisions, strict=True):
        if decision.cause not in ("unread", "step"):
            causes.setdefault((decision.cause, decision.detail), []).append((storage, decision))
    if not causes:
        return reason("step", 0.0, 0) if any(d.cause == "step" for d in row.decisions) else "-"
    (cause, detail), members = max(causes.items(), key=lambda item: graph.bytes_of(storage for storage, _ in item[1]))
    each_op = {graph.producer[storage]: decision for storage, decision in members}
    repeat_us = sum(d.repeat_us for d in each_op.values())
    return reason(cause, repeat_us, sum(d.freed_bytes for d in each_op.values()), detail)

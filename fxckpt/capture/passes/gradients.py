"""Parameters' gradients are handed over so that torch need not copy them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection, value
from fxckpt.upstream import aot
from fxckpt.upstream.ops.exchange import EXCHANGE
from fxckpt.upstream.tensors import storage_key

aten = torch.ops.aten


def own_gradients(graph: fx.Graph) -> None:
    """Copy a parameter's gradient where handing it over would make torch copy it, so that the copy is planned for.

    Torch keeps a gradient without copying only if it has the parameter's layout and nobody else holds it.
    """
    output = graph.output_node()
    returned: Any = output.args[0]
    leaves = list(returned)
    placeholders = {node.meta["desc"]: node for node in graph.nodes if node.op == "placeholder"}
    others = [node for node in graph.nodes if node.target is EXCHANGE]  # whoever has an output's gradient may keep it
    given = {storage_key(value(node)) for node in (*placeholders.values(), *others)}
    readers = _readers_by_storage(graph)
    delivered: set[tuple[int | None, int]] = set()
    for position, (desc, node) in enumerate(zip(output.meta["desc"], leaves, strict=True)):
        if not isinstance(desc, aot.GradAOTOutput) or not isinstance(node, fx.Node):
            continue
        if isinstance(desc.grad_of, aot.PlainAOTInput):
            continue
        parameter, gradient = value(placeholders[desc.grad_of]), value(node)
        key = (storage_key(gradient), gradient.storage_offset())
        shared = key in delivered or storage_key(gradient) in given or readers.get(storage_key(gradient))
        delivered.add(key)
        if shared or (gradient.stride() != parameter.stride() and parameter.is_contiguous()):
            leaves[position] = _copy(node, before=output)
    output.args = (type(returned)(leaves),)


def _copy(gradient: fx.Node, *, before: fx.Node) -> fx.Node:
    contiguous = torch.contiguous_format
    with before.graph.inserting_before(before):
        copy = before.graph.call_function(aten.clone.default, (gradient,), {"memory_format": contiguous})
    noted: dict[str, Any] = {name: gradient.meta[name] for name in ("seq_nr", "custom") if name in gradient.meta}
    form = torch.empty_like(value(gradient), memory_format=contiguous)
    copy.meta = {**noted, "val": form, "partitioner_tag": "is_backward"}
    return copy


def _readers_by_storage(graph: fx.Graph) -> dict[int | None, int]:
    """How many ops read each storage, not counting nodes that only make views of it."""
    counts: dict[int | None, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_selection(node):
            continue
        own = storage_key(value(node))
        for source in {storage_key(value(n)) for n in node.all_input_nodes} - {None, own}:
            counts[source] = counts.get(source, 0) + 1
    return counts

"""Losses as two ops, their terms and the mean or sum of them, which is what their kernels do.

In one, a kernel hands out its scalar in the memory of all terms, which then stays for as long as the loss does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import _reduction

aten = torch.ops.aten

_REDUCTION_PLACES: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
"""Which argument says how terms are reduced."""

_NONE, _MEAN = _reduction.get_enum("none"), _reduction.get_enum("mean")


def reduce_apart(graph: fx.Graph) -> None:
    """Replace each of these losses by its terms and their reduction."""
    for node in list(graph.nodes):
        place = _REDUCTION_PLACES.get(node.target)
        if place is None:
            continue
        arguments = list(node.args) + [None] * (place - len(node.args))
        reduction = arguments[place] if len(arguments) > place else node.kwargs.get("reduction", _MEAN)
        if reduction == _NONE:
            continue
        arguments[place : place + 1] = [_NONE]
        options = {name: value for name, value in node.kwargs.items() if name != "reduction"}
        with graph.inserting_before(node):
            terms = graph.call_function(node.target, tuple(arguments), options, name=f"{node.name}_terms")
        described, given = fx.node.map_arg((terms.args, terms.kwargs), lambda source: source.meta["val"])
        terms.meta = {**node.meta, "val": node.target(*described, **given)}
        node.target = aten.mean.default if reduction == _MEAN else aten.sum.default
        node.args, node.kwargs = (terms,), {}

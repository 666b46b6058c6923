"""Losses don't hold on to the memory of their terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import describe_again
from fxckpt.upstream.operators import MEAN, NO_REDUCTION

aten = torch.ops.aten

_REDUCTION_PLACES: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
"""Losses that keep the memory of all their terms, and which argument says how these are reduced."""


def reduce_losses_apart(graph: fx.Graph) -> None:
    """Losses become two ops, their terms and the mean or sum of them, which is what their kernels do.

    In one, a kernel hands out its scalar in the memory of all terms, which then stays for as long as the loss does.
    """
    for node in list(graph.nodes):
        place = _REDUCTION_PLACES.get(node.target)
        if place is None:
            continue
        arguments = list(node.args) + [None] * (place - len(node.args))
        reduction = arguments[place] if len(arguments) > place else node.kwargs.get("reduction", MEAN)
        if reduction == NO_REDUCTION:
            continue
        arguments[place : place + 1] = [NO_REDUCTION]
        options = {name: value for name, value in node.kwargs.items() if name != "reduction"}
        with graph.inserting_before(node):
            terms = graph.call_function(node.target, tuple(arguments), options, name=f"{node.name}_terms")
        terms.meta = dict(node.meta)
        describe_again([terms])
        node.target = aten.mean.default if reduction == MEAN else aten.sum.default
        node.args, node.kwargs = (terms,), {}

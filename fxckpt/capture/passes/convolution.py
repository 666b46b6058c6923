"""A convolution's gradients are computed apart."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def split_convolution_backward(graph: fx.Graph) -> None:
    """One op for the gradients of weight and bias, another for the input's: kernels compute them apart anyway.

    So each can run when it suits: the weight's gradient needs the saved input, the other the weight alone.
    """
    for node in list(graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        *arguments, (of_input, of_weight, of_bias) = node.args
        if not of_input or not (of_weight or of_bias):
            continue
        halves = []
        for name, mask in ("weight", (False, of_weight, of_bias)), ("input", (True, False, False)):
            with graph.inserting_before(node):
                half = graph.call_function(node.target, (*arguments, list(mask)), name=f"{node.name}_{name}")
            half.meta = dict(node.meta)
            halves.append(half)
        for picked in list(node.users):
            picked.replace_input_with(node, halves[picked.args[1] == 0])
        graph.erase_node(node)

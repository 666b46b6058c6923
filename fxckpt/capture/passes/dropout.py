"""Dropout on CPU rounds as eager's does."""

from __future__ import annotations

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection, value
from fxckpt.upstream.ops.dropout import DROPOUT, DROPOUT_BACKWARD, eager_scale

aten = torch.ops.aten


def exact_dropout(graph: fx.Graph) -> None:
    """Call our own ops instead of torch's, which scale in another precision."""
    scales: dict[fx.Node, float] = {}  # mask -> scale
    for node in list(graph.nodes):
        if node.target is aten.native_dropout.default and node.args[2]:
            x, p, _ = node.args
            if value(x).device.type != "cpu":
                continue
            scale = eager_scale(float(p), value(x).dtype)
            node.target, node.args = DROPOUT, (x, float(p), scale)
            scales |= {user: scale for user in node.users if is_selection(user) and user.args[1] == 1}
        elif node.target is aten.native_dropout_backward.default and node.args[1] in scales:
            node.target, node.args = DROPOUT_BACKWARD, (*node.args[:2], scales[node.args[1]])

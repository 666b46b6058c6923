"""Batch norm's backward reads less than it takes."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def drop_unread_statistics(graph: fx.Graph) -> None:
    """In training it takes the running statistics and does not read them: they need not be kept."""
    for node in graph.nodes:
        in_training = node.target is aten.cudnn_batch_norm_backward.default  # which there is in training only
        if in_training or (node.target is aten.native_batch_norm_backward.default and node.args[7]):
            node.args = (*node.args[:3], None, None, *node.args[5:])

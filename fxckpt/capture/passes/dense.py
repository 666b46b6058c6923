"""Only dense tensors can be planned."""

from __future__ import annotations

import torch
from torch import fx

from fxckpt.capture.nodes import tensors
from fxckpt.capture.provenance import noted_place
from fxckpt.errors import CaptureError


def check_dense(graph: fx.Graph) -> None:
    """Refuse sparse tensors.

    Raises:
        CaptureError: an op makes one.
    """
    for node in graph.nodes:
        if any(tensor.layout is not torch.strided for tensor in tensors(node)):
            raise CaptureError(
                f"{noted_place(node)[1] or node.name} makes a sparse tensor ({node.target}), which can't be planned. "
                "Use dense tensors (sparse=False in an embedding)"
            )

"""Buffers in a private format, which recurrent kernels hand to their backward: how large they are shows in a run only.

Traced, such a buffer is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection, value

_PRIVATE = ("_rnn_layer", "_cudnn_rnn", "_miopen_rnn")


def is_producer(node: fx.Node) -> bool:
    """Whether an op is a recurrent kernel that writes such a buffer."""
    name = str(node.target)
    return any(part in name for part in _PRIVATE) and "backward" not in name


def producer(source: fx.Node) -> fx.Node | None:
    """The recurrent op whose private buffer a node picks, or None for other nodes. Made-up contents crash backward."""
    if not is_selection(source) or value(source).dtype is not torch.uint8:
        return None
    node = source.all_input_nodes[0]
    return node if is_producer(node) else None


def correct_sizes(node: fx.Node, outputs: Any) -> None:
    """Let the traced outputs of a recurrent op have the sizes of real `outputs`."""
    picked = {user.args[1]: user for user in node.users if producer(user) is node}
    corrected = []
    for position, (traced, real) in enumerate(zip(value(node), outputs, strict=True)):
        right = traced
        if isinstance(traced, torch.Tensor) and traced.numel() == 0 < real.numel():
            with traced.fake_mode:  # type: ignore[attr-defined]
                right = traced.new_empty(real.shape, dtype=real.dtype)
            if position in picked:
                picked[position].meta["val"] = right
        corrected.append(right)
    node.meta["val"] = tuple(corrected)

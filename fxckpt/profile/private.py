"""Buffers in a private format, which kernels such as recurrent ones and cuDNN's batch norm hand to their backward: how
large they are shows in a run only.

Traced, such a buffer is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection, value

Sizes = tuple[torch.Size | None, ...]
"""Of each output of an op; None for those that are no tensors."""


def is_producer(node: fx.Node) -> bool:
    """Whether an op is traced to hand out an empty buffer of bytes beside other results."""
    made = value(node)
    return isinstance(made, (tuple, list)) and any(map(_is_empty, made[1:]))


def sizes_of(outputs: Sequence[Any]) -> Sizes:
    """The sizes of an op's real outputs."""
    return tuple(x.shape if isinstance(x, torch.Tensor) else None for x in outputs)


def correct_sizes(node: fx.Node, sizes: Sizes) -> None:
    """Let the empty buffers among the traced results of an op have the sizes of the real ones."""
    picked = {user.args[1]: user for user in node.users if is_selection(user)}
    corrected = []
    for position, (traced, size) in enumerate(zip(value(node), sizes, strict=True)):
        right = traced
        if position and _is_empty(traced) and size is not None and size.numel():
            with traced.fake_mode:
                right = traced.new_empty(size)
            if position in picked:
                picked[position].meta["val"] = right
        corrected.append(right)
    node.meta["val"] = tuple(corrected)


def _is_empty(traced: Any) -> bool:
    return isinstance(traced, torch.Tensor) and traced.dtype is torch.uint8 and traced.numel() == 0

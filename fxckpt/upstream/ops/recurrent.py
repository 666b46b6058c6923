"""Recurrent layers on CPU: their kernel keeps what backward needs only where gradients are enabled.

Emitted graphs run without autograd and with gradients disabled, so an op that enables them stands for the kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from fxckpt.upstream.ops import cudnn_rnn
from fxckpt.upstream.ops.library import LIBRARY

_KERNEL = torch.ops.aten.mkldnn_rnn_layer.default

LIBRARY.define(str(_KERNEL._schema).removeprefix("aten::"), tags=(torch.Tag.pt2_compliant_tag,))


def _layer(*args: Any) -> Any:
    with torch.enable_grad():
        return _KERNEL(*args)


LIBRARY.impl("mkldnn_rnn_layer", _layer, "CompositeExplicitAutograd")

RECURRENT: dict[Any, Any] = {
    _KERNEL: torch.ops.fxckpt.mkldnn_rnn_layer.default,
    cudnn_rnn.KERNEL: cudnn_rnn.CUDNN_RNN,
    cudnn_rnn.KERNEL_BACKWARD: cudnn_rnn.CUDNN_RNN_BACKWARD,
}
"""What to call instead of torch's own op."""

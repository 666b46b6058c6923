"""Batch norm by cuDNN as eager torch calls it, with the change of the running statistics written out.

Torch's op changes its running statistics without saying so. Torch therefore traces another kernel in its place, which
gives other bits. This one hands the new statistics out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fxckpt.upstream.ops.library import LIBRARY

CUDNN_BATCH_NORM = torch.ops.aten.cudnn_batch_norm.default

LIBRARY.define(
    "cudnn_batch_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training,"
    " float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor?, Tensor?)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(
    x: Tensor, weight: Tensor, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor | None, ...]:
    if training:
        mean, var = (None if old is None else old.clone() for old in (mean, var))
    results = CUDNN_BATCH_NORM(x, weight, bias, mean, var, training, momentum, eps)
    return *results, *((mean, var) if training else (None, None))


def _describe(
    x: Tensor, weight: Tensor, _: Any, mean: Any, var: Any, training: bool, *__: Any
) -> tuple[Tensor | None, ...]:
    """How large the fourth result is, which backward reads, shows in a run only."""
    saved = (weight.new_empty(x.shape[1] if training else 0) for _ in range(2))
    new = (torch.empty_like(old) if training and old is not None else None for old in (mean, var))
    result = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return result, *saved, x.new_empty(0, dtype=torch.uint8), *new


LIBRARY.impl("cudnn_batch_norm", _run, "CUDA")
LIBRARY.impl("cudnn_batch_norm", _describe, "Meta")

_BATCH_NORM = torch.ops.fxckpt.cudnn_batch_norm.default


def cudnn_batch_norm(
    x: Tensor, weight: Tensor, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    """What to trace for `aten.cudnn_batch_norm`: it changes the running statistics, as that does."""
    *results, new_mean, new_var = _BATCH_NORM(x, weight, bias, mean, var, training, momentum, eps)
    for old, new in (mean, new_mean), (var, new_var):
        if new is not None:
            old.copy_(new)
    return tuple(results)

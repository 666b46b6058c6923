"""Settings of the process on which the time and the workspace of an op depend, beside its form."""

from __future__ import annotations

from typing import Any

import torch

_BACKENDS: Any = torch.backends  # not all of it is annotated


def settings() -> str:
    """The number of threads, and what is set otherwise than torch begins with.

    >>> torch.set_num_threads(1)
    >>> settings()
    '1 threads'
    """
    said = [f"{torch.get_num_threads()} threads"]
    if tf32_in_products():
        said.append("TF32 products")
    if not tf32_in_convolutions():
        said.append("no TF32 convolutions")
    if torch.are_deterministic_algorithms_enabled():
        said.append("deterministic")
    if torch.backends.cudnn.benchmark:
        said.append("cuDNN benchmark")
    if not torch.backends.cudnn.enabled:
        said.append("no cuDNN")
    return ", ".join(said)


def tf32_in_products() -> bool:
    """Whether matrix products of float32 may be computed in TF32 on CUDA."""
    return _is_tf32(_BACKENDS.cuda.matmul.fp32_precision)


def tf32_in_convolutions() -> bool:
    """Whether convolutions of float32 may be computed in TF32 on CUDA."""
    return _is_tf32(_BACKENDS.cudnn.conv.fp32_precision)


def _is_tf32(precision: str) -> bool:
    return bool((_BACKENDS.fp32_precision if precision == "none" else precision) == "tf32")

"""Global state that changes which ops a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ambient:
    """Global state that changes which ops a model runs.

    Attributes:
        casts: for each kind of device whether autocast is on, and to what type.
        default_dtype: type of new tensors.
        deterministic: whether ops must be deterministic.
        attention: which of torch's attention kernels may run (flash, memory-efficient, math, cuDNN).
        cudnn: whether cuDNN's kernels may run.
    """

    casts: tuple[tuple[str, bool, torch.dtype], ...]
    default_dtype: torch.dtype
    deterministic: bool
    attention: tuple[bool, bool, bool, bool] = (True, True, True, True)
    cudnn: bool = True

    @classmethod
    def now(cls) -> Ambient:
        """The present state."""
        kinds = ("cpu", "cuda")
        casts = tuple([(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds])
        deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(casts, torch.get_default_dtype(), deterministic, _attention(), torch._C._get_cudnn_enabled())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """This state, in which a model ran once, for a while."""
        default_dtype = torch.get_default_dtype()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        attention, cudnn = _attention(), torch._C._get_cudnn_enabled()
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype if enabled else None, enabled))
            try:
                torch.set_default_dtype(self.default_dtype)
                _allow(self.attention, cudnn=self.cudnn)
                torch.use_deterministic_algorithms(self.deterministic, warn_only=warn_only)
                yield
            finally:
                torch.set_default_dtype(default_dtype)
                _allow(attention, cudnn=cudnn)
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _attention() -> tuple[bool, bool, bool, bool]:
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def _allow(kernels: tuple[bool, bool, bool, bool], *, cudnn: bool) -> None:
    torch._C._set_cudnn_enabled(cudnn)
    flash, efficient, math, by_cudnn = kernels
    torch._C._set_sdp_use_flash(flash)
    torch._C._set_sdp_use_mem_efficient(efficient)
    torch._C._set_sdp_use_math(math)
    torch._C._set_sdp_use_cudnn(by_cudnn)

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
    """

    casts: tuple[tuple[str, bool, torch.dtype], ...]
    default_dtype: torch.dtype
    deterministic: bool
    attention: tuple[bool, bool, bool, bool] = (True, True, True, True)

    @classmethod
    def now(cls) -> Ambient:
        """The present state."""
        kinds = ("cpu", "cuda")
        casts = tuple([(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds])
        return cls(casts, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), _attention())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """This state, in which a model ran once, for a while."""
        default_dtype = torch.get_default_dtype()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        attention = _attention()
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype if enabled else None, enabled))
            try:
                torch.set_default_dtype(self.default_dtype)
                _allow(self.attention)
                torch.use_deterministic_algorithms(self.deterministic, warn_only=warn_only)
                yield
            finally:
                torch.set_default_dtype(default_dtype)
                _allow(attention)
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _attention() -> tuple[bool, bool, bool, bool]:
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def _allow(kernels: tuple[bool, bool, bool, bool]) -> None:
    flash, efficient, math, cudnn = kernels
    torch._C._set_sdp_use_flash(flash)
    torch._C._set_sdp_use_mem_efficient(efficient)
    torch._C._set_sdp_use_math(math)
    torch._C._set_sdp_use_cudnn(cudnn)

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
    """

    casts: tuple[tuple[str, bool, torch.dtype], ...]
    default_dtype: torch.dtype
    deterministic: bool

    @classmethod
    def now(cls) -> Ambient:
        """The present state."""
        kinds = ("cpu", "cuda")
        casts = tuple([(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds])
        return cls(casts, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """This state, in which a model ran once, for a while."""
        default_dtype = torch.get_default_dtype()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype if enabled else None, enabled))
            try:
                torch.set_default_dtype(self.default_dtype)
                torch.use_deterministic_algorithms(self.deterministic, warn_only=warn_only)
                yield
            finally:
                torch.set_default_dtype(default_dtype)
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

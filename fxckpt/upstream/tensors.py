"""What a tensor is made of: the memory behind it, its version, flags, and copies that keep all of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxckpt.units import block_bytes_on, whole_blocks


def storage_key(value: Any) -> int | None:
    """A number that is the same for tensors, traced or real, which share memory; None for other values."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def occupied_bytes(tensor: torch.Tensor, block_bytes: int = 1) -> int:
    """The memory behind a tensor: on CUDA whole blocks, elsewhere blocks of `block_bytes` [B]."""
    size_bytes = tensor.untyped_storage().nbytes()
    return whole_blocks(size_bytes, block_bytes_on(tensor.device.type, block_bytes))


def memory_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The memory behind tensors, what several share counted once [B]."""
    return sum({storage_key(t): occupied_bytes(t) for t in tensors}.values())


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Where the first of the tensors is; the CPU if there is none."""
    return next((t.device for t in tensors), torch.device("cpu"))


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor, or another in the same memory, was changed in place."""
    return tensor._version


def copy_all(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy values into tensors of the same shapes, which share no memory with each other, by one call."""
    torch._foreach_copy_(list(into), list(values))


def versions_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """`version_of` each tensor."""
    return [tensor._version for tensor in tensors]


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows the tensor as a view of another."""
    return tensor._base is not None


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the layout of the originals, which share memory where the originals do."""
    storages: dict[int | None, torch.UntypedStorage] = {}
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in storages:
            storages[key] = tensor.untyped_storage().clone()
        if id(tensor) not in made:
            form = tensor.storage_offset(), tensor.size(), tensor.stride()
            twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storages[key], *form)
            made[id(tensor)] = _flagged_as(tensor, twin).requires_grad_(tensor.requires_grad)
    return [made[id(tensor)] for tensor in tensors]


def _flagged_as(tensor: torch.Tensor, twin: torch.Tensor) -> torch.Tensor:
    """The twin, lazily conjugated or negated if the tensor is."""
    twin = twin.conj() if tensor.is_conj() else twin
    return torch._neg_view(twin) if tensor.is_neg() else twin


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of other tensors, as distributed, nested and quantized ones are."""
    return is_traceable_wrapper_subclass(tensor)

"""How the memory of the device that a step is planned for is handed out, and what libraries keep of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxckpt.capture.nodes import device as device_of_node
from fxckpt.core.caching_allocator import AllocatorSettings
from fxckpt.profile.costs import device_profile
from fxckpt.profile.devices import DeviceProfile
from fxckpt.upstream.allocator import caching_allocator_settings
from fxckpt.upstream.blas import blas_workspace_bytes

_THREADS = 2  # forward runs in the caller's, backward in one of the device's own


def block_bytes(device: torch.device, wanted: str | DeviceProfile | None) -> int:
    """Sizes on the device are multiples of this, beside those of tensors on CUDA, which are whole blocks anyway [B].

    Args:
        device: where the model is. If that is the meta device, the one that was named counts.
        wanted: the device that times are estimated for, if one was named.

    Raises:
        BudgetError: there is no profile of this name.
    """
    return device_profile(device, wanted).allocation_bytes if device.type == "meta" and wanted is not None else 1


def library_bytes(nodes: Iterable[fx.Node], device: torch.device, wanted: str | DeviceProfile | None) -> int:
    """What libraries keep for good once these ops have run on the device: cuBLAS's workspaces [B].

    Arguments are those of `block_bytes`.
    """
    ops = {str(node.target) for node in nodes if device.type == "meta" or device_of_node(node).type == "cuda"}
    if device.type == "cuda":
        with torch.cuda.device(device):
            return blas_workspace_bytes(ops, threads=_THREADS)
    if block_bytes(device, wanted) == 1:
        return 0
    return blas_workspace_bytes(ops, threads=_THREADS, chosen_bytes=device_profile(device, wanted).blas_bytes)


def allocator_settings(device: torch.device, wanted: str | DeviceProfile | None) -> AllocatorSettings | None:
    """How torch's caching allocator is set there, as it is by default for plans made elsewhere; None if it serves not.

    Arguments are those of `block_bytes`.
    """
    if device.type != "cuda":
        return None if block_bytes(device, wanted) == 1 else AllocatorSettings()
    found = caching_allocator_settings(device)
    if found is None:
        return None
    most_bytes, divisions = found["max_split_size"], found["roundup_power2_divisions"]
    return AllocatorSettings(
        expandable_segments=found["expandable_segments"],
        large_segment_bytes=found["large_segment_size"],
        max_split_bytes=most_bytes if most_bytes > 0 else None,
        divisions=tuple(divisions[key] for key in sorted(divisions, key=int)),
    )


def give_back_free_blocks(device: torch.device) -> None:
    """Let the caching allocator keep none of the memory that measuring took: steps are to find what plans expect."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()

"""Memory that torch gives cuBLAS to work in: allocated when a thread first calls it, and kept for good.

After `aten/src/ATen/cuda/CublasHandlePool.cpp` (torch 2.11 to 2.15). There is a workspace for each thread and stream.
Matrix products with a bias run in cuBLASLt; up to torch 2.12 that has a workspace of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch

from fxckpt.units import CUDA_BLOCK_BYTES, whole_blocks

_OPS = frozenset(("addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv", "vdot", "_scaled_mm"))
_LT_OPS = frozenset(("addmm", "_scaled_mm"))
_KIB, _MIB = 2**10, 2**20
_LARGE, _SMALL = 32 * _MIB, 8 * _MIB + 128 * _KIB
_HOPPER = 9
"""Major compute capability. On others workspaces are small, in versions of torch that don't say how large they are."""

_ASKS = hasattr(torch.backends.cuda, "cublas_workspace_size")
"""Whether torch says how large they are. Since then cuBLASLt works in the same."""


def blas_workspace_bytes(ops: Iterable[str], *, threads: int, chosen_bytes: int | None = None) -> int:
    """What cuBLAS keeps once these operators have run on a CUDA device [B].

    Args:
        ops: names of operators, such as "aten::mm" or "aten.mm.default".
        threads: how many threads run them. Forward runs in the caller's, backward in one of the device's own.
        chosen_bytes: size of a workspace; None: as it is on the present CUDA device [B].
    """
    packets = {name.replace("::", ".").removeprefix("aten.").split(".")[0] for name in ops}
    if packets.isdisjoint(_OPS):
        return 0
    sizes_bytes = [_chosen_bytes() if chosen_bytes is None else chosen_bytes]
    if not _ASKS and not packets.isdisjoint(_LT_OPS):
        lt_bytes = int(os.environ.get("CUBLASLT_WORKSPACE_SIZE", _KIB)) * _KIB
        sizes_bytes.append(min(lt_bytes, *sizes_bytes))
    return threads * sum(whole_blocks(size_bytes, CUDA_BLOCK_BYTES) for size_bytes in sizes_bytes)


def _chosen_bytes() -> int:
    """The workspace of a thread on the present device, as the user has set it or as torch chooses [B]."""
    if _ASKS:
        return torch.backends.cuda.cublas_workspace_size()
    asked = re.findall(r":([0-9]+):([0-9]+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        return sum(int(size) * _KIB * int(count) for size, count in asked)
    return _LARGE if torch.cuda.get_device_capability()[0] == _HOPPER else _SMALL

"""Models that no plan can serve as they are: refused before anything is traced, with what to do."""

from __future__ import annotations

import sys

from torch import nn

from fxckpt.errors import CaptureError


def check_plannable(model: nn.Module) -> None:
    """Refuse wrappers whose forward works outside of any graph.

    Raises:
        CaptureError: the model is such a wrapper, or has one inside.
    """
    for path, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            where = f"its submodule {path!r} is" if path else "it is"
            raise CaptureError(
                f"the model can't be planned: {where} wrapped in {wrapper}, which does its work around forward, at "
                "each call, where a plan would leave it out. Optimize first and wrap then: "
                f"{wrapper}(fxckpt.optimize(model, ...)), with the model itself inside"
            )


def _wrapper(module: nn.Module) -> str | None:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel"
    if isinstance(module, nn.DataParallel):
        return "DataParallel"
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return "FullyShardedDataParallel" if sharded is not None and isinstance(module, sharded) else None

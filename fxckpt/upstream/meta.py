"""Models on the meta device, traced as if their tensors were on the device that they are planned for.

On the meta device torch has no fused attention, and some models take other paths. As fake tensors of a device the same
parameters cost nothing either, and the graph is that of a model on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import stateless

from fxckpt.upstream.absent_gpu import traced_for
from fxckpt.upstream.fakes import FakeTensorMode


@contextlib.contextmanager
def made_present(
    module: nn.Module, tensors: Sequence[torch.Tensor], capability: tuple[int, int] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Give a module on the meta device fake parameters and buffers elsewhere; yields fake inputs to go with them.

    They are on the CPU, or on a GPU of this compute capability; if one is named, then those of a module on the CPU are
    on it, too. Other modules and inputs on real devices are left alone.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    given = (*tensors, *(t for _, t in named))
    kinds = {t.device.type for t in given}
    if "meta" not in kinds and (capability is None or "cpu" not in kinds or "cuda" in kinds):
        yield list(tensors)
        return
    device = torch.device("cuda:0" if capability else "cpu")
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode, torch.no_grad():
                form = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = form.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    with (
        traced_for(device, capability) if capability else contextlib.nullcontext(),
        stateless._reparametrize_module(module, {name: fake(tensor) for name, tensor in named}),
    ):
        yield [fake(tensor) for tensor in tensors]

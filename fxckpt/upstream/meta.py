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
from fxckpt.upstream.fakes import FakeTensor, FakeTensorMode
from fxckpt.upstream.gpu_choices import capability_of


@contextlib.contextmanager
def made_present(
    module: nn.Module, tensors: Sequence[torch.Tensor], gpu: str | None = None
) -> Iterator[list[torch.Tensor]]:
    """Give a module on the meta device fake parameters and buffers elsewhere; yields fake inputs to go with them.

    They are on the CPU, or on the GPU of the name `gpu`; if one is named, then what is on the CPU is said to be on it,
    too. Other modules and inputs on real devices are left alone.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    given = (*tensors, *(t for _, t in named))
    if not any(t.device.type in ("meta", "cpu" if gpu else "meta") for t in given) or _is_traced(given):
        yield list(tensors)
        return
    device = torch.device("cuda:0" if gpu else "cpu")
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode, torch.no_grad():
                form = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = form.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    with (
        traced_for(device, capability_of(gpu)) if gpu else contextlib.nullcontext(),
        stateless._reparametrize_module(module, {name: fake(tensor) for name, tensor in named}),
    ):
        yield [fake(tensor) for tensor in tensors]


def _is_traced(given: Sequence[torch.Tensor]) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in given)

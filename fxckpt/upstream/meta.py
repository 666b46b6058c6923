"""Models on the meta device, traced as if their tensors were on the CPU.

On the meta device torch has no fused attention, and some models take other paths. As fake tensors of the CPU the same
parameters cost nothing either, and the graph is that of a model on a real device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import stateless

from fxckpt.upstream.fakes import FakeTensorMode


@contextlib.contextmanager
def made_present(
    module: nn.Module, tensors: Sequence[torch.Tensor], device: torch.device = torch.device("cpu")
) -> Iterator[list[torch.Tensor]]:
    """Give a module on the meta device fake parameters and buffers on the CPU; yields fake inputs to go with them.

    Modules and inputs on real devices are left alone.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if not any(t.device.type == "meta" for t in (*tensors, *(t for _, t in named))):
        yield list(tensors)
        return
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode, torch.no_grad():
                form = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                made[id(tensor)] = form.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    with stateless._reparametrize_module(module, {name: fake(tensor) for name, tensor in named}):
        yield [fake(tensor) for tensor in tensors]

"""A graph as Inductor lowers it: of ops that it takes apart, and rewritten by the patterns that it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import _recursive_joint_graph_passes
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["decompositions", "fake_mode_of", "rewrite_patterns"]


def decompositions() -> Mapping[OpOverload, Callable[..., Any]]:
    """What ops are taken apart into while a step is traced."""
    return select_decomp_table()


def rewrite_patterns(module: fx.GraphModule, device: torch.device) -> None:
    """Rewrite a joint graph in place by Inductor's patterns: attention, constants, random numbers from seeds.

    Seeds are drawn once, and numbers are made from them wherever they are read: nothing random is left to repeat.
    """
    mode = fake_mode_of(module)
    with mode, V.set_fake_mode(mode), torch.no_grad():
        rewritten = _recursive_joint_graph_passes(module, input_device=device)
    if rewritten is not module:
        module.graph = rewritten.graph


def fake_mode_of(module: fx.GraphModule) -> FakeTensorMode:
    """The mode in which the values of a graph were made."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()

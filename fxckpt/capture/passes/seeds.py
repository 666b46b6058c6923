"""Seeds of attention's dropout are where the kernel leaves them."""

from __future__ import annotations

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection, value
from fxckpt.upstream.operators import ATTENTION_WITH_SEED_ON_CPU


def seeds_on_cpu(graph: fx.Graph) -> None:
    """On CUDA, memory-efficient attention hands out seed and offset on the CPU, from where its backward reads them.

    Torch describes them as on the GPU.
    """
    for node in graph.nodes:
        if node.target is not ATTENTION_WITH_SEED_ON_CPU:
            continue
        *results, seed, offset = value(node)
        with seed.fake_mode:
            seed, offset = (torch.empty_like(x, device="cpu") for x in (seed, offset))
        node.meta["val"] = (*results, seed, offset)
        for user in node.users:
            if is_selection(user):
                user.meta["val"] = value(node)[user.args[1]]

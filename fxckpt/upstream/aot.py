"""AOTAutograd: the export of a step's joint graph, and what torch tells of it."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch._aot_autograd.functional_utils import gen_alias_from_base


def replayed_view(base: torch.Tensor, alias: Any, example: torch.Tensor | None) -> torch.Tensor:
    """A view of `base` as an output's `alias` describes it; `example` is a traced tensor of the view's form."""
    return gen_alias_from_base(base, example, alias.requires_grad, alias.view_meta_sequence, replay_views=True)  # type: ignore[arg-type]

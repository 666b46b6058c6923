"""Outputs of a step from which other outputs are computed, as logits are from features.

One node of autograd's computes both, so it knows no way from one to the other: what would need it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from fxckpt.errors import RuntimeContractError
from fxckpt.upstream.dispatch import asked_gradients_of, will_run
from fxckpt.upstream.hooks import gradient_hooks_of

Leading = Sequence[weakref.ref[torch.Tensor]]
"""The outputs of a step from which others are computed."""

_REMEDY = (
    "Compute the other output outside of the model, register a hook inside of it, or use fxckpt.plain(model) for this"
)


def refuse_ways_between(outputs: Sequence[torch.Tensor], leading_on: Leading, first_stage: Any) -> None:
    """A backward that starts from an output raises an error if it wants gradients with respect to one that leads on.

    Args:
        outputs: those of the step.
        leading_on: which of them others are computed from.
        first_stage: the node of autograd's behind the one that computes the outputs.
    """
    if not leading_on:
        return
    asked = _AskedForOutputs(leading_on, first_stage)
    for output in outputs:
        if output.requires_grad:
            output.register_hook(asked)


def check_no_hooks(leading_on: Leading) -> None:
    """Raise an error if a hook, or `retain_grad`, waits for the gradient of an output that leads on.

    Raises:
        RuntimeContractError: one does.
    """
    for reference in leading_on:
        output = reference()
        if output is not None and (_has_users_hook(output) or output.retains_grad):
            raise RuntimeContractError(
                "an output that another output is computed from has a hook, or retains its gradient, but only the part "
                f"of its gradient that does not come from the other would arrive there. {_REMEDY}"
            )


class _AskedForOutputs:
    """A hook on outputs that looks what gradients are wanted of."""

    __torch_unserializable__ = True  # whoever saves the output need not be warned of it

    def __init__(self, leading_on: Leading, first_stage: Any) -> None:
        self._leading_on, self._first_stage = leading_on, first_stage

    def __call__(self, _: torch.Tensor) -> None:
        wanted = asked_gradients_of()
        leading = [output for reference in self._leading_on if (output := reference()) is not None]
        if not will_run(self._first_stage) or any(_is_among(output, wanted) for output in leading):
            raise RuntimeContractError(
                "the gradient with respect to an output is wanted, and another output is computed from it, but they "
                f"come from one planned step, in which there is no way between them. {_REMEDY}"
            )


def _is_among(output: torch.Tensor, wanted: Sequence[Any]) -> bool:
    edge = get_gradient_edge(output)
    return any(x is output if isinstance(x, torch.Tensor) else x == edge for x in wanted)


def _has_users_hook(output: torch.Tensor) -> bool:
    return any(not isinstance(hook, _AskedForOutputs) for hook in (gradient_hooks_of(output) or {}).values())

"""Where the two halves of a convolution's backward run one after the other they are one call, as in eager.

The halves are ops of their own, so that each can run when it suits (`capture/passes/convolution`). A call takes the CPU
as long to launch for both as for one. The second half's result is then there a step early: only where that stays
within the peak.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from fxckpt.core.simulate import Timeline
from fxckpt.profile.build import Profile
from fxckpt.rewrite.emitted import Emitted

_BACKWARD = torch.ops.aten.convolution_backward.default
_OWN = "fxckpt_own_mask"
"""In the meta of a call for both halves: which gradients its own half has."""

Mask = list[bool]


def results_of(both: Any, *_: Any) -> Any:
    """The second half, whose results are among those of the call for both: called with what it would be called with."""
    return both


def call_together(profile: Profile, timeline: Timeline, emitted: Emitted) -> None:
    """Change the backward graph: halves whose steps follow each other become one call, where the first stands."""
    steps = [node for node in emitted.backward.nodes if "fxckpt_step" in node.meta]
    for first, second in itertools.pairwise(steps):
        if _are_halves(first, second) and _fits(profile, timeline, second.meta["fxckpt_step"]):
            first.meta[_OWN] = first.args[-1]
            first.args = (*first.args[:-1], _both(first.args[-1], second.args[-1]))
            second.target, second.args = results_of, (first, *second.args)


def _are_halves(first: fx.Node, second: fx.Node) -> bool:
    called = first.target is _BACKWARD and second.target is _BACKWARD and _OWN not in first.meta
    if not called or first.args[:-1] != second.args[:-1]:
        return False
    return not any(a and b for a, b in zip(_mask(first.args[-1]), _mask(second.args[-1]), strict=True))


def _fits(profile: Profile, timeline: Timeline, step: int) -> bool:
    """Whether the result of the second half, at `step`, may be there a step early.

    The kernels of the halves run one after the other, so that one's workspace is free again for the other.
    """
    first, second = (profile.graph.ops[index] for index in timeline.schedule.order[step - 1 : step + 1])
    early_bytes = sum(profile.graph.storages[storage].size_bytes for storage in second.writes)
    early_bytes += max(0, second.workspace_bytes - first.workspace_bytes)
    return bool(timeline.live_bytes[step - 1] + early_bytes <= timeline.peak_bytes)


def _mask(value: Any) -> Mask:
    return list(value)


def _both(one: Any, other: Any) -> Mask:
    return [a or b for a, b in zip(_mask(one), _mask(other), strict=True)]


def apart(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """What a node of the graph stands for, as captured: target and positional arguments.

    A call for both halves stands for its own half if what it computes beside it is used by the second half alone.
    """
    if node.target is results_of:
        return _BACKWARD, node.args[1:]
    own = node.meta.get(_OWN)
    if own is None:
        return node.target, node.args
    others = [user.args[-1] for user in node.users if user.target is results_of]
    if len(others) == 1 and _both(own, others[0]) == _mask(node.args[-1]):
        return node.target, (*node.args[:-1], own)
    return node.target, node.args

"""Where an elementwise op may write its result over an input that nobody reads any more.

That spares an allocation, and fresh memory is slow to touch: eager torch does the same with ReLU and with sums of
gradients. The step of highest peak allocates as simulated, so that the predicted peak is the real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import fills, is_exchange
from fxckpt.core.graph import RESIDENT
from fxckpt.core.lifetimes import Lifetime
from fxckpt.core.simulate import Timeline
from fxckpt.profile.build import Profile
from fxckpt.rewrite.emitted import Emitted
from fxckpt.upstream.operators import OpOverload

aten = torch.ops.aten

OVERWRITING: dict[OpOverload, tuple[OpOverload, str | None]] = {
    aten.relu.default: (aten.relu_.default, None),
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
}
"""Elementwise ops, the overload that writes over an input, and the argument that names this input (None: the first)."""

_PLAIN = {overwriting: (plain, argument) for plain, (overwriting, argument) in OVERWRITING.items()}


def write_over_inputs(profile: Profile, timeline: Timeline, emitted: Emitted) -> None:
    """Change emitted graphs: let each step that may write over an input do so."""
    chosen = overwritten(profile, timeline)
    for node in (*emitted.forward.nodes, *emitted.backward.nodes):
        source = chosen.get(node.meta.get("fxckpt_step", -1))
        if source is None:
            continue
        value = next(x for x in node.args if isinstance(x, fx.Node) and x.meta.get("fxckpt_node") is source)
        node.target, written = _overwriting(node, value)
        node.kwargs = {**node.kwargs, **written}


def overwritten(profile: Profile, timeline: Timeline) -> dict[int, fx.Node]:
    """For each step that may write over an input: the captured node whose value it writes over.

    Such a value is read for the last time, fills its storage, has the result's form, and was allocated in the same
    half of the step: what forward saved must outlive a backward whose graph is retained. No other input of the op is a
    view of it, since that may have its elements in another order.
    """
    graph, schedule = profile.graph, timeline.schedule
    split = schedule.forward_steps
    last = {(life.storage, life.dies): life for life in timeline.lifetimes}
    kept = {*graph.outputs, *graph.updates, *graph.gradients, *graph.replayed, *_exchanged(profile)}
    found: dict[int, fx.Node] = {}
    for step, index in enumerate(schedule.order):
        part = profile.parts[index]
        if len(part) != 1 or timeline.live_bytes[step] == timeline.peak_bytes:
            continue
        (node,) = part
        if node.target not in OVERWRITING:
            continue
        for source in _candidates(node):
            storage = profile.map.behind.get(source)
            life = last.get((storage, step)) if storage is not None and storage not in kept else None
            viewed = any(profile.map.behind.get(n) == storage for n in node.all_input_nodes if n is not source)
            if life and not viewed and _is_own(profile, life, step, split) and fills(source, node):
                found[step] = source
                break
    return found


def _exchanged(profile: Profile) -> set[int]:
    """Storages of gradients that are handed over, of which somebody may keep any."""
    nodes = [node for node in profile.nodes if is_exchange(node)]
    return {storage for node in nodes for storage in (*profile.map.reads(node), *profile.map.writes[node])}


def _candidates(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write over: its tensor arguments, or the first alone."""
    _, argument = OVERWRITING[node.target]  # type: ignore[index]
    return [a for a in node.args if isinstance(a, fx.Node)][: None if argument else 1]


def _is_own(profile: Profile, life: Lifetime, step: int, split: int) -> bool:
    kind = profile.graph.storages[life.storage].kind
    return kind not in RESIDENT and kind != "tangent" and life.born < step and (life.born < split) == (step < split)


def _overwriting(node: fx.Node, value: fx.Node) -> tuple[OpOverload, dict[str, fx.Node]]:
    """What to call instead of a node so that it writes over `value`: the overload, and its last argument."""
    target, argument = OVERWRITING[node.target]  # type: ignore[index]
    if argument is None:
        assert node.args[0] is value
        return target, {}
    return target, {argument: value}


def plain_call(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The captured form of an emitted call: target, keyword arguments, and the value written over.

    The last is None if the call allocates its result, and `...` if it writes over its first argument.
    """
    if target not in _PLAIN:
        return target, kwargs, None
    plain, argument = _PLAIN[target]
    if argument is None:
        return plain, kwargs, ...
    return plain, {name: value for name, value in kwargs.items() if name != argument}, kwargs[argument]

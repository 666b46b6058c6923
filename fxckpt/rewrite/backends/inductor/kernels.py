"""The segments of a step compiled: each distinct one once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from fxckpt.core.simulate import Timeline
from fxckpt.profile.build import Profile
from fxckpt.rewrite.backends.inductor.segments import Segment, body
from fxckpt.upstream import pytree
from fxckpt.upstream.inductor.compiled import Compiled, compile_graph
from fxckpt.upstream.inductor.fusion import RoomForFusion

Call = Callable[[list[Any]], Sequence[Any]]

_COMPILED: dict[str, Compiled] = {}
"""What was compiled in this process, by what it depends on."""


class Kernels:
    """Compiles the segments of a step.

    Args:
        profile: the captured step.
        timeline: the schedule that the segments are of; None for one that nothing is known of.
        limit_bytes: what the step may take where kernels span several steps of the schedule [B].
    """

    def __init__(self, profile: Profile, timeline: Timeline | None, limit_bytes: int) -> None:
        self._profile, self._timeline, self._limit_bytes = profile, timeline, limit_bytes
        graph = profile.graph
        self._leaving = {*graph.outputs, *graph.updates, *graph.gradients}

    def compiled(self, segments: Sequence[Segment]) -> Iterator[tuple[Call, tuple[int, ...]]]:
        """For each segment what runs it, and which of its inputs, by place, it may write over."""
        bodies = [body(segment, self._profile.joint.module) for segment in segments]
        donated = [self._donated(segment, segments[place + 1 :]) for place, segment in enumerate(segments)]
        rooms = [self._room(module) for module in bodies]
        forms = [
            _form(module, given) if segment.compiled else ""
            for segment, module, given in zip(segments, bodies, donated, strict=True)
        ]
        narrowest: dict[str, RoomForFusion] = {}
        for form, room in zip(forms, rooms, strict=True):
            least = narrowest.get(form, room).free_bytes
            narrowest[form] = RoomForFusion(tuple(map(min, least, room.free_bytes)) if form else ())
        todo = {form for form in forms if form and _key(form, narrowest[form]) not in _COMPILED}
        with tqdm(total=len(todo), desc="compiling", unit="segment", disable=None, leave=False) as bar:
            for segment, module, given, form in zip(segments, bodies, donated, forms, strict=True):
                if not segment.compiled:
                    yield _op_by_op(module), ()
                    continue
                key = _key(form, narrowest[form])
                if key not in _COMPILED:
                    _COMPILED[key] = compile_graph(module, given, narrowest[form])
                    bar.update()
                yield _COMPILED[key].call, given

    def _room(self, module: fx.GraphModule) -> RoomForFusion:
        """How much each step of a segment may take beyond the plan; its steps are counted from its first one on."""
        steps = sorted({node.meta["step"] for node in module.graph.nodes if "step" in node.meta})
        if not steps:
            return RoomForFusion(())
        first = steps[0]
        for node in module.graph.nodes:
            if "step" in node.meta:
                node.meta["step"] -= first
        if self._timeline is None:
            return RoomForFusion((0,) * (steps[-1] - first + 1))
        live = self._timeline.live_bytes[first : steps[-1] + 1]
        return RoomForFusion(tuple(int(self._limit_bytes - taken) for taken in live))

    def _donated(self, segment: Segment, later: Sequence[Segment]) -> tuple[int, ...]:
        """Inputs that die in a segment, are the step's own, and are alone in their memory."""
        if not segment.compiled:
            return ()
        alive = [self._storage(node) for node in segment.inputs]
        after = {self._storage(node) for other in later for node in other.inputs}
        return tuple(
            place
            for place, node in enumerate(segment.inputs)
            if node in segment.dying and self._is_own(alive[place], alive) and alive[place] not in after
        )

    def _is_own(self, storage: int | None, alive: list[int | None]) -> bool:
        if storage is None or storage in self._leaving or alive.count(storage) > 1:
            return False
        return self._profile.graph.storages[storage].kind in ("activation", "backward")

    def _storage(self, node: fx.Node) -> int | None:
        return self._profile.map.behind.get(node.meta.get("fxckpt_node"))  # type: ignore[arg-type]


def _op_by_op(module: fx.GraphModule) -> Call:
    def call(boxed: list[Any]) -> Any:
        arguments = tuple(boxed)
        boxed.clear()
        return module.forward(*arguments)

    return call


def _key(form: str, room: RoomForFusion) -> str:
    return f"{form}\n{room}"


def _form(module: fx.GraphModule, donated: tuple[int, ...]) -> str:
    """What a compiled segment depends on: code, form of each value, what is in memory and what may be written over."""
    lines = [module.code, str(donated)]
    for node in module.graph.nodes:
        values = pytree.tree_leaves(node.meta.get("val"))
        forms = [(x.shape, x.stride(), x.dtype, x.device) for x in values if isinstance(x, torch.Tensor)]
        lines.append(f"{node.name} {node.meta.get('step')} {forms}")
    return "\n".join(lines)

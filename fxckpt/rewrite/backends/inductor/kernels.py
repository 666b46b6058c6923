"""The segments of a step compiled: each distinct one once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from fxckpt.core.graph import RESIDENT
from fxckpt.core.simulate import Timeline
from fxckpt.errors import CompilationError
from fxckpt.profile.build import Profile
from fxckpt.profile.fused import exchanged
from fxckpt.rewrite.backends.inductor.allocations import most_bytes
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
        timeline: the schedule that the segments are of, whose peak they may take where kernels span several steps of
            it; None for one that nothing is known of.
    """

    def __init__(self, profile: Profile, timeline: Timeline | None) -> None:
        self._profile, self._timeline = profile, timeline
        graph = profile.graph
        self.peak_bytes = timeline.peak_bytes if timeline else 0
        self._alive: dict[int | str, int] = {}  # bytes of what is in use between segments
        self._leaving: set[int | str] = {*graph.outputs, *graph.updates, *graph.gradients}
        self._exchanged = exchanged(profile.map)

    def compiled(self, segments: Sequence[Segment]) -> Iterator[tuple[Call, tuple[int, ...]]]:
        """For each segment what runs it, and which of its inputs, by place, it may write over."""
        bodies = [body(segment, self._profile.joint.module) for segment in segments]
        last = {self._storage(node): place for place, segment in enumerate(segments) for node in segment.inputs}
        donated = [self._donated(segment, place, last) for place, segment in enumerate(segments)]
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
                    self._note(segment, module)
                    yield _op_by_op(module), ()
                    continue
                key = _key(form, narrowest[form])
                if key not in _COMPILED:
                    _COMPILED[key] = self._compile(segment, module, given, narrowest[form])
                    bar.update()
                self._note(segment, module, _COMPILED[key].source)
                yield _COMPILED[key].call, given

    def _compile(
        self, segment: Segment, module: fx.GraphModule, donated: tuple[int, ...], room: RoomForFusion
    ) -> Compiled:
        """A segment compiled.

        Raises:
            CompilationError: Inductor fails.
        """
        try:
            return compile_graph(module, donated, room)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CompilationError(
                f"Inductor could not compile the ops from {segment.nodes[0].name} to {segment.nodes[-1].name}: "
                f'{reason}. Use backend="python", or see whether torch.compile compiles the model'
            ) from error

    def take(self, graph: fx.Graph) -> None:
        """An emitted graph begins: what it is given is in use, and what forward handed to the caller."""
        self._alive = {memory: size for memory, size in self._alive.items() if memory in self._profile.graph.outputs}
        for node in graph.find_nodes(op="placeholder"):
            self._alive.setdefault(self._memory(node), self._own_bytes(node))

    def _note(self, segment: Segment, module: fx.GraphModule, source: str = "") -> None:
        """A segment runs; note what it takes at most, with all that is in use meanwhile.

        Args:
            segment: what runs.
            module: its body.
            source: the code, if it is compiled.
        """
        graph = self._profile.graph
        if source:
            freed = [self._freed_bytes(segment, node) for node in segment.inputs]
            present = graph.static_bytes + sum(self._alive.values())
            self.peak_bytes = max(
                self.peak_bytes, present + most_bytes(source, freed, module, self._workspaces_bytes(segment))
            )
        leave = {*graph.gradients} if segment.delivers and graph.gradients_allocated else set()
        for node in segment.dying:
            memory = self._memory(node)
            if memory not in self._leaving or memory in leave:
                self._alive.pop(memory, None)
        for output in segment.outputs:
            if output is not None and not segment.delivers:
                self._alive[self._memory(output)] = self._own_bytes(output)

    def _workspaces_bytes(self, segment: Segment) -> dict[str, int]:
        """What the ops of a segment take while they run, the most of each kind, by the name of the op [B]."""
        found: dict[str, int] = {}
        for node in segment.nodes:
            step = node.meta.get("fxckpt_step")
            if step is not None and self._timeline is not None:
                op = self._profile.graph.ops[self._timeline.schedule.order[step]]
                name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
                found[name] = max(found.get(name, 0), op.workspace_bytes)
        return found

    def _freed_bytes(self, segment: Segment, node: fx.Node) -> int:
        """What is freed when compiled code lets go of an input [B]."""
        is_freed = node in segment.dying and self._memory(node) not in self._leaving
        return self._own_bytes(node) if is_freed else 0

    def _own_bytes(self, node: fx.Node) -> int:
        """What a value takes beside what is there during the whole step [B]."""
        storage, value = self._storage(node), node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return 0
        is_given = storage is not None and self._profile.graph.storages[storage].kind in RESIDENT
        return 0 if is_given else value.untyped_storage().nbytes()

    def _memory(self, node: fx.Node) -> int | str:
        """What values that are in the same memory have in common: their storage, or the name of a value without one."""
        storage = self._storage(node)
        return node.name if storage is None else storage

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
        return RoomForFusion(tuple(int(self._timeline.peak_bytes - taken) for taken in live))

    def _donated(self, segment: Segment, number: int, last: Mapping[int | None, int]) -> tuple[int, ...]:
        """Inputs that die in a segment, are the step's own, and are alone in their memory.

        Args:
            segment: what runs.
            number: its place among the segments.
            last: for each storage that is an input the last segment which reads it.
        """
        if not segment.compiled:
            return ()
        alive = [self._storage(node) for node in segment.inputs]
        return tuple(
            place
            for place, node in enumerate(segment.inputs)
            if node in segment.dying and self._is_own(alive[place], alive) and last[alive[place]] == number
        )

    def _is_own(self, storage: int | None, alive: list[int | None]) -> bool:
        if storage is None or storage in self._leaving or storage in self._exchanged or alive.count(storage) > 1:
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

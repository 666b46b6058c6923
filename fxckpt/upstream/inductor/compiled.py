"""Graphs compiled by Inductor as they stand: what is marked is in memory, and little else.

Inductor decides by rules of its own which values it writes to memory, in which order kernels run, and which memory is
used again. A plan says so already: these rules are turned off, and what the plan has in memory is marked.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V

from fxckpt.upstream.inductor.fusion import RoomForFusion
from fxckpt.upstream.inductor.lowered import fake_mode_of

__all__ = ["Compiled", "compile_graph"]

_NEVER = 1 << 30

_SETTINGS: dict[str, Any] = {
    # What is in memory is said by marks, not by how much is read or computed.
    "realize_opcount_threshold": _NEVER,
    "realize_reads_threshold": _NEVER,
    "realize_acc_reads_threshold": _NEVER,
    # The order is the plan's.
    "reorder_for_locality": False,
    "reorder_for_peak_memory": False,
    # A buffer that is used again for a smaller one stays as large as it is.
    "allow_buffer_reuse": False,
    # Layouts are those that were traced.
    "layout_optimization": False,
    "comprehensive_padding": False,
    "shape_padding": False,
}


@dataclass(frozen=True)
class Compiled:
    """A compiled graph.

    Attributes:
        call: from its inputs, in a list that is emptied, to its outputs.
        source: the Python code that runs, which allocates and frees, and calls kernels.
    """

    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
    source: str


def compile_graph(module: fx.GraphModule, donated: Sequence[int], room: RoomForFusion) -> Compiled:
    """Compile a graph of ops as Inductor lowers them.

    Nodes whose meta has a `step` are in memory; all others are computed where they are read.

    Args:
        module: from placeholders, which have values, to a tuple.
        donated: the inputs, by number, that may be written over.
        room: which kernels may be fused across steps.
    """
    mode = fake_mode_of(module)
    given = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    _mark(module)
    _describe(module, mode)
    context = TracingContext(mode)
    context.fw_metadata = _Metadata(donated)  # type: ignore[assignment]
    settings = {**_SETTINGS, "post_grad_custom_pre_pass": _Named(_digest(module, donated, room))}
    with (
        config.patch(settings),
        tracing(context),
        V.set_fake_mode(mode),
        V.set_choices_handler(_choices(room)),
        torch.no_grad(),
    ):
        compiled: Any = compile_fx_inner(module, given, static_input_idxs=(), is_backward=True)
    return Compiled(compiled, getattr(compiled, "source_code", ""))


def _mark(module: fx.GraphModule) -> None:
    """Say what is in memory, and that outputs have the layout that was traced."""
    output = module.graph.output_node()
    returned: Any = output.args[0]
    output.meta["user_visible_output_idxs"] = [i for i, node in enumerate(returned) if isinstance(node, fx.Node)]
    for node in module.graph.nodes:
        if "step" in node.meta:
            picked = [user for user in node.users if user.target is operator.getitem]
            for result in picked or [node]:
                if isinstance(result.meta.get("val"), torch.Tensor):
                    result.meta["inductor_realize_to_strides"] = True


def _describe(module: fx.GraphModule, mode: Any) -> None:
    """Give values to nodes that have none: views that were made anew."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.meta.get("val") is None:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


def _digest(module: fx.GraphModule, donated: Sequence[int], room: RoomForFusion) -> str:
    """What a compiled graph depends on beside its code, inputs and Inductor's settings."""
    marks = [(n.name, n.meta.get("step"), "inductor_realize_to_strides" in n.meta) for n in module.graph.nodes]
    return hashlib.sha256(repr((marks, tuple(donated), room)).encode()).hexdigest()


class _Named(CustomGraphPass):
    """A pass that does nothing but to be part of the name by which Inductor keeps what it compiled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return self._name


class _Metadata:
    """What Inductor asks AOTAutograd's metadata for: which inputs it may write over."""

    def __init__(self, donated: Sequence[int]) -> None:
        self.bw_donated_idxs = list(donated)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _choices(room: RoomForFusion) -> InductorChoices:
    class Choices(InductorChoices):
        @staticmethod
        def can_fuse(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            usual: bool = InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)
            return usual and room.allows(scheduler, node1, node2)

    return Choices()

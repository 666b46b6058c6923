"""An emitted graph cut into segments, each a graph of its own that is compiled or run op by op.

A segment takes values that others made and hands over those that others read. What costs nothing is made anew in each
that reads it: views, and what kernels compute on the way. So what goes from one segment to the next is what is in
memory.

Where gradients are handed over a segment ends. Others end where a block of the model does, before an op that calls a
library, since nothing is fused across one. Equal blocks then give equal segments, which are compiled once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxckpt.capture.nodes import has_effects, is_exchange, is_selection, sources_first
from fxckpt.profile.build import Profile
from fxckpt.rewrite.emitted import deliver
from fxckpt.upstream.fusible import is_fusible
from fxckpt.upstream.operators import is_operator

_BLOCK = re.compile(r"(.*?\.|)\d+(?=\.|$)")
"""The path of a module to its first number: that of a block, where a model has equal ones."""


@dataclass(frozen=True)
class Segment:
    """A part of an emitted graph.

    Attributes:
        nodes: what it runs, in the order of the emitted graph, apart from what is made anew.
        inputs: the values of others that it reads, in the order in which it first does.
        outputs: the values that others read, or that leave the step.
        dying: those of its inputs that nobody reads after it.
        compiled: whether it is compiled, or run op by op.
        delivers: whether its outputs are handed over when it has run: gradients, or what forward returns.
        received: the value that is given back then, where the gradient of an output is exchanged.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    dying: frozenset[fx.Node]
    compiled: bool
    delivers: bool = False
    received: fx.Node | None = None


@dataclass
class _Draft:
    nodes: list[fx.Node]
    compiled: bool
    handed_out: tuple[fx.Node | None, ...] | None = None  # gradients, or what forward returns
    received: fx.Node | None = None


def cut(profile: Profile, graph: fx.Graph) -> list[Segment]:
    """Cut an emitted graph. The values that leave it are the outputs of segments that have no ops of their own."""
    drafts = _drafts(profile, graph)
    inputs = [_inputs(draft) for draft in drafts]
    last: dict[fx.Node, int] = {node: place for place, read in enumerate(inputs) for node in read}
    segments = []
    for place, (draft, read) in enumerate(zip(drafts, inputs, strict=True)):
        outputs = draft.handed_out
        if outputs is None:
            outputs = tuple(n for n in draft.nodes if not _is_tuple(n) and last.get(n, place) > place)
        dying = frozenset(n for n in read if last[n] == place)
        segments.append(
            Segment(
                tuple(draft.nodes),
                tuple(read),
                outputs,
                dying,
                draft.compiled,
                delivers=draft.handed_out is not None,
                received=draft.received,
            )
        )
    return segments


def is_made_anew(node: fx.Node) -> bool:
    """Whether a value costs nothing: a view, or what kernels compute on the way."""
    if node.op == "get_attr":
        return True
    works = "fxckpt_step" in node.meta or "fxckpt_replay" in node.meta or _picks_result(node)
    return node.op == "call_function" and not works and node.target is not deliver


def _picks_result(node: fx.Node) -> bool:
    """Whether it is one of several results of an op, rather than one of several views."""
    return is_selection(node) and "fxckpt_step" in node.all_input_nodes[0].meta


def _drafts(profile: Profile, graph: fx.Graph) -> list[_Draft]:
    drafts: list[_Draft] = []
    block = _Blocks(profile)
    for node in graph.nodes:
        if node.op == "placeholder" or is_made_anew(node):
            continue
        if node.op == "output":
            if node.args[0] is not None:
                drafts.append(_Draft([], False, tuple(node.args[0])))
            continue
        if node.target is deliver:
            drafts.append(_Draft([], False, tuple(node.args)))
            block.forget()
            continue
        if is_exchange(node):
            parts: Any = node.args[0]
            drafts.append(_Draft([], False, tuple(parts[1:]), received=node))  # the first is what is there otherwise
            block.forget()
            continue
        compiled = not _runs_alone(node)
        begins = block.begins(node)
        goes_on = drafts and drafts[-1].handed_out is None and drafts[-1].compiled and compiled
        if _picks_result(node) or (goes_on and not begins):
            drafts[-1].nodes.append(node)
        else:
            drafts.append(_Draft([node], compiled))
    return drafts


class _Blocks:
    """Where a block of the model begins, as its ops come one after the other."""

    def __init__(self, profile: Profile) -> None:
        self._block_of = {
            node: _block(op.module) for part, op in zip(profile.parts, profile.graph.ops, strict=True) for node in part
        }
        self._present: str | None = None

    def begins(self, node: fx.Node) -> bool:
        """Whether a node calls a library, and the one that did before it belongs to another block."""
        captured = node.meta.get("fxckpt_node")
        if captured is None or "fxckpt_step" not in node.meta or is_fusible(captured):
            return False
        before, self._present = self._present, self._block_of.get(captured, "")
        return before is not None and before != self._present

    def forget(self) -> None:
        """A segment has ended."""
        self._present = None


def _block(module: str) -> str:
    found = _BLOCK.match(module)
    return found[0] if found else ""


def _runs_alone(node: fx.Node) -> bool:
    """Whether a node is run as it stands: what has effects, or keeps and restores the state of generators."""
    if not is_operator(node.target) or "fxckpt_replay" in node.meta:
        return True
    return has_effects(node.meta.get("fxckpt_node", node)) or has_effects(node)


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list)) or any(map(_picks_result, node.users))


def _inputs(draft: _Draft) -> list[fx.Node]:
    """The values of others that a segment reads, itself or in what it makes anew."""
    own, found, seen = {*draft.nodes}, dict[fx.Node, None](), set[fx.Node]()
    for node in (*draft.nodes, *(n for n in draft.handed_out or () if n is not None)):
        sources = node.all_input_nodes if node in own or is_made_anew(node) else [node]
        stack = list(reversed(sources))
        while stack:
            source = stack.pop()
            if source in own or source in seen:
                continue
            seen.add(source)
            if is_made_anew(source):
                stack += reversed(source.all_input_nodes)
            else:
                found[source] = None
    return list(found)


def body(segment: Segment, constants: fx.GraphModule) -> fx.GraphModule:
    """A segment as a module of its own: from its inputs to a tuple of its outputs.

    Its nodes have names of their own, so that equal segments have equal code; their meta has the value and, on what is
    a step, `step`: which step of the schedule it is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(segment.inputs):
        copies[node] = graph.placeholder(f"given_{number}")
        copies[node].meta["val"] = node.meta.get("val")

    def copy(node: fx.Node) -> fx.Node:
        for source in sources_first([node], lambda n: n not in copies):
            copies[source] = graph.node_copy(source, copies.__getitem__)
            copies[source].name = f"value_{len(copies)}"
            step = source.meta.get("fxckpt_step")
            copies[source].meta = {"val": source.meta.get("val"), **({} if step is None else {"step": step})}
        return copies[node]

    for node in segment.nodes:
        copy(node)
    graph.output(tuple(None if node is None else copy(node) for node in segment.outputs))
    return fx.GraphModule(constants, graph)

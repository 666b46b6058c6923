"""What each input and output of the captured graph is, read from AOTAutograd's descriptors. Names are never parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from fxckpt.errors import CaptureError
from fxckpt.upstream import aot
from fxckpt.upstream.aot import OutputType


class InputKind(Enum):
    """Where a graph input comes from."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    ATTRIBUTE = "attribute"
    """A plain tensor attribute of a module; `index` counts them."""
    ARGUMENT = "argument"
    """A tensor among the arguments of the call; `index` counts them."""


@dataclass(frozen=True)
class Input:
    """One tensor that the step is given: its placeholder, and where to find it at run time.

    `path` is the path of a parameter or buffer; `update` the node whose value is copied into it when forward ends;
    `gradient` the node of its gradient. An input that requires grad may have no gradient, if backward does not reach
    it.
    """

    node: fx.Node
    kind: InputKind
    path: str = ""
    index: int = -1
    requires_grad: bool = False
    update: fx.Node | None = None
    gradient: fx.Node | None = None


@dataclass(frozen=True)
class Lead:
    """How other outputs are computed from one, as autograd sees it.

    Attributes:
        ways: how many parts its gradient may have beside its tangent, one for each use.
        rank: orders such outputs by where forward computes them.
        followers: tangent numbers of the outputs that gradients come from.
    """

    ways: int
    rank: int
    followers: frozenset[int]


@dataclass(frozen=True)
class Exchanged:
    """In the place of a tangent's strides: autograd gets the parts of an output's gradient in the middle of backward,
    which goes on with what comes back, in these strides; None if they are not known yet."""

    stride: tuple[int, ...] | None = None


Arrival = tuple[int, ...] | Exchanged
"""How the gradient of an output gets into backward: a tangent by its strides, or what is exchanged for its parts."""


@dataclass(frozen=True)
class Output:
    """One tensor that forward computes, with its tangent if backward starts from it.

    `requires_grad` says whether backward could start from it; if so, `tangent_number` is its place among such outputs.
    `lead` says how other outputs are computed from it, if any are through which gradients flow.
    """

    node: fx.Node
    tangent: fx.Node | None
    requires_grad: bool
    tangent_number: int | None
    lead: Lead | None = None


@dataclass(frozen=True)
class Result:
    """How one tensor that the model returns is made from what forward computes.

    `kind` is "output" (it is outputs[index]), "input" (it is an argument or parameter, inputs[index]) or "view of
    input"; for views `alias` is AOTAutograd's description and `example` a fake tensor of the right form.
    """

    kind: str
    index: int
    alias: Any = None
    example: Any = None


@dataclass(frozen=True)
class Roles:
    """Inputs, outputs and results of a captured graph."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    results: tuple[Result, ...]


def read_roles(graph: fx.Graph, metadata: Any, leads: Mapping[int, Lead]) -> Roles:
    """Roles of all placeholders and outputs; `leads` by tangent number.

    Raises:
        CaptureError: an input or output is of a kind that fxckpt does not support, such as tensor subclasses.
    """
    placeholders = {node.meta["desc"]: node for node in graph.nodes if node.op == "placeholder"}
    output_node = graph.output_node()
    returned: Any = output_node.args[0]
    produced = dict(zip(output_node.meta["desc"], returned, strict=True))
    inputs = _inputs(placeholders, produced)
    _check_mutations(metadata, len(inputs))
    tangents = {desc.output: node for desc, node in placeholders.items() if isinstance(desc, aot.TangentAOTInput)}
    unknown = [desc for desc in tangents if not isinstance(desc, aot.PlainAOTOutput)]
    tangents = {desc: node for desc, node in tangents.items() if desc not in unknown}
    unknown = [desc for desc in unknown if placeholders[aot.TangentAOTInput(desc)].users]  # else it went unseen
    if unknown:
        raise CaptureError(
            f"backward would start from {unknown[0].expr()}: forward changes an input in place and gradients flow "
            "through that change. Clone the input before it is changed"
        )
    outputs, results = _outputs(metadata, produced, tangents, leads)
    return Roles(inputs, outputs, results)


def _inputs(placeholders: dict[Any, fx.Node], produced: dict[Any, fx.Node | None]) -> tuple[Input, ...]:
    inputs = []
    for desc, node in placeholders.items():
        if isinstance(desc, aot.TangentAOTInput):
            continue
        kind, path, index = _source(desc)
        update, gradient = aot.InputMutationAOTOutput(desc), aot.GradAOTOutput(desc)
        inputs.append(
            Input(node, kind, path, index, gradient in produced, produced.get(update), produced.get(gradient))
        )
    return tuple(inputs)


def _source(desc: Any) -> tuple[InputKind, str, int]:
    if isinstance(desc, aot.PlainAOTInput):
        return InputKind.ARGUMENT, "", desc.idx
    if isinstance(desc, aot.ParamAOTInput):
        return InputKind.PARAMETER, desc.target.removeprefix("model."), -1
    if isinstance(desc, aot.BufferAOTInput):
        if desc.target.startswith("model."):
            return InputKind.BUFFER, desc.target.removeprefix("model."), -1
        return InputKind.ATTRIBUTE, "", int(desc.target.removeprefix("attribute_"))
    if isinstance(desc, aot.ForwardTokenAOTInput):
        raise CaptureError(
            "forward calls an op with an effect of its own (one that prints, or is registered as having one), whose "
            "place among others fxckpt can't keep. Take it out"
        )
    raise CaptureError(
        f"the graph takes {desc.expr()} as an input, a {type(desc).__name__}, which fxckpt can't feed. Tensor "
        "subclasses, and inputs that share memory with each other and are changed in place, are not supported"
    )


def _check_mutations(metadata: Any, count: int) -> None:
    for index, info in enumerate(metadata.input_info[:count]):
        if info.mutates_metadata or info.mutates_storage_metadata or info.mutation_inductor_storage_resize:
            raise CaptureError(
                f"forward changes the shape, strides or storage of input {index} in place (by resize_, set_, "
                "transpose_ or the like). Use the out-of-place form"
            )


_COMPUTED = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)


def _outputs(
    metadata: Any, produced: dict[Any, fx.Node | None], tangents: dict[Any, fx.Node], leads: Mapping[int, Lead]
) -> tuple[tuple[Output, ...], tuple[Result, ...]]:
    """Computed outputs, and how results come from them."""
    infos = metadata.output_info
    numbers = {desc: number for number, desc in enumerate(tangents)}
    used = {desc: node for desc, node in tangents.items() if node.users}
    outputs: list[Output] = []
    place: dict[int, int] = {}  # number of a returned tensor -> number of the computed output
    for number, info in enumerate(infos):
        if info.output_type in _COMPUTED:
            desc = aot.PlainAOTOutput(number)
            place[number] = len(outputs)
            node = _node(produced, desc)
            tangent_number = numbers.get(desc)
            lead = None if tangent_number is None else leads.get(tangent_number)
            outputs.append(Output(node, used.get(desc), info.requires_grad, tangent_number, lead))
    results = []
    for number, info in enumerate(infos):
        kind = info.output_type
        if kind in _COMPUTED:
            results.append(Result("output", place[number]))
        elif kind is OutputType.is_input:
            results.append(Result("input", info.base_idx))
        elif kind is OutputType.alias_of_input:
            results.append(Result("view of input", info.base_idx, info, _example(produced, number)))
        else:
            raise CaptureError(f"the model returns a tensor of a kind that fxckpt does not know: {kind}")
    return tuple(outputs), tuple(results)


def _node(produced: dict[Any, fx.Node | None], desc: Any) -> fx.Node:
    node = produced.get(desc)
    if not isinstance(node, fx.Node):
        raise CaptureError(f"the captured graph does not compute {desc.expr()}")
    return node


def _example(produced: dict[Any, fx.Node | None], number: int) -> torch.Tensor | None:
    node = produced.get(aot.PlainAOTOutput(number))
    return node.meta.get("val") if isinstance(node, fx.Node) else None

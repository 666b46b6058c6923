"""A plan made runnable, and a backward of it that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import tensors
from fxckpt.capture.roles import Arrival, Exchanged, Lead, Roles
from fxckpt.errors import RuntimeContractError
from fxckpt.rewrite.backends import Backward, Executable
from fxckpt.rewrite.emitted import Emitted
from fxckpt.runtime.place import Place
from fxckpt.upstream.dispatch import plain_execution
from fxckpt.upstream.ops.exchange import EXCHANGE
from fxckpt.upstream.ops.layout import layout_of
from fxckpt.upstream.tensors import storage_key

Tangents = frozenset[tuple[int, Arrival]]
"""What backward starts from, and what gets into it later: indices into `Roles.outputs`, and how gradients come."""


@dataclass(frozen=True)
class Program:
    """A plan made runnable: what runs it, and the roles of what goes in and comes out."""

    roles: Roles
    executable: Executable

    @cached_property
    def emitted(self) -> Emitted:
        """The graphs that are run."""
        return self.executable.emitted

    @cached_property
    def tangents(self) -> Tangents:
        """The tangents that backward starts from, and the gradients that it exchanges."""
        outputs = self.roles.outputs
        traced = {i: o.tangent.meta["val"] for i, o in enumerate(outputs) if o.tangent is not None}
        given = ((i, layout_of(traced[i])) for i in self.emitted.tangents if i not in self.exchanges)
        return frozenset((*given, *self.exchanges.items()))

    @cached_property
    def exchanges(self) -> dict[int, Exchanged]:
        """The outputs whose gradients are exchanged, in the order in which backward does so."""
        nodes = [node for node in self.emitted.backward.nodes if node.target is EXCHANGE]
        return {self._numbered[node.args[1]]: Exchanged(layout_of(node.meta["val"])) for node in nodes}

    @cached_property
    def _numbered(self) -> dict[int | None, int]:
        return {output.tangent_number: index for index, output in enumerate(self.roles.outputs)}

    @cached_property
    def leads(self) -> dict[int, Lead]:
        """The outputs that others are computed from, in the order of forward."""
        leads = {i: output.lead for i, output in enumerate(self.roles.outputs) if output.lead is not None}
        return dict(sorted(leads.items(), key=lambda pair: pair[1].rank))

    @cached_property
    def followers(self) -> dict[int, frozenset[int]]:
        """For each of these the outputs that its gradient comes from."""
        return {i: frozenset(self._numbered[number] for number in lead.followers) for i, lead in self.leads.items()}

    @cached_property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """The outputs by the functions that autograd has them from: each that others are computed from, then the
        rest."""
        rest = tuple(i for i in range(len(self.roles.outputs)) if i not in self.leads)
        return (*((i,) for i in self.leads), rest)

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the inputs are."""
        return tuple(dict.fromkeys(given.node.meta["val"].device for given in self.roles.inputs))

    @cached_property
    def updated(self) -> tuple[int, ...]:
        """Indices of the inputs that forward changes."""
        return tuple(i for i, given in enumerate(self.roles.inputs) if given.update is not None)


def inputs_behind(program: Program, output: int) -> frozenset[int]:
    """The inputs whose gradients come from that of an output which is exchanged, and from nothing else.

    Raises:
        RuntimeContractError: some come from it and from others, too.
    """
    outputs, inputs = program.roles.outputs, program.roles.inputs
    tangent = outputs[output].tangent
    assert tangent is not None
    (through,) = tangent.users  # where it is exchanged
    starts = [o.tangent for i, o in enumerate(outputs) if o.tangent is not None and i not in program.exchanges]
    behind, others = _reached([through]), _reached(starts, but=through)
    if any(given.gradient in behind and given.gradient in others for given in inputs):
        raise RuntimeContractError(
            "backward goes on from an output that another output is computed from, but there are other ways past it to "
            "the same parameters. Pass retain_graph=True where the gradient of that output was asked for"
        )
    return frozenset(i for i, given in enumerate(inputs) if given.gradient in behind)


def _reached(starts: Iterable[fx.Node], but: fx.Node | None = None) -> set[fx.Node]:
    """Nodes computed from some, and those themselves; not by way of `but`."""
    found = set(starts)
    pending = list(found)
    while pending:
        further = [user for user in pending.pop().users if user is not but and user not in found]
        found.update(further)
        pending += further
    return found


def same_but_for_layout(one: Program, other: Program, output: int) -> bool:
    """Whether two programs' graphs differ in nothing but the strides in which the gradient of an output comes."""
    graphs = [program.roles.outputs[output].node.graph for program in (one, other)]
    number = one.roles.outputs[output].tangent_number
    exchanged: set[int | None] = set()
    for nodes in zip_longest(*(graph.nodes for graph in graphs)):
        if None in nodes or len({node.name for node in nodes}) > 1 or len({node.target for node in nodes}) > 1:
            return False
        args = [fx.node.map_arg((node.args, node.kwargs), lambda n: n.name) for node in nodes]
        keys = [storage_key(tensor) for node in nodes for tensor in tensors(node)]
        if nodes[0].target is EXCHANGE and nodes[0].args[1] == number:
            exchanged.update(keys)
            args = [given[0][0] for given in args]
        if args[0] != args[1]:
            return False
        if not exchanged.intersection(keys) and len({_forms(node) for node in nodes}) > 1:
            return False
    return bool(exchanged)


def _forms(node: fx.Node) -> tuple[Any, ...]:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors(node))


class Running:
    """A backward that runs, from one place where it hands something over to the next.

    Attributes:
        reply: what it goes on with, in a list that it empties, where it handed over the parts of an output's gradient.
    """

    def __init__(self, generator: Backward, place: Place) -> None:
        self._generator: Backward | None = generator
        self._place = place
        self.reply: list[torch.Tensor] | None = None

    def advance(self) -> list[torch.Tensor | None]:
        """Go on to the next such place. The list is the caller's, who empties it before going on.

        Raises:
            RuntimeContractError: it has failed before.
        """
        if self._generator is None:
            raise RuntimeContractError("backward failed before, and can't go on. Run forward again")
        reply, self.reply = self.reply, None
        try:
            with plain_execution(), self._place.entered() if self._place.streams else contextlib.nullcontext():
                return self._generator.send(reply)
        except BaseException:
            self._generator = None
            raise

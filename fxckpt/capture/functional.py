"""A model as what AOTAutograd traces: a function of flat tensors, whose parameters are leaves as in eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.capture.constants import Constants
from fxckpt.capture.roles import Lead
from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.capture.traces import Place, unchanged
from fxckpt.upstream.dispatch import is_traced
from fxckpt.upstream.hooks import buffers_of, parameters_of
from fxckpt.upstream.operators import UNSAFE_VIEW
from fxckpt.upstream.tensors import is_view, storage_key


class FunctionalModel(nn.Module):
    """The model as a function of flat tensors, with plain tensor attributes turned into buffers."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: Structure,
        is_leaf: Sequence[bool],
        constants: Constants,
    ) -> None:
        """`is_leaf` says which tensors among the inputs are leaves in eager."""
        super().__init__()
        self.model, self._constants = model, constants
        self._forward, self._inputs, self._is_leaf = forward, inputs, is_leaf
        self.outputs: Structure | None = None
        self.attributes = tensor_attributes(model)
        self._aliases = _aliases(model)
        self.leads: dict[int, Lead] = {}  # how outputs are computed from each other
        self.sources: dict[int, torch.Tensor] = {}  # by ids of what is returned: what the model returns there
        self.leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what is traced, and the leaf in its place
        for index, (owner, name) in enumerate(self.attributes):
            self.register_buffer(f"attribute_{index}", owner[name].detach())

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The outputs' tensors; `outputs` has their structure."""
        self.leaves = {}
        given = [self._leaf(x) if is_leaf else x for x, is_leaf in zip(tensors, self._is_leaf, strict=True)]
        self._constants.traced(given)
        args, kwargs = put_together(self._inputs, iter(given))
        with self._parameters_as_leaves(), _tied(self._aliases), unchanged(self.model, self.attributes):
            for index, (owner, name) in enumerate(self.attributes):
                owner[name] = getattr(self, f"attribute_{index}")
            flat, self.outputs = take_apart(self._forward(*args, **kwargs))
            given_memory = {storage_key(x) for x in (*tensors, *self.parameters(), *self.buffers())}
        traced = {id(leaf): tensor for tensor, leaf in self.leaves.values()}
        sources = [traced.get(id(tensor), tensor) for tensor in flat]
        outputs = _told_apart(sources, given_memory)
        self.sources = {id(output): source for output, source in zip(outputs, sources, strict=True)}
        return outputs

    def _leaf(self, traced: torch.Tensor) -> torch.Tensor:
        """A leaf in the place of what the tracer computed, as in eager: of leaves alone autocast keeps its casts.

        With one cast for all its uses, a weight's gradients are added up in the lower precision. While torch only looks
        how outputs come from inputs, before it traces, nothing is differentiated.
        """
        if not traced.requires_grad or traced.is_leaf or not is_traced():
            return traced
        if id(traced) not in self.leaves:
            self.leaves[id(traced)] = traced, traced.detach().requires_grad_()
        return self.leaves[id(traced)][1]

    @contextlib.contextmanager
    def _parameters_as_leaves(self) -> Iterator[None]:
        places = [
            (held, name, parameter)
            for held in map(parameters_of, self.model.modules())
            for name, parameter in held.items()
            if parameter is not None
        ]
        for held, name, parameter in places:
            held[name] = self._leaf(parameter)  # type: ignore[assignment]
        try:
            yield
        finally:
            for held, name, parameter in places:
                held[name] = parameter

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:  # noqa: ARG002
        """Each parameter once, whatever is asked for: a tied one is one input of the graph and has one gradient."""
        return super().named_parameters(prefix, recurse, remove_duplicate=True)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:  # noqa: ARG002
        """Each buffer once, whatever is asked for."""
        return super().named_buffers(prefix, recurse, remove_duplicate=True)


def _told_apart(outputs: list[torch.Tensor], given_memory: set[int | None]) -> list[torch.Tensor]:
    """The outputs, each with a tangent of its own even where one is a view of another.

    Else AOTAutograd would have one tangent for the tensor that is viewed, and its parts would be added up in another
    order than in eager. What shares memory with an input is left for it to deal with.
    """
    own: dict[int, torch.Tensor] = {}
    seen = set(given_memory)
    for output in outputs:
        if id(output) in own or output.layout is not torch.strided:
            continue
        memory = storage_key(output)
        apart = memory not in given_memory and (is_view(output) or memory in seen)
        own[id(output)] = UNSAFE_VIEW(output, output.shape) if apart else output
        seen.add(memory)
    return [own.get(id(output), output) for output in outputs]


def _aliases(model: nn.Module) -> list[tuple[Place, Place]]:
    """Further places of parameters and buffers that several modules share, each with the first place."""
    first: dict[int, Place] = {}
    found = []
    for module in model.modules():
        for held in (parameters_of(module), buffers_of(module)):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in first:
                    found.append(((held, name), first[id(tensor)]))
                elif tensor is not None:
                    first[id(tensor)] = (held, name)
    return found


@contextlib.contextmanager
def _tied(aliases: list[tuple[Place, Place]]) -> Iterator[None]:
    """While a model is traced its parameters are replaced, each in its first place: let the other places follow."""
    before = [held[name] for (held, name), _ in aliases]
    for (held, name), (first, first_name) in aliases:
        held[name] = first[first_name]
    try:
        yield
    finally:
        for ((held, name), _), tensor in zip(aliases, before, strict=True):
            held[name] = tensor


def tensor_attributes(model: nn.Module) -> list[Place]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers: where each is, and its name."""
    return [
        (vars(module), name)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is torch.Tensor
    ]

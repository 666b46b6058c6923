"""Values that follow from one argument of integers, computed while Dynamo traces, each with a guard on the argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.guards import get_verbose_code_parts, install_guard
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxckpt.upstream.dispatch import really_computed
from fxckpt.upstream.operators import called_name, changes_by_name
from fxckpt.upstream.tensors import storage_key

_DRAWS = ("rand", "dropout", "bernoulli", "normal", "multinomial", "empty", "resize", "exponential", "poisson")
_OF_A_FORM = ("new_full", "new_ones", "new_zeros", "ones_like", "zeros_like", "full_like", "new_tensor")
_MOST_ELEMENTS = 2**20
_MOST_STEPS = 40
_FAILURES = (RuntimeError, KeyError, AttributeError, IndexError, TypeError, ValueError)

Steps = dict[fx.Node, tuple[Callable[..., Any], Any, Any]]
"""The ops that a value is made of, in order: function, arguments, keyword arguments."""


class _Unknown(Exception):  # noqa: N818 - it is no error
    """The value follows from more than one argument, or from what isn't known."""


def answer(variable: Any) -> bool | int | float | None:
    """The number in a traced tensor that is made of one argument at most; None if it isn't known.

    A guard is installed: the graph holds for arguments that give the same number.
    """
    steps: Steps = {}
    inputs: dict[fx.Node, torch.Tensor] = {}
    node = variable.as_proxy().node
    try:
        _collect(node, steps, inputs)
        if len(inputs) > 1 or _is_changed({*steps, *inputs}, node.graph):
            return None
        value = _run(steps, dict(inputs))[node]
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            return None
        number = value.item()
    except (_Unknown, *_FAILURES):
        return None
    for given in inputs:
        guard = functools.partial(_guard, _same(node, steps, given, number))
        source = given.meta["grapharg"].source
        if source is None:
            return None
        install_guard(source.make_guard(guard))
    return number


def _same(node: fx.Node, steps: Steps, given: fx.Node, number: Any) -> Callable[[torch.Tensor], bool]:
    return lambda x: bool(_run(steps, {given: x})[node].item() == number)


def _guard(same: Callable[[Any], bool], builder: Any, guard: Any) -> None:
    text = get_verbose_code_parts([f"the values that forward asks for are the same: {guard.name}"], guard)
    builder.get_guard_manager(guard).add_lambda_guard(same, text, guard.user_stack)


def _collect(node: fx.Node, steps: Steps, inputs: dict[fx.Node, torch.Tensor]) -> None:
    if node in steps or node in inputs:
        return
    if node.op == "placeholder":
        inputs[node] = _example(node)
        return
    if node.op not in ("call_function", "call_method") or len(steps) > _MOST_STEPS:
        raise _Unknown
    name = called_name(node)
    if any(part in name for part in _DRAWS) or changes_by_name(name, node.kwargs):
        raise _Unknown
    args: tuple[Any, ...] = node.args
    if name in _OF_A_FORM:
        args = (_Form(args[0].meta["example_value"]), *args[1:])
    for source in _nodes((args, node.kwargs)):
        _collect(source, steps, inputs)
    target: Any = node.target
    function = functools.partial(_method, str(target)) if node.op == "call_method" else target
    steps[node] = function, args, dict(node.kwargs)


def _is_changed(nodes: set[fx.Node], graph: fx.Graph) -> bool:
    """Whether the graph writes to one of these values, or to another view of its memory."""
    memory = {_memory(node) for node in nodes} - {None}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and changes_by_name(called_name(node), node.kwargs):
            written = _nodes((node.args[:1], node.kwargs.get("out")))
            if any(x in nodes or _memory(x) in memory for x in written):
                return True
    return False


def _memory(node: fx.Node) -> int | None:
    example = node.meta.get("example_value")
    return storage_key(example) if isinstance(example, torch.Tensor) else None


def _example(node: fx.Node) -> torch.Tensor:
    given = node.meta.get("grapharg")
    example = None if given is None else given.example
    if not isinstance(example, torch.Tensor) or isinstance(example, FakeTensor) or example.is_meta:
        raise _Unknown
    if example.is_floating_point() or example.is_complex() or example.numel() > _MOST_ELEMENTS:
        raise _Unknown
    return example


class _Form:
    """Stands for a tensor of which only the form is asked for."""

    def __init__(self, like: torch.Tensor) -> None:
        self.dtype, self.shape, self.device = like.dtype, tuple(like.shape), like.device

    def tensor(self) -> torch.Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def _method(name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(tensor, name)(*args, **kwargs)


def _nodes(value: Any) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, fx.Node)]


def _run(steps: Steps, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    def read(given: Any) -> Any:
        if isinstance(given, fx.Node):
            return values[given]
        return given.tensor() if isinstance(given, _Form) else given

    with really_computed():
        for node, (function, args, kwargs) in steps.items():
            args, kwargs = pytree.tree_map(read, (args, kwargs))
            values[node] = function(*args, **kwargs)
    return values

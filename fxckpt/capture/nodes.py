"""What a node computes, what it does beside that, and hence how it may be treated."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fxckpt.upstream.determinism import draws_random_numbers, may_differ_when_repeated
from fxckpt.upstream.operators import HigherOrderOperator, changes_arguments, is_operator, returns_nothing
from fxckpt.upstream.ops.exchange import EXCHANGE
from fxckpt.upstream.pytree import tensors_in
from fxckpt.upstream.tensors import device_of

_NEVER_REPEATED_NAMESPACES = frozenset(("_c10d_functional", "c10d", "c10d_functional"))


def value(node: fx.Node) -> Any:
    """What the node computed when it was traced: tensors of the right form without numbers, or None."""
    return node.meta.get("val")


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that the node computes, in the order of its results."""
    return tensors_in(value(node))


def device(node: fx.Node) -> torch.device:
    """Where the node's first result is, else the first of its inputs."""
    return device_of(tensors_in([value(node), *map(value, node.all_input_nodes)]))


def is_random(node: fx.Node) -> bool:
    """Whether the op draws from the random-number generator."""
    return is_operator(node.target) and draws_random_numbers(node.target, node.args, node.kwargs)


def has_effects(node: fx.Node) -> bool:
    """Whether the op must run even if nothing reads its outputs."""
    if is_random(node) or is_collective(node) or is_exchange(node):
        return True
    target = node.target
    return is_operator(target) and (changes_arguments(target) or returns_nothing(target))


def is_collective(node: fx.Node) -> bool:
    """Whether the op communicates with other processes."""
    return is_operator(node.target) and node.target.namespace in _NEVER_REPEATED_NAMESPACES


def is_exchange(node: fx.Node) -> bool:
    """Whether backward hands over an output's gradient there, to go on with what comes back."""
    return node.target is EXCHANGE


def why_pinned(node: fx.Node) -> str:
    """Why the op must not be repeated, or "" if it may be."""
    target = node.target
    if is_collective(node):
        return "it communicates with other processes"
    if is_exchange(node):
        return "it hands a gradient over"
    if isinstance(target, HigherOrderOperator):
        return f"{target.name()} is opaque"
    if is_operator(target):
        if changes_arguments(target):
            return "it changes its arguments"
        if returns_nothing(target):
            return "it looks at values and may raise an error"
        if may_differ_when_repeated(target, node.args, node.kwargs, device(node).type):
            return "it may give another result when run again"
    return ""


def is_selection(node: fx.Node) -> bool:
    """Whether the node only picks an element of a tuple or list."""
    return node.op == "call_function" and node.target is operator.getitem


def sources_first(nodes: Iterable[fx.Node], is_wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Of nodes, and of what these are computed from, all that are wanted: each once, behind its sources.

    What is not wanted ends the search.
    """
    found: dict[fx.Node, None] = {}
    stack = [(node, False) for node in nodes][::-1]
    while stack:
        node, ready = stack.pop()
        if ready:
            found[node] = None
        elif node not in found and is_wanted(node):
            stack.append((node, True))
            stack += [(source, False) for source in reversed(node.all_input_nodes)]
    return list(found)


def fills(source: fx.Node, node: fx.Node) -> bool:
    """Whether a value has the form of a node's result, which may take its place, and takes up its whole storage."""
    old, new = source.meta["val"], node.meta["val"]
    return _form(old) == _form(new) and old.untyped_storage().nbytes() == new.numel() * new.element_size() > 0


def _form(value: torch.Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg()


def describe_again(nodes: Iterable[fx.Node]) -> None:
    """Nodes whose arguments have changed have the value that follows from them: views are in their source's memory."""
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

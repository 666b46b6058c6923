"""Nested inputs and outputs taken apart into tensors and a hashable description, and put together again.

Understood: everything registered with torch's pytrees (tuples, lists, dicts, named tuples, HuggingFace's ModelOutput),
dataclasses, and any other object that can be pickled: tensors inside it are found by pickling.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.errors import CaptureError
from fxckpt.upstream.pytree import is_namedtuple_instance, node_kind

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, type)


@dataclass(frozen=True, slots=True)
class _ByIdentity:
    """Stands for a value that can't be hashed: equal to itself only."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, slots=True)
class Structure:
    """What is left of a nested value when its tensors are taken out. Hashable, equal for equal structures.

    `kind` is "tensor", "constant", "node" (a pytree node: `detail` is its type and context), "dataclass" (its type and
    field names) or "pickle" (the pickled object; its tensors are children).
    """

    kind: str
    detail: Any = None
    children: tuple[Structure, ...] = ()


_TENSOR = Structure("tensor")


def take_apart(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """The tensors in a nested value, in a fixed order, and its structure.

    Raises:
        CaptureError: an object in it can be neither taken apart nor pickled.
    """
    tensors: list[torch.Tensor] = []
    return tensors, _take_apart(value, tensors)


def put_together(structure: Structure, tensors: Iterator[Any]) -> Any:
    """The value of the given structure with these tensors in it."""
    if structure.kind == "tensor":
        return next(tensors)
    if structure.kind == "constant":
        kind, value = structure.detail
        return value.value if kind is _ByIdentity else value
    if structure.kind == "pickle":
        return _Unpickler(structure.detail, tensors).load()
    children = [put_together(child, tensors) for child in structure.children]
    if structure.kind == "dataclass":
        kind, names = structure.detail
        result = object.__new__(kind)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(result, name, child)
        return result
    return structure.detail.unflatten(children)


def _take_apart(value: Any, tensors: list[torch.Tensor]) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TENSOR
    if isinstance(value, _PLAIN):
        return Structure("constant", (type(value), value))
    kind = type(value)
    if is_namedtuple_instance(value):
        return Structure("node", _Node.named_tuple(kind), tuple(_take_apart(child, tensors) for child in value))
    handler = node_kind(kind)
    if handler is not None:
        children, context = handler.flatten_fn(value)
        node = _Node(kind, _hashable(context), handler.unflatten_fn)
        return Structure("node", node, tuple(_take_apart(child, tensors) for child in children))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value) if hasattr(value, field.name))
        parts = tuple(_take_apart(getattr(value, name), tensors) for name in names)
        return Structure("dataclass", (kind, names), parts)
    return _pickle(value, tensors)


@dataclass(frozen=True, slots=True)
class _Node:
    """Type, context and constructor of a pytree node."""

    kind: type
    context: Any
    build: Callable[[list[Any], Any], Any] = dataclasses.field(compare=False)

    def unflatten(self, children: list[Any]) -> Any:
        context = self.context
        return self.build(children, context.value if isinstance(context, _Frozen) else context)

    @classmethod
    def named_tuple(cls, kind: type) -> _Node:
        return cls(kind, None, lambda children, _: kind(*children))


@dataclass(frozen=True, slots=True)
class _Frozen:
    """An unhashable pytree context beside a hashable text of it."""

    text: str
    value: Any = dataclasses.field(compare=False)


def _hashable(context: Any) -> Any:
    try:
        hash(context)
    except TypeError:
        return _Frozen(repr(context), context)
    return context


class _Pickler(pickle.Pickler):
    """Pickles everything but tensors, which it collects."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        self._tensors.append(value)
        return "tensor"


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote, in this process only, with new tensors in the old places."""

    def __init__(self, data: bytes, tensors: Iterator[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, _: Any) -> Any:
        return next(self._tensors)


def _pickle(value: Any, tensors: list[torch.Tensor]) -> Structure:
    file = io.BytesIO()
    found: list[torch.Tensor] = []
    try:
        _Pickler(file, found).dump(value)
    except Exception as error:
        try:
            hash(value)
        except TypeError:
            return Structure("constant", (_ByIdentity, _ByIdentity(value)))
        if callable(value):
            return Structure("constant", (type(value), value))
        raise CaptureError(
            f"an input or output of type {type(value).__qualname__} can't be taken apart into tensors: {error}. "
            "Pass and return tensors, tuples, lists, dicts, dataclasses or objects that can be pickled"
        ) from error
    if not found:
        return Structure("constant", _constant(value))
    tensors += found
    return Structure("pickle", file.getvalue(), (_TENSOR,) * len(found))


def _constant(value: Any) -> tuple[type, Any]:
    try:
        hash(value)
    except TypeError:
        return _ByIdentity, _ByIdentity(value)
    return type(value), value

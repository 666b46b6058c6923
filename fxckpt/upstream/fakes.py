"""Fake tensors, which stand for tensors while a graph is traced: they have a form and no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor

from fxckpt.upstream.patching import attribute_replaced

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "UnsupportedOperatorException",
    "descriptions_apart",
    "traced_tensors_have",
]

_DESCRIBED: dict[str, dict[Any, Any]] = {}


@contextlib.contextmanager
def descriptions_apart(kind: str) -> Iterator[None]:
    """Torch remembers for the whole process how it described results; where it describes otherwise it does so apart.

    What is remembered is shared by all contexts of the same `kind`.
    """
    with attribute_replaced(FakeTensorMode, "cache", _DESCRIBED.setdefault(kind, {})):
        yield


@contextlib.contextmanager
def traced_tensors_have(**methods: Any) -> Iterator[None]:
    """Tensors that AOTAutograd traces have these methods, instead of their own, in this thread."""
    with contextlib.ExitStack() as stack:
        for name, method in methods.items():
            stack.enter_context(attribute_replaced(FunctionalTensor, name, method))
        yield

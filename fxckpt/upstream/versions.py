"""Where versions of torch differ: each difference once, told by what torch has rather than by its number.

A range of versions is supported (see `pyproject.toml`). What a new one has renamed or given another meaning gets an
entry here; what torch calls the same in all of them is used where it is needed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo.variables import BuiltinVariable, TensorVariable
from torch.fx import _symbolic_trace, traceback
from torch.utils import checkpoint

from fxckpt.upstream.patching import function_replaced, state_apart

__all__ = ["APART", "checkpoint_generator", "fx_tracing_apart", "old_stacks_forgotten", "truth_replaced"]

_KNOWS_REGIONS = "isolate_recompiles" in inspect.signature(torch.compile).parameters

APART: dict[str, Any] = {"isolate_recompiles": True} if _KNOWS_REGIONS else {}
"""Arguments of `torch._dynamo.optimize` with which graphs of code that several functions run are looked for apart. Torch
2.11 has no such argument, and looks at all of them, of which only those of the same backend are taken."""


def checkpoint_generator() -> Callable[..., Any]:
    """What `torch.utils.checkpoint` does around a function in the variant without re-entry; from 2.14 by another name."""
    names = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    found: Callable[..., Any] = next(getattr(checkpoint, name) for name in names if hasattr(checkpoint, name))
    return found


def fx_tracing_apart() -> contextlib.AbstractContextManager[None]:
    """Whether torch.fx traces is known in this thread alone, as it is without us from torch 2.15 on."""
    if not hasattr(_symbolic_trace, "_is_fx_tracing_flag"):
        return contextlib.nullcontext()
    tells = (_symbolic_trace.Tracer.trace, _symbolic_trace.is_fx_tracing, _symbolic_trace.is_fx_symbolic_tracing)
    return state_apart(_symbolic_trace, "_is_fx_tracing_flag", functions=tells)


def old_stacks_forgotten() -> contextlib.AbstractContextManager[None]:
    """Nodes of backward that have no stack trace get none: torch 2.11 gives them that of the one before."""
    return function_replaced(traceback.set_stack_trace, _set_stack_trace)


def _set_stack_trace(original: Callable[[list[str]], None], stack: list[str]) -> None:
    original(stack)
    if not stack and traceback.has_preserved_node_meta():
        traceback.get_current_meta().pop("stack_trace", None)


Truth = Callable[[Any, Any], Any]
"""From a traced tensor and what translates instructions to what stands for the truth of the tensor."""


@contextlib.contextmanager
def truth_replaced(by: Callable[[Truth], Truth]) -> Iterator[None]:
    """Dynamo takes `by(its own way)` as its way to call `bool` of a tensor: a method of tensors from torch 2.13 on."""
    if hasattr(TensorVariable, "bool_impl"):
        with mock.patch.object(TensorVariable, "bool_impl", by(TensorVariable.bool_impl)):
            yield
        return
    original = BuiltinVariable.call_bool

    def call_bool(self: Any, tx: Any, given: Any) -> Any:
        if not given.is_tensor():
            return original(self, tx, given)
        return by(lambda tensor, tx: original(self, tx, tensor))(given, tx)

    with (
        mock.patch.object(BuiltinVariable, "call_bool", call_bool),
        mock.patch.object(BuiltinVariable, "call_function_handler_cache", {}),  # which keeps the method
    ):
        yield

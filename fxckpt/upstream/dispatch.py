"""How ops reach their kernels: below autograd, without modes, or seen by modes; and what backward's engine tells."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "TorchDispatchMode",
    "asked_gradients_of",
    "backward_keeps_graph",
    "backwards_context",
    "bare_apply",
    "describes_op",
    "is_traced",
    "place_in_order",
    "plain_execution",
    "really_computed",
    "unseen_by_function_modes",
    "when_backward_ends",
    "will_run",
]

_ENGINE_CALL = torch.autograd.graph._engine_run_backward.__code__
_INPUTS = 3  # the place of what is differentiated with respect to among its arguments, behind the outputs


def _below_autograd() -> torch._C.DispatchKeySet:
    """What ops pass through before they come to the kernels of devices: casts, autograd, its note of views."""
    names = ("ADInplaceOrView", "AutogradFunctionality", "AutogradNestedTensor", "AutogradOther")
    keys = torch._C.DispatchKey.__members__.items()
    passed = [torch._C.DispatchKeySet(key) for name, key in keys if name in names or name.startswith("Autocast")]
    return functools.reduce(operator.or_, passed)


_PASSED = _below_autograd()


def plain_execution() -> contextlib.AbstractContextManager[Any]:
    """Ops run as they stand in the graph: autograd has its own record, and casts are ops already.

    Nor does autograd note which values are views of others: a view that is returned would change as its base does. Nor
    do modes of torch functions, such as a default device, have a part in it.
    """
    if torch._C._len_torch_function_stack():
        return _unseen_plain_execution()
    return torch._C._ExcludeDispatchKeyGuard(_PASSED)  # one guard, no generator: each stage of a backward enters it


@contextlib.contextmanager
def _unseen_plain_execution() -> Iterator[None]:
    with torch._C._ExcludeDispatchKeyGuard(_PASSED), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def really_computed() -> Iterator[None]:
    """Nothing is traced, whatever modes are active: tensors hold numbers."""
    with _disable_current_modes(), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def unseen_by_function_modes() -> Iterator[None]:
    """Modes that see torch's functions, and attributes of tensors, see nothing."""
    with torch._C.DisableTorchFunction():
        yield


def is_traced() -> bool:
    """Whether ops become nodes of a graph now; while torch only looks how outputs come from inputs they don't."""
    return get_proxy_mode() is not None


def describes_op() -> bool:
    """Whether what runs is torch's own description of an op, which computes the form of its results."""
    return bool(torch._C._meta_in_tls_dispatch_include())


def backward_keeps_graph() -> bool:
    """Within a backward: whether its graph is retained, so that it may run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def will_run(node: Node) -> bool:
    """Within a backward: whether a node of autograd's is on the way to what is differentiated with respect to."""
    return bool(torch._C._will_engine_execute_node(node))


def place_in_order(node: Node) -> int:
    """Of two nodes of autograd's that a thread made, the later has the higher number, and runs earlier in backward."""
    return int(node._sequence_nr())


def asked_gradients_of() -> tuple[Any, ...]:
    """Within a backward: the tensors, or edges, that it was asked for gradients of; () where all leaves get theirs.

    Devices have threads of their own for backward, which have no caller: so what every backward was asked for that
    is running in the process is among them.
    """
    asked: list[Any] = []
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code is _ENGINE_CALL:
                asked += frame.f_locals["args"][_INPUTS : _INPUTS + 1]
            frame = frame.f_back
    return tuple([x for given in asked for x in given])


def backwards_context() -> contextvars.Context | None:
    """Within a backward, in whatever thread: the context variables of the thread that called it, as they were then."""
    if not torch._C._is_key_in_tls("context"):
        return None
    found: contextvars.Context = torch._C._get_obj_in_tls("context")
    return found


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls outside of torch.func's transforms: what looks for these takes as long as the rest."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Within a backward: call something when it has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)

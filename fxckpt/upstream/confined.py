"""What torch changes for the whole process while it traces is confined to the thread that traces.

Else another thread's modules, warnings, graphs and random numbers would be touched meanwhile; and where two such
changes are undone in another order than they were made, for ever. Not confined are things that nobody but another
trace looks at: while two threads trace, the names and numbers that torch gives graphs for its logs may be mixed up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx import _symbolic_trace, traceback

from fxckpt.upstream.generators import never_put_back
from fxckpt.upstream.patching import attribute_replaced, function_replaced, state_apart
from fxckpt.upstream.versions import fx_tracing_apart, old_stacks_forgotten
from fxckpt.upstream.warned import warnings_ignored


@contextlib.contextmanager
def tracing_confined() -> Iterator[None]:
    """AOTAutograd traces within without other threads noticing."""
    with (
        warnings_ignored(),
        never_put_back(),
        state_apart(traceback, "current_meta", "should_preserve_node_meta"),
        old_stacks_forgotten(),
        fx_tracing_apart(),
        function_replaced(_symbolic_trace._new_patcher, _patching_nothing),
        function_replaced(mock.patch, _patching_here),
        attribute_replaced(torch.autograd, "detect_anomaly", _not_watched),
    ):
        yield


class _Nothing(_symbolic_trace._Patcher):
    """Replaces no methods of modules, and no functions in models' files.

    Torch does so to see where values are used that stand for nodes; AOTAutograd sees ops, and lets all calls pass.
    """

    def patch(self, *_: Any, **__: Any) -> None:
        """Leave a function as it is."""

    def patch_method(self, *_: Any, **__: Any) -> None:
        """Leave a method as it is."""


def _patching_nothing(_: Callable[..., Any]) -> Iterator[_symbolic_trace._Patcher]:
    yield _Nothing()


def _patching_here(original: Callable[..., Any], target: str, *args: Any, **kwargs: Any) -> Any:
    """Torch lets generators of CUDA devices be while it looks at a model: for all threads."""
    if target != "torch.cuda.set_rng_state" or not args:
        return original(target, *args, **kwargs)
    (by,) = args
    return function_replaced(torch.cuda.set_rng_state, lambda _, *given, **named: by(*given, **named))


@contextlib.contextmanager
def _not_watched(**_: Any) -> Iterator[None]:
    """Torch turns anomaly detection on, to note which line of Python an op comes from; provenance does so here."""
    yield

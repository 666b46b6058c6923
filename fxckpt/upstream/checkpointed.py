"""Models that checkpoint activations themselves are captured as if they did not: what to recompute is the plan's part.

Wherever a model took `torch.utils.checkpoint.checkpoint` from, it does its work by one function in the variant without
re-entry, and by a method of a class in the other. These are replaced while a model is traced.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint

from fxckpt.errors import CheckpointingBypassedWarning
from fxckpt.upstream.patching import attribute_replaced, function_replaced
from fxckpt.upstream.versions import checkpoint_generator

_OFF, _OFF_BEFORE = "activation_checkpointing_disable", "gradient_checkpointing_disable"
"""What turns it off in transformers, and what did so before its version 5.23."""


@contextlib.contextmanager
def checkpointing_bypassed() -> Iterator[None]:
    """Let this thread's checkpoints just call their function; warns at the end if there were any."""
    called = False

    def around(*_: Any, **__: Any) -> Iterator[None]:
        """In the variant without re-entry: what runs before and after the function."""
        nonlocal called
        called = True
        yield

    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        """In the other: as in eager, nothing inside gets a gradient unless an input requires one."""
        nonlocal called
        called = True
        with torch.set_grad_enabled(any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)):
            return function(*args)

    with (
        function_replaced(checkpoint_generator(), around),
        attribute_replaced(checkpoint.CheckpointFunction, "apply", staticmethod(apply)),
    ):
        yield
    if called:
        say_bypassed()


def say_bypassed() -> None:
    """Warn that the model's own checkpoints are ignored."""
    model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    off = _OFF if hasattr(model, _OFF) else _OFF_BEFORE
    warnings.warn(
        "the model uses torch.utils.checkpoint. An optimized module ignores it and recomputes what its plan says, with "
        "the same gradients. Turn it off to have less to wonder about, in transformers by "
        f"model.{off}()",
        CheckpointingBypassedWarning,
        stacklevel=2,
    )

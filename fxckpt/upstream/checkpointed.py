"""Models that checkpoint activations themselves are captured as if they did not: what to recompute is the plan's part.

`torch.utils.checkpoint` looks up two names of its module when it is called, one for each of its variants; they are
replaced while a model is traced. So it does not matter where a model took `checkpoint` from.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fxckpt.errors import CheckpointingBypassedWarning


@contextlib.contextmanager
def checkpointing_bypassed() -> Iterator[None]:
    """Let `torch.utils.checkpoint.checkpoint` just call its function; warns at the end if it was called."""
    called = False

    def around(*_: Any, **__: Any) -> Iterator[None]:
        """In the variant without re-entry: what runs before and after the function."""
        nonlocal called
        called = True
        yield

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
            """As in eager, nothing inside gets a gradient unless an input requires one."""
            nonlocal called
            called = True
            with torch.set_grad_enabled(any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)):
                return function(*args)

    with (
        mock.patch("torch.utils.checkpoint._checkpoint_without_reentrant_generator", around),
        mock.patch("torch.utils.checkpoint.CheckpointFunction", Reentrant),
    ):
        yield
    if called:
        say_bypassed()


def say_bypassed() -> None:
    """Warn that the model's own checkpoints are ignored."""
    warnings.warn(
        "the model uses torch.utils.checkpoint. An optimized module ignores it and recomputes what its plan says, with "
        "the same gradients. Turn it off to have less to wonder about, in transformers by "
        "model.gradient_checkpointing_disable()",
        CheckpointingBypassedWarning,
        stacklevel=2,
    )

"""The way of a call: through its plan, or, where that can't be, as the function runs by itself, which it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fxckpt.errors import CaptureError
from fxckpt.module.bypass import Bypasses, reaches, wants_gradients
from fxckpt.module.front import Front
from fxckpt.module.planned_graph import NothingToPlan
from fxckpt.module.planning import Planning
from fxckpt.upstream.dynamo import NotTraced, traced_for_plan
from fxckpt.upstream.ops.expect import UnexpectedValue
from fxckpt.upstream.tracers import tracer_at_work


class Otherwise(Protocol):
    """What serves calls that Dynamo or the joint capture of its graph can't serve."""

    def serves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether such a call was served here before."""

    def call(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result; `reason` is why it is asked for here."""

    def prepare(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
        """Plan for these arguments."""


class Route:
    """A function and its plans.

    Attributes:
        front: plans it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        planning: Planning,
        bypasses: Bypasses,
        otherwise: Otherwise,
    ) -> None:
        self.function = function
        self.front = Front(function, model, planning)
        self._model, self._planning, self._bypasses, self._otherwise = model, planning, bypasses, otherwise
        self._note_compiled = _noting_compiled(bypasses)

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """`call`, as functions are called."""
        return self.call(args, kwargs)

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result, planned if gradients are wanted."""
        if not torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            self._note_compiled()
            return self.function(*args, **kwargs)
        tracer = tracer_at_work()
        if tracer is not None:
            result = self.function(*args, **kwargs)
            if wants_gradients(result):
                self._bypasses.say(f"the module was called under {tracer}", stacklevel=3)
            return result
        return self._planned(args, kwargs)

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Plan for these arguments. Nothing is computed."""
        try:
            self.front.prepare(args, kwargs)
            return
        except NothingToPlan:
            return
        except (NotTraced, CaptureError) as error:
            reason = error
        self._otherwise.prepare(reason, args, kwargs)

    def _planned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        runs = self._planning.runs
        try:
            if self._otherwise.serves(args, kwargs):
                return self._otherwise.call(None, args, kwargs)
            result = self.front.call(args, kwargs)
        except NothingToPlan:
            return self.function(*args, **kwargs)
        except UnexpectedValue:
            return self._plainly(args, kwargs)
        except (NotTraced, CaptureError) as error:
            reason = error
        else:
            if self._planning.runs == runs and wants_gradients(result):
                self._bypasses.say("TorchDynamo made no graph of the call (is it turned off?)", stacklevel=4)
            elif self._planning.options.graph_breaks and reaches(result, self._model.parameters()):
                self._bypasses.say("parts of the model lie outside of all graphs that TorchDynamo made", stacklevel=4)
            return result
        try:
            return self._otherwise.call(reason, args, kwargs)
        except UnexpectedValue:
            return self._plainly(args, kwargs)

    def _plainly(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the function does where one of its checks of values fails: it raises its own error, if any."""
        result = self.function(*args, **kwargs)
        self._bypasses.say("the model's forward found something wrong with values, but raised no error", stacklevel=5)
        return result


def _noting_compiled(bypasses: Bypasses) -> Callable[[], bool]:
    """What is called once, while Dynamo traces the code around. It has no arguments: Dynamo 2.11 takes only constants."""

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note() -> bool:
        if not traced_for_plan():
            bypasses.say("the module was compiled by torch.compile", stacklevel=3)
        return True

    return note

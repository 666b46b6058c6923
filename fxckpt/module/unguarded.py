"""Models that Dynamo can't trace: their forward is called once while autograd and all its ops are traced.

Nothing watches what such a forward reads from Python, so what can be had is looked at at each call: forms of inputs and
parameters, modes, flags, hooks, and the numbers, flags and texts that are attributes of modules.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.capture.front import NewMemoryError
from fxckpt.capture.roles import Arrival
from fxckpt.capture.structure import Structure, take_apart
from fxckpt.core.plans import Plan
from fxckpt.errors import CaptureError, FxckptError, RuntimeContractError, UnguardedCaptureWarning
from fxckpt.module.bypass import Bypasses, wants_gradients
from fxckpt.module.entries import Entries, Entry, Key
from fxckpt.module.planning import Planning
from fxckpt.pipeline import Compiled, profile_step
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents
from fxckpt.upstream import pytree


class Unguarded:
    """Plans and runs the steps of a model that Dynamo can't trace, one plan for each input signature."""

    def __init__(self, plain: nn.Module, planning: Planning, bypasses: Bypasses) -> None:
        self._plain, self._planning, self._bypasses = plain, planning, bypasses
        self._entries = Entries(plain)
        self._lock = threading.Lock()

    def serves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether such a call was planned here before."""
        if not self._entries or self._entries.watch.changed():
            return False
        return self._entries.key(*take_apart((tuple(args), kwargs))) in self._entries

    def call(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The model's forward, planned; `reason` is why it is planned here, if it wasn't before."""
        entry, tensors = self._prepared(reason, args, kwargs)
        if entry is None:
            result = self._plain.forward(*args, **kwargs)
            if wants_gradients(result):
                self._bypasses.say("gradients are wanted of tensors that are neither parameters nor arguments")
            return result
        self._planning.runs += 1
        watch = self._entries.watch
        return entry.run(
            lambda compiled: watch.given(compiled.profile.joint.roles.inputs, tensors),
            functools.partial(self._backward_for, args, kwargs, entry),
        )

    def prepare(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Capture and plan for these arguments."""
        self._prepared(reason, args, kwargs)

    def _prepared(
        self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Entry | None, list[torch.Tensor]]:
        """What is planned for these arguments, None where there is nothing to differentiate; and their tensors."""
        if isinstance(reason, NewMemoryError):
            raise reason
        planned = len(self._entries)
        try:
            tensors, structure = take_apart((tuple(args), kwargs))
            entry = self._entry(tensors, structure, args, kwargs)
        except Exception as error:
            if reason is None or (isinstance(error, FxckptError) and not isinstance(error, CaptureError)):
                raise
            what = str(error) if isinstance(error, CaptureError) else "the model can't be captured as one graph"
            if _has_generator((args, kwargs, [list(vars(m).values()) for m in self._plain.modules()])):
                what = (
                    "the model can't be captured as one graph: it draws from a torch.Generator, which a graph can't "
                    "hold. Draw outside of the model and pass what is drawn, or use torch's default generator"
                )
            raise CaptureError(
                f"{what}. TorchDynamo says: {reason}. With graph_breaks=True it is planned in parts, up to there and "
                "behind"
            ) from error
        if entry is not None and len(self._entries) > planned:
            _say_unguarded(reason)
        return entry, tensors

    def compiled(self) -> list[Compiled]:
        """What was planned so far, a plan for each input signature."""
        return [entry.expected for entry in self._entries]

    def _entry(
        self, tensors: list[torch.Tensor], structure: Structure, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Entry | None:
        self._entries.refresh()
        with contextlib.suppress(KeyError):
            return self._entries[self._entries.key(tensors, structure)]
        with self._lock:
            key = self._entries.key(tensors, structure)
            if key not in self._entries:
                self._entries.add(key, self._make_entry(key, tensors, args, kwargs), tensors)
            return self._entries[self._entries.key(tensors, structure)]

    def _make_entry(
        self, key: Key, tensors: list[torch.Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Entry | None:
        """Capture and plan; None where there is nothing to differentiate."""
        self._entries.watch.check()
        if not any(t.requires_grad for t in (*tensors, *self._plain.parameters())):
            return None
        signature, allocated = key
        entry = self._planning.entry(
            signature,
            self._entries.twin(key),
            lambda: self._profile(args, kwargs, gradients_allocated=allocated),
            self._compile,
            self._runnable,
            gradients_allocated=allocated,
        )
        if entry is not None and self._planning.options.verify:
            other_backward = functools.partial(self._other_backward, args, kwargs)
            self._planning.verify(self._plain, entry, (tuple(args), kwargs), other_backward)
        return entry

    def _profile(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tangents: dict[int, Arrival] | None = None,
        *,
        gradients_allocated: bool,
    ) -> Profile:
        return profile_step(
            self._plain,
            args,
            kwargs,
            self._planning.options,
            forward=self._plain.forward,
            gradients_allocated=gradients_allocated,
            tangents=tangents,
        )

    def _compile(self, profile: Profile, *, other_outputs: bool = False) -> Compiled:
        return self._planning.compile(profile, self._hooked(profile), other_outputs=other_outputs)

    def _runnable(self, profile: Profile, plan: Plan) -> Compiled:
        return self._planning.runnable(profile, plan, self._hooked(profile))

    def _hooked(self, profile: Profile) -> frozenset[int]:
        hooked = self._entries.watch.hooked_parameters()
        inputs = enumerate(profile.joint.roles.inputs)
        return frozenset(n for n, i in inputs if i.gradient is not None and i.path in hooked)

    def _backward_for(
        self, args: Sequence[Any], kwargs: dict[str, Any], entry: Entry, ran: Compiled, present: Tangents
    ) -> Program:
        """A backward from other outputs than the forward that ran was planned for."""
        with self._lock:
            return self._other_backward(args, kwargs, entry, ran, present)

    def _other_backward(
        self, args: Sequence[Any], kwargs: dict[str, Any], entry: Entry, ran: Compiled, present: Tangents
    ) -> Program:
        return entry.continued(ran, present, functools.partial(self._recapture, args, kwargs, entry, ran, present))

    def _recapture(
        self, args: Sequence[Any], kwargs: dict[str, Any], entry: Entry, ran: Compiled, present: Tangents
    ) -> Compiled:
        """Capture and plan the step with backward starting from the tangents `present`."""
        with entry.ambient.restored(), torch.enable_grad():
            if not self._entries.serves(entry, *take_apart((tuple(args), kwargs))):
                raise RuntimeContractError(
                    "backward started from other outputs than expected, and the model was changed since forward (its "
                    "mode, what requires grad, hooks, types). Run forward again, or change the model after backward"
                )
            allocated = entry.gradients_allocated
            profile = self._profile(args, kwargs, ran.numbered(present), gradients_allocated=allocated)
        return self._compile(profile, other_outputs=True)


def _has_generator(value: Any) -> bool:
    return any(isinstance(x, torch.Generator) for x in pytree.tree_leaves(value))


def _say_unguarded(reason: Exception | None) -> None:
    if reason is not None:
        warnings.warn(
            "TorchDynamo's way to capture the model failed, so it was captured by calling its forward once. Beside "
            "tensors, modes and the numbers, flags and texts that are attributes of modules, what forward reads from "
            f"Python stays as it is now, whatever changes. The reason: {reason}",
            UnguardedCaptureWarning,
            stacklevel=5,
        )

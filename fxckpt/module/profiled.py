"""A call's step captured and profiled through Dynamo, without running it: for plans that are only looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.front import Lifted
from fxckpt.capture.structure import put_together, take_apart
from fxckpt.errors import CaptureError
from fxckpt.options import Options
from fxckpt.pipeline import profile_of, profile_step
from fxckpt.profile.build import Profile
from fxckpt.upstream.dynamo import NotTraced, Traced, TracedGraph
from fxckpt.upstream.gpu_choices import capability_of
from fxckpt.upstream.meta import made_present
from fxckpt.upstream.tensors import device_of


class _Profiled(BaseException):
    """Ends a call that was made to profile it: nothing has run."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile


def profile_call(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], options: Options, *, gradients_allocated: bool
) -> Profile:
    """Capture the step that a call of `model` takes, and attach bytes and times to it.

    Nothing is computed. Where parameters or arguments are on the meta device all are described as if on the CPU, or on
    the GPU that is planned for.

    Raises:
        CaptureError: the model can't be captured as one graph, or what Inductor lowers is asked for on a GPU that is
            not there.
    """
    tensors, structure = take_apart((tuple(args), kwargs))
    device = device_of((*model.parameters(), *tensors))
    capability = None if device.type == "cuda" else capability_of(_name(options))
    if capability is not None:
        device = torch.device("meta")  # where no op can be run
        if options.fuses(torch.device("cuda")):
            raise CaptureError(
                f'backend="{options.backend}" plans what Inductor makes of a model for a GPU, which it looks at: plan '
                'where the GPU is, or with backend="python"'
            )
    traced = functools.partial(
        profile_step,
        model,
        args,
        kwargs,
        options,
        forward=model.forward,
        gradients_allocated=gradients_allocated,
        capability=capability,
    )

    def make(graph: TracedGraph) -> Callable[..., Any]:
        lifted = Lifted(graph, model)

        def profile(*inputs: torch.Tensor) -> Any:
            joint = replace(lifted.capture(inputs, lowered=options.fuses), device=device)
            parameters, unused_bytes = model.parameters(), lifted.unused_bytes
            raise _Profiled(
                profile_of(
                    joint,
                    options,
                    parameters,
                    gradients_allocated=gradients_allocated,
                    unused_bytes=unused_bytes,
                    given=lifted.by_node(joint, inputs),
                )
            )

        return profile

    try:
        with made_present(model, tensors, capability) as given:
            some_args, some_kwargs = put_together(structure, iter(given))
            Traced(model.forward, make)(*some_args, **some_kwargs)
    except _Profiled as end:
        return end.profile
    except (NotTraced, CaptureError):
        pass
    return traced()


def _name(options: Options) -> str:
    device = options.device
    return device if isinstance(device, str) else "" if device is None else device.name

"""AOTAutograd: the export of a step's joint graph, and how it describes what goes in and comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config
from torch._functorch._aot_autograd import graph_capture_wrappers
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    ForwardTokenAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.functional_utils import gen_alias_from_base
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.fx.experimental.proxy_tensor import disable_autocast_cache

from fxckpt.upstream.patching import caller, function_replaced, just_yield

__all__ = [
    "BufferAOTInput",
    "ForwardTokenAOTInput",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "OutputType",
    "ParamAOTInput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "backward_replaced",
    "exported",
    "replayed_view",
    "said_to_compile",
]


_SETTINGS: dict[str, Any] = {
    "backward_pass_autocast": "off",
    "guess_tangent_strides_as_outputs": True,  # what later versions do unasked
}


@contextlib.contextmanager
def exported(
    module: nn.Module,
    tensors: Sequence[torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Iterator[tuple[fx.GraphModule, Any]]:
    """The joint graph of a module's forward and backward, and AOTAutograd's metadata of the forward.

    Ops that `decompositions` has are taken apart by it.

    Eager's backward runs outside autocast; and eager casts a weight once however often it is used, where AOTAutograd
    would turn the cache off, and gradients would then be added up in the lower precision.
    """
    with (
        config.patch(_SETTINGS),  # in this thread only
        function_replaced(disable_autocast_cache, just_yield),
        contextlib.ExitStack() as stack,
    ):
        joint = aot_export_joint_with_descriptors(
            stack, module, tuple(tensors), decompositions=dict(decompositions) if decompositions else None
        )
        yield joint.graph_module, joint._aot_state.fw_metadata


@contextlib.contextmanager
def backward_replaced(by: Callable[..., Any]) -> Iterator[None]:
    """AOTAutograd calls `by(grad, outputs, inputs, grad_outputs, **options)` for `grad`, which traces backward."""

    def grad(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if caller().f_code.co_filename != graph_capture_wrappers.__file__:
            return original(*args, **options)
        return by(original, *args, **options)

    with function_replaced(torch.autograd.grad, grad):
        yield


@contextlib.contextmanager
def said_to_compile(*, exporting: bool = False) -> Iterator[None]:
    """A model that asks whether it is being compiled, or exported, is told yes. Models then avoid to read data."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(function_replaced(torch.compiler.is_compiling, _yes))
        if exporting:
            stack.enter_context(function_replaced(torch.compiler.is_exporting, _yes))
        stack.enter_context(function_replaced(torch._check_tensor_all, _unchecked))
        yield


def _yes(_: Callable[[], bool]) -> bool:
    return True


def _unchecked(*_: Any) -> None:
    """Stands for a check of values, which a model that is being compiled makes as a hint to the compiler."""


def replayed_view(base: torch.Tensor, alias: Any, example: torch.Tensor | None) -> torch.Tensor:
    """A view of `base` as an output's `alias` describes it; `example` is a traced tensor of the view's form."""
    return gen_alias_from_base(base, example, alias.requires_grad, alias.view_meta_sequence, replay_views=True)  # type: ignore[arg-type]

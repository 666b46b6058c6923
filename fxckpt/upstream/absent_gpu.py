"""Traced on a machine without a GPU as on one with it: tensors that are said to be on a GPU which is not there.

Fake tensors can be on any device. But autograd asks the devices of what it differentiates for streams, and torch's
composite functions ask the GPU's libraries which kernel to call. So the C++ side is told that such tensors are on the
meta device, which has neither; and Python is told that they are on the GPU: fake tensors, models, and `gpu_choices`,
which stands in the place of the composite functions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from fxckpt.errors import CaptureError
from fxckpt.upstream.gpu_choices import chosen_for, conv_format
from fxckpt.upstream.patching import attribute_replaced, function_replaced

_META = torch.device("meta")
_ASKED_DEVICE = torch.ops.prim.device.default


class _Assumed(threading.local):
    """Whether this thread traces for a GPU that is not there."""

    now = False


_ASSUMED = _Assumed()


@contextlib.contextmanager
def traced_for(device: torch.device, capability: tuple[int, int]) -> Iterator[None]:
    """Fake tensors on this CUDA device, of this compute capability, are traced as tensors on it are, if it is there or
    not.

    Raises:
        CaptureError: under autocast, where it is not there: torch casts what is on a device that is.
    """
    present = torch.cuda.is_available()
    if not present and any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise CaptureError(
            "what autocast does on a GPU can't be found out where there is none. Plan on a machine with a GPU, or "
            "for a model of the lower precision (model.to(torch.bfloat16)) outside of autocast"
        )
    with contextlib.ExitStack() as stack:
        if not present:
            stack.enter_context(_absent(device))
        if not present or torch.cuda.get_device_capability(device) != capability:
            stack.enter_context(chosen_for(capability, lambda x: placed_on(x).type == "cuda"))
        yield


def computed_on(device: str | torch.device) -> str | torch.device:
    """Where numbers are computed that are asked for while tensors on `device` are traced: on the CPU if there is no
    such device.
    """
    kind = torch.device(device).type
    return "cpu" if kind == "meta" or (kind == "cuda" and _ASSUMED.now) else device


@contextlib.contextmanager
def _absent(device: torch.device) -> Iterator[None]:
    with (
        attribute_replaced(FunctionalTensor, "device", property(placed_on)),
        attribute_replaced(FunctionalTensor, "is_cuda", property(lambda x: placed_on(x).type == "cuda")),
        attribute_replaced(torch._C, "_conv_determine_backend_memory_format", conv_format),
        function_replaced(FakeTensorMode._dispatch_impl, _on(device)),
        function_replaced(FakeTensorMode.dispatch, _dispatch),
        _told(FakeTensor),
    ):
        before, _ASSUMED.now = _ASSUMED.now, True
        try:
            yield
        finally:
            _ASSUMED.now = before


def _told_to_autograd(args: tuple[Any, ...]) -> torch.device:
    (x,) = args
    return _META if x.fake_mode.in_kernel_invocation or x.fake_device.type == "cuda" else x.fake_device


def _dispatch(original: Callable[..., Any], mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return _told_to_autograd(args) if op is _ASKED_DEVICE else original(mode, op, types, args, kwargs)


def _told(kind: type[Tensor]) -> contextlib.AbstractContextManager[None]:
    original: Any = kind.__torch_dispatch__

    def dispatch(_: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ASKED_DEVICE:
            return _told_to_autograd(args)
        return original(func, types, args, kwargs)

    return attribute_replaced(kind, "__torch_dispatch__", classmethod(dispatch))


def placed_on(x: Tensor) -> torch.device:
    """Where a traced tensor is said to be."""
    if isinstance(x, FunctionalTensor):
        x = torch._from_functional_tensor(x.elem)
    return x.fake_device if isinstance(x, FakeTensor) else x.device


def _on(device: torch.device) -> Callable[..., Any]:
    """Made on "the same device as that of" a traced tensor, as C++ says, means on the GPU."""

    def described(original: Callable[..., Any], mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") == _META:
            kwargs = {**kwargs, "device": device}
        return original(mode, op, types, args, kwargs)

    return described

"""The kernels that a step calls and the form of their results: as eager torch dispatches them, and as captured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.layer_menu import LayerCase

_SHORT = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.bool: "b8", torch.uint64: "u64",
}  # fmt: skip


def form(x: Any, kind: str) -> str:
    """A tensor's type, shape and strides, and its device where it is not of this kind; "-" for what is no tensor."""
    if not isinstance(x, Tensor):
        return "-"
    shape, strides = ",".join(map(str, x.shape)), ",".join(map(str, x.stride()))
    elsewhere = "" if x.device.type == kind else f"@{x.device.type}"
    return f"{_SHORT.get(x.dtype, str(x.dtype))}[{shape}]({strides}){elsewhere}"


@dataclass(frozen=True)
class Called:
    """An op that was called.

    Attributes:
        op: its name, as "aten.add.Tensor".
        results: their forms, separated by blanks.
        note: "view" of an argument, "copy" in the same form, or "".
        arguments: those that are tensors by their forms, others as they are.
        bytes: of the memory of each result, where it is not as much as its elements take.
    """

    op: str
    results: str
    note: str = ""
    arguments: str = ""
    bytes: str = ""


class Recorder(TorchDispatchMode):
    """Notes what is dispatched below autograd."""

    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Called] = []
        self._kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append(called(func, args, kwargs, results, self._kind))
        return results


def called(func: Any, args: Any, kwargs: Any, results: Any, kind: str) -> Called:
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    flat = list(results) if isinstance(results, (tuple, list)) else [results]
    tensors = [x for y in flat for x in (y if isinstance(y, (tuple, list)) else [y])]
    forms, said = " ".join(form(x, kind) for x in tensors), _said((args, kwargs or {}), kind)
    return Called(str(func), forms, _note(func, given, tensors, kind), said, _bytes(tensors))


def _said(given: Any, kind: str) -> str:
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: form(x, kind), given)
    parts = [*map(_plain, args), *(f"{name}={_plain(x)}" for name, x in kwargs.items())]
    return "; ".join(parts)


def _plain(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return f"[{' '.join(map(_plain, x))}]"
    if isinstance(x, (torch.UntypedStorage, torch.TypedStorage, torch.Generator)):
        return type(x).__name__  # not what it holds
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def _bytes(tensors: list[Any]) -> str:
    sizes = []
    for x in tensors:
        if isinstance(x, Tensor) and x.layout is torch.strided:
            held = x.untyped_storage().nbytes()
            sizes.append("" if held == x.numel() * x.element_size() else str(held))
    return ",".join(sizes) if any(sizes) else ""


def _note(func: Any, given: list[Tensor], results: list[Any], kind: str) -> str:
    if getattr(func, "_schema", None) is None or func._schema.is_mutable:
        return ""
    memory = {x.untyped_storage()._cdata for x in given if x.layout is torch.strided}
    made = [x for x in results if isinstance(x, Tensor)]
    if made and all(x.layout is torch.strided and x.untyped_storage()._cdata in memory for x in made):
        return "view"
    copies = ("aten.clone.default", "aten.copy.default")
    return "copy" if str(func) in copies and form(given[-1], kind) == form(made[0], kind) else ""


def in_eager(case: LayerCase, device: torch.device) -> list[Called]:
    """What a step of the case dispatches on a device; on fake tensors if a mode for them is active."""
    with torch.device(device):
        model, inputs = case.made()
    recorder = Recorder(device.type)
    with recorder:
        with case.called(device.type):
            loss = model(*inputs)
        loss.backward()
    return recorder.calls


def captured(case: LayerCase, device: torch.device) -> list[Called]:
    """The ops of the joint graph that fxckpt captures of it."""
    from fxckpt.capture.joint import capture  # what is recorded does not need it

    with torch.device(device):
        model, inputs = case.made()
    with case.called(device.type):
        joint = capture(model, inputs)
    return list(_of_graph(joint.module.graph, device.type))


def captured_for_gpu(case: LayerCase, capability: tuple[int, int]) -> list[Called]:
    """The ops of the joint graph that fxckpt captures for a GPU, which need not be there."""
    from fxckpt.capture.joint import capture

    with torch.device("meta"):
        model, inputs = case.made()
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", case.autocast is not None)  # torch.autocast does not where there is no GPU
    torch.set_autocast_dtype("cuda", case.autocast or before[1])
    try:
        with case.around():
            joint = capture(model, inputs, capability=capability)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    return list(_of_graph(joint.module.graph, "cuda"))


def _of_graph(graph: torch.fx.Graph, kind: str) -> Iterator[Called]:
    for node in graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            yield called(node.target, args, kwargs, node.meta.get("val"), kind)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

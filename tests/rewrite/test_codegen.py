"""Emitted code: calls through torch's Python bindings reach the ops that stand in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxckpt.rewrite.backends.python.codegen import DIRECT

X, Y, V = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "addmm": (V, X, Y),
    "bmm": (X[None], Y[None]),
    "convolution": (X[None, None], Y[None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "expand": (V, [3, 4]),
    "native_layer_norm": (X, [4], V, V, 1e-5),
    "permute": (X, [1, 0]),
    "select": (X, 0, 1),
    "sum": (X, [0], True),
    "transpose": (X, 0, 1),
    "unsqueeze": (X, 0),
    "view": (X, [2, 8]),
}
BINARY = ("add", "div", "mm", "mul", "sub")


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overload", [overload for overload, by in DIRECT.items() if isinstance(by, str)])
def test_a_direct_call_dispatches_to_the_op_of_the_graph(overload: str) -> None:
    _, name, variant = overload.split(".")
    args = ARGUMENTS.get(name, (X, Y) if name in BINARY else (X.clone(),))
    kwargs = {"out": torch.empty(4, 4)} if variant == "out" else {}
    function: Any = torch
    for attribute in str(DIRECT[overload]).split(".")[1:]:
        function = getattr(function, attribute)
    with Recorder() as recorder:
        function(*args, **kwargs)
    (call,) = recorder.calls
    assert call[0] is getattr(getattr(torch.ops.aten, name), variant)


@pytest.mark.parametrize("overload", ["add.Tensor", "div.Tensor", "mul.Tensor", "sub.Tensor"])
def test_a_number_as_operand_dispatches_to_the_same_op(overload: str) -> None:
    name, _, variant = overload.partition(".")
    with Recorder() as recorder:
        getattr(torch, name)(X, 0.5)
    assert [call[0] for call in recorder.calls] == [getattr(getattr(torch.ops.aten, name), variant)]

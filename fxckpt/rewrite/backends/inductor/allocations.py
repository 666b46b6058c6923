"""What compiled code takes of memory, read off the code itself.

Inductor's code is Python that allocates buffers, calls kernels that write them, and deletes names. Walking it tells the
bytes in use at each line, and so whether what was compiled is what was planned, whatever was fused.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import tensors

_ALIASES = ("reinterpret_tensor", "alias")


def most_bytes(
    source: str, given_bytes: Sequence[int], module: fx.GraphModule, workspaces_bytes: Mapping[str, int] | None = None
) -> int:
    """The most bytes in use at any line of compiled code, beyond what is in use when it is called [B].

    Args:
        source: the code.
        given_bytes: for each input what is freed when the code lets go of it: 0 for what others hold, too [B].
        module: what was compiled; it tells the types of what libraries return.
        workspaces_bytes: what ops take while they run, by the name that a library has for them [B].
    """
    walk = _Walk(given_bytes, _Forms(module), workspaces_bytes or {})
    walk.block(_function(source).body)
    return walk.most_bytes


def _function(source: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "call")


class _Forms:
    """Sizes of elements of what ops return, by op and shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._bytes: dict[tuple[str, tuple[int, ...]], int] = {}
        self._largest = 1
        for node in module.graph.nodes:
            for tensor in tensors(node):
                if node.op == "call_function":
                    self._bytes[f"torch.ops.{node.target}", tuple(tensor.shape)] = tensor.element_size()
                self._largest = max(self._largest, tensor.element_size())

    def element_bytes(self, op: str, shape: tuple[int, ...]) -> int:
        """Bytes of an element of an op's result of this shape; of the largest there is, if the op is another [B]."""
        return self._bytes.get((op, shape), self._largest)


class _Walk:
    """Names, the memory that they stand for, and how much of it there is."""

    def __init__(self, given_bytes: Sequence[int], forms: _Forms, workspaces_bytes: Mapping[str, int]) -> None:
        self._given_bytes, self._forms, self._workspaces_bytes = given_bytes, forms, workspaces_bytes
        self._workspace = 0  # of the library that is being called
        self._memory: dict[str, int] = {}  # name -> number of a piece of memory
        self._bytes: list[int] = []
        self._names: list[int] = []  # how many names each piece has
        self._present = 0
        self.most_bytes = 0

    def block(self, statements: Sequence[ast.stmt]) -> None:
        """Walk statements in order."""
        for statement in statements:
            if isinstance(statement, ast.Assign):
                self._assign(statement.targets[0], statement.value)
            elif isinstance(statement, ast.Delete):
                for target in statement.targets:
                    self._forget(getattr(target, "id", ""))
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                self._assert(statement.value)
            else:
                self.block(getattr(statement, "body", ()))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, ast.Name) and value.id == "args":
                for name, given_bytes in zip(_names(target), self._given_bytes, strict=True):
                    self._new(name, given_bytes, counted=False)
            return
        if not isinstance(target, ast.Name):
            return
        if isinstance(value, ast.Name):
            self._alias(target.id, value.id)
        elif isinstance(value, ast.Call):
            called = _called(value)
            self._calls(called)
            if called.startswith("empty_strided"):
                self._new(target.id, _allocated_bytes(value))
            elif called.split(".")[-1] in _ALIASES and isinstance(value.args[0], ast.Name):
                self._alias(target.id, value.args[0].id)

    def _assert(self, call: ast.Call) -> None:
        """Code asserts the form of what libraries return: that is where it is allocated."""
        self._calls(_called(call))
        if _called(call) != "assert_size_stride" or not isinstance(call.args[0], ast.Name):
            return
        name = call.args[0].id
        if name in self._memory or len(call.args) < 3:
            return
        shape, stride = _integers(call.args[1]), _integers(call.args[2])
        op = ast.literal_eval(call.args[3]) if len(call.args) > 3 else ""
        self._new(name, _extent(shape, stride) * self._forms.element_bytes(op, shape))

    def _calls(self, called: str) -> None:
        """A library is called, which takes memory of its own, beside what it returns."""
        if called == "assert_size_stride":
            return
        name = called.removesuffix(".default").split(".")[-1]
        self._workspace = self._workspaces_bytes.get(name, 0)
        self.most_bytes = max(self.most_bytes, self._present + self._workspace)

    def _new(self, name: str, size_bytes: int, *, counted: bool = True) -> None:
        self._forget(name)
        self._memory[name] = len(self._bytes)
        self._bytes.append(size_bytes)
        self._names.append(1)
        if counted:
            self._present += size_bytes
            self.most_bytes = max(self.most_bytes, self._present + self._workspace)

    def _alias(self, name: str, other: str) -> None:
        if other in self._memory:
            piece = self._memory[other]
            self._names[piece] += 1
            self._forget(name)
            self._memory[name] = piece

    def _forget(self, name: str) -> None:
        piece = self._memory.pop(name, None)
        if piece is None:
            return
        self._names[piece] -= 1
        if not self._names[piece]:
            self._present -= self._bytes[piece]


def _names(target: ast.Tuple | ast.List) -> Iterator[str]:
    for element in target.elts:
        yield getattr(element, "id", "")


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _allocated_bytes(call: ast.Call) -> int:
    shape, stride = _integers(call.args[0]), _integers(call.args[1])
    dtype: Any = getattr(torch, ast.unparse(call.args[2]).removeprefix("torch."))
    return _extent(shape, stride) * int(dtype.itemsize)


def _integers(node: ast.expr) -> tuple[int, ...]:
    return tuple(ast.literal_eval(node))


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements a strided tensor spans."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))

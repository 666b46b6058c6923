"""Torch's private interfaces are used in `fxckpt/upstream` alone; from there only public names are taken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxckpt

ROOT = Path(fxckpt.__file__).parent
OUTSIDE = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "upstream")

WATCHED = ("torch", "fxckpt.upstream")
"""Whose private names are looked for."""

OF_TORCH = frozenset(
    {
        "_aot_state",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_base",
        "_body_transformer",
        "_buffers",
        "_call_impl",
        "_cdata",
        "_dispatch_cache",
        "_execution_engine",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_func_name",
        "_is_view",
        "_modules",
        "_non_persistent_buffers_set",
        "_op",
        "_overload_names",
        "_parameters",
        "_post_accumulate_grad_hooks",
        "_schema",
        "_state_dict_hooks",
        "_version",
        "_view_func",
        "py_kernels",
    }
)
"""Attributes that torch's tensors, modules, operators and graphs keep to themselves, whatever they are called on."""

_PRIVATE_PATH = re.compile(r"\btorch(\.\w+)*\._\w")


def private_uses(source: str) -> list[tuple[int, str]]:
    """Lines of a module and what is private there: imports, attributes, and names in strings."""
    tree = ast.parse(source)
    known = dict(_imported(tree))
    for node in ast.walk(tree):  # names for parts of torch, such as `aten = torch.ops.aten`
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            path = _path(node.value, known)
            if path is not None:
                known[node.targets[0].id] = path
    found = {(node.lineno, use) for node in ast.walk(tree) for use in _uses(node, known) if isinstance(node, _PLACED)}
    return sorted(found)


_PLACED = (ast.expr, ast.stmt)


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names in a module, and the dotted paths that they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname or alias.name.split(".")[0]),
                    (alias.name if alias.asname else alias.name.split(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name), f"{node.module}.{alias.name}"


def _path(node: ast.expr, known: dict[str, str]) -> str | None:
    """The dotted path that an expression stands for, if it is one that begins with something imported."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _path(node.value, known)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _uses(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_private(alias.name))
    elif isinstance(node, ast.ImportFrom):
        yield from (path for alias in node.names if _is_private(path := f"{node.module}.{alias.name}"))
    elif isinstance(node, ast.Attribute):
        whole = _path(node, known)
        if whole is not None and _is_private(whole):
            yield whole
        elif node.attr in OF_TORCH:
            yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _names_private(node.value):
        yield repr(node.value)


def _names_private(text: str) -> bool:
    return text in OF_TORCH or _PRIVATE_PATH.search(text) is not None


def _is_private(path: str) -> bool:
    """Whether a dotted path leads through something private of what is watched, or to patches for all threads."""
    if path.startswith("unittest.mock"):
        return True
    watched = any(path == name or path.startswith(f"{name}.") for name in WATCHED)
    return watched and any(re.match(r"_(?!_)", part) for part in path.split("."))


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_of_torch_is_used_outside_of_upstream(path: Path) -> None:
    assert not private_uses(path.read_text())


FORBIDDEN = {
    "import torch._C": "torch._C",
    "import torch._dynamo as dynamo": "torch._dynamo",
    "from torch._ops import OpOverload": "torch._ops.OpOverload",
    "from torch.utils import _pytree as pytree": "torch.utils._pytree",
    "from torch import _C": "torch._C",
    "from unittest import mock": "unittest.mock",
    "import unittest.mock": "unittest.mock",
    "from unittest.mock import patch": "unittest.mock.patch",
    "import torch\ntorch._neg_view(x)": "torch._neg_view",
    "import torch as t\ndef f():\n    with t._C._DisableAutocast(): pass": "torch._C._DisableAutocast",
    "from torch import fx\nfx.node._side_effectful_functions": "torch.fx.node._side_effectful_functions",
    "from torch.nn import functional as F\nF._threshold(x)": "torch.nn.functional._threshold",
    "import torch\naten = torch.ops.aten\naten._unsafe_view.default": "torch.ops.aten._unsafe_view",
    "import torch\ndef f():\n    ops = torch.ops\n    return ops.aten._foreach_add": "torch.ops.aten._foreach_add",
    "x.untyped_storage()._cdata": "_cdata",
    "for m in modules: m._parameters.clear()": "_parameters",
    "getattr(module, '_forward_hooks')": "'_forward_hooks'",
    "patch('torch.utils.checkpoint._checkpoint')": "'torch.utils.checkpoint._checkpoint'",
    "from fxckpt.upstream.strides import _first": "fxckpt.upstream.strides._first",
    "from fxckpt.upstream import strides\nstrides._first": "fxckpt.upstream.strides._first",
}


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_is_private_is_found(source: str) -> None:
    assert FORBIDDEN[source] in [use for _, use in private_uses(source)]


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations",
        "import torch\ntorch.autograd.grad(x)",
        "class A:\n    def __torch_function__(self): return self._values",
        "from fxckpt.upstream import pytree\npytree.tree_leaves(x)",
        "name = '_c10d_functional'",
        "self.writer._values[node]",
        "import torchvision._internally",
    ],
)
def test_what_is_not_private_is_left_alone(source: str) -> None:
    assert not private_uses(source)


def test_modules_are_looked_at() -> None:
    assert len(OUTSIDE) > 80
    assert {path.relative_to(ROOT).parts[0] for path in OUTSIDE} >= {"capture", "profile", "rewrite", "runtime", "core"}

"""The shape of the package: what may import what, how long a module may be, and what a text may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxckpt

ROOT = Path(fxckpt.__file__).parent
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))
CORE = ("errors", "units", "graph", "schedule", "simulate", "plans", "solvers", "report")
"""What runs without torch."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "units": ("errors",),
    "graph": ("errors", "units"),
    "schedule": ("graph", "errors", "units"),
    "simulate": ("schedule", "graph", "errors", "units"),
    "solvers": ("simulate", "schedule", "graph", "errors", "units"),
    "plans": ("report", "simulate", "schedule", "graph", "errors", "units"),  # report: see the test below
    "report": ("plans", "solvers", "simulate", "schedule", "graph", "errors", "units"),
}
"""What the modules of the core may import, and from which folders; its own folder is always allowed."""

STEPS = ("rewrite", "profile", "capture", "memory")
TORCH_SIDE: dict[str, tuple[str, ...]] = {
    "memory": (),
    "capture": (),
    "profile": ("capture", "memory"),
    "rewrite": ("profile", "capture"),
    "runtime": STEPS,
    "measurement": ("memory", "capture"),
    "comparison": ("measurement", "profile"),
    "signature": ("capture",),
    "options": ("profile",),
    "compile": ("options", "runtime", *STEPS, "report"),
    "diagnosis": ("compile", "runtime", *STEPS),
    "equivalence": ("diagnosis", "compile", "signature", "runtime", *STEPS),
    "optimized": ("options", "equivalence", "compile", "signature", "runtime", *STEPS),
    "batch": ("report",),
    "api": (
        "arguments",
        "batch",
        "comparison",
        "options",
        "measurement",
        "optimized",
        "compile",
        "signature",
        "runtime",
        *STEPS,
        "report",
    ),
    "__init__": ("api", "report", "memory"),
    "demo": ("__init__", "api", "report", "memory"),
    "arguments": (),
    "cli": ("__init__", "api", "arguments", "demo", "options", "report", "memory"),
    "__main__": ("cli",),
}
"""The same for the others, which may import the core too (but the report only where it says so)."""


def part(module: Path) -> str:
    """The folder or top-level module that a file belongs to."""
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[str]:
    """The parts of the package that a module imports, also inside functions."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [node.module or ""]
            if node.module == "fxckpt":
                names = [f"fxckpt.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fxckpt":
                rest = name.split(".")[1:]
                known = rest and any(part(m) == rest[0] for m in MODULES)
                yield rest[0] if known else "__init__"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    own = part(module)
    core = tuple(name for name in CORE if name != "report")
    allowed = MAY_IMPORT[own] if own in MAY_IMPORT else (*TORCH_SIDE[own], *core)
    wrong = set(imports(module)) - set(allowed) - {own}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_plans_import_the_report_only_when_a_picture_is_asked_for() -> None:
    top = ast.parse((ROOT / "plans.py").read_text()).body
    modules = [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if name.startswith("fxckpt.core.report")]


BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} is absent here")

sys.meta_path.insert(0, Absent())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "torch" not in sys.modules
"""


def test_the_core_works_without_torch() -> None:
    names = [".".join(("fxckpt", *m.with_suffix("").parts)) for m in MODULES if part(m) in CORE]
    names = [name.removesuffix(".__init__") for name in names]
    assert len(names) > 20
    done = subprocess.run([sys.executable, "-c", BLOCKER, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_lazy() -> None:
    code = "import sys, fxckpt; assert 'torch' not in sys.modules; fxckpt.optimize; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_facade_is_small_and_complete() -> None:
    assert len(fxckpt.__all__) <= 13
    assert {"optimize", "plan", "print_plan", "measure", "Plan"} <= set(fxckpt.__all__)
    for name in fxckpt.__all__:
        assert getattr(fxckpt, name).__doc__


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_holds_one_idea(module: Path) -> None:
    text = (ROOT / module).read_text()
    assert len(text.splitlines()) <= 400
    assert module.stem not in ("utils", "util", "helpers", "common", "misc")
    assert ast.get_docstring(ast.parse(text)), f"{module} does not say what it is"


SOURCES = sorted(p for suffix in ("*.py", "*.md") for p in ROOT.rglob(suffix))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_names_a_place_on_one_machine(path: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|work|root|tmp|opt|Users|mnt)/[\w./-]*", path.read_text())
    assert not found


def test_every_bare_except_and_print_is_gone() -> None:
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), module
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not is_print or part(module) in ("report", "cli", "demo", "api"), f"{module} prints"


@pytest.mark.parametrize("first", ["fxckpt.core.plans", "fxckpt.api", "fxckpt.core.solvers", "fxckpt.cli.main"])
def test_public_functions_are_functions_whatever_was_imported_before(first: str) -> None:
    code = f"import {first}, fxckpt; assert all(callable(getattr(fxckpt, name)) for name in fxckpt.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "solvers"], ids=str)
def test_the_code_map_names_every_module(module: Path) -> None:
    text = (ROOT / "README.md").read_text()
    assert module.stem == "__init__" or f"`{module.stem}`" in text or f"`{module.name}`" in text

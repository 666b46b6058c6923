"""The shape of the package: what may import what, how long a module may be, and what a text may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxckpt
from tests.support.absent import run_without

ROOT = Path(fxckpt.__file__).parent
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))

CORE = (
    *(
        "fields",
        "ops",
        "arrays",
        "graph",
        "schedule",
        "lifetimes",
        "engines",
        "simulate",
        "caching_allocator",
        "replay",
        "outside",
        "solvers",
        "fitting",
        "decisions",
        "report",
    ),
    *("plans", "pareto", "advice", "batch", "shares"),
)
"""The rooms of `core/`, each of which may import those before it."""

SOLVERS = (
    "keep",
    "segments",
    "mincut",
    "baselines",
    "search",
    "chain",
    "exact",
    "auto",
    "min_memory",
    "registry",
    "solve",
    "",
)
"""The same within `core/solvers/`; "" is its `__init__`."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "units": (),
    "calls": (),
    "core": (),
    "upstream": (),
    "capture": ("upstream",),
    "profile": ("capture", "upstream", "core"),
    "rewrite": ("profile", "capture", "upstream", "core"),
    "runtime": ("rewrite", "capture", "upstream"),
    "options": ("profile", "core"),
    "pipeline": ("options", "runtime", "rewrite", "profile", "capture", "upstream", "core"),
    "steps": ("pipeline", "runtime", "rewrite", "profile", "capture", "upstream", "core"),
    "module": ("steps", "pipeline", "options", "runtime", "profile", "capture", "upstream", "core"),
    "api": ("module", "steps", "pipeline", "options", "calls", "profile", "capture", "core"),
    "integrations": ("api", "module", "options", "upstream"),
    "cli": ("", "api", "options", "calls", "core"),
    "": ("api", "core"),
    "__main__": ("cli",),
}
"""What each part of the package may import beside itself, `errors` and `units`; "" is the package's own `__init__`."""


def name_of(module: Path) -> str:
    """A module's dotted name within the package."""
    return ".".join(module.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


NAMES = {name_of(module) for module in MODULES}


def part(name: str) -> str:
    """The folder or top-level module that a module belongs to."""
    return name.split(".")[0]


def imports(module: Path) -> Iterator[str]:
    """The modules of the package that a module imports, also inside functions and for types only."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fxckpt":
                parts = name.split(".")[1:]
                known = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
                yield next(candidate for candidate in known if candidate in NAMES)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    own = part(name_of(module))
    wrong = {part(name) for name in imports(module)} - {own, "errors", "units", *MAY_IMPORT[own]}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize(("folder", "order"), [("core", CORE), ("core.solvers", SOLVERS)])
def test_rooms_of_the_core_import_those_before_them(folder: str, order: tuple[str, ...]) -> None:
    depth = folder.count(".") + 1

    def room(name: str) -> str:
        return (name.split(".")[depth:] or [""])[0]

    inside = [m for m in MODULES if f"{name_of(m)}.".startswith(f"{folder}.") and (depth > 1 or name_of(m) != folder)]
    for module in inside:
        own = order.index(room(name_of(module)))
        found = {room(name) for name in imports(module) if f"{name}.".startswith(f"{folder}.")}
        wrong = [name for name in found if order.index(name) > own]
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_no_imports_go_in_a_circle() -> None:
    graph = nx.DiGraph((name_of(m), name) for m in MODULES for name in imports(m) if name_of(m) != name)
    assert graph.number_of_edges() > 300
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
    parts = nx.DiGraph((part(a), part(b)) for a, b in graph.edges if part(a) != part(b))
    assert nx.is_directed_acyclic_graph(parts.subgraph(set(parts) - {""}))  # the facade imports on first use


def test_the_core_imports_no_torch() -> None:
    for module in MODULES:
        if part(name_of(module)) in ("core", "errors", "units", "calls"):
            for node in ast.walk(ast.parse((ROOT / module).read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], module


IMPORT_EACH = """
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "torch" not in sys.modules
"""


def test_the_core_works_without_torch() -> None:
    names = [
        f"fxckpt.{name}" for name in sorted(NAMES) if part(name) in ("core", "errors", "units", "calls", "options")
    ]
    assert len(names) > 40
    run_without(("torch", "transformers"), IMPORT_EACH, *names)


def test_importing_the_package_is_lazy() -> None:
    code = "import sys, fxckpt; assert 'torch' not in sys.modules; fxckpt.optimize; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_facade_is_small_and_complete() -> None:
    exceptions = {name for name in fxckpt.__all__ if name.endswith(("Error", "Warning"))}
    assert len(set(fxckpt.__all__) - exceptions) <= 12
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
            assert not is_print or part(name_of(module)) in ("cli", "api"), f"{module} prints"


@pytest.mark.parametrize("first", ["fxckpt.core.plans", "fxckpt.api", "fxckpt.core.solvers", "fxckpt.cli.main"])
def test_public_functions_are_functions_whatever_was_imported_before(first: str) -> None:
    code = f"import {first}, fxckpt; assert all(callable(getattr(fxckpt, name)) for name in fxckpt.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_code_map_names_every_module(module: Path) -> None:
    text = (ROOT / "README.md").read_text()
    assert module.stem == "__init__" or f"`{module.stem}`" in text or f"`{module.name}`" in text


def test_the_code_map_names_no_module_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| place |") : text.index("Imports run one way")]
    named = set(re.findall(r"`([a-z_]+)(?:/|\.py)?`", table))
    there = {m.stem for m in MODULES} | {folder for m in MODULES for folder in m.parts[:-1]}
    assert not named - there - NO_MODULES


NO_MODULES = {"optimize", "plan", "print_plan", "graphs", "measure", "solve"}
"""Functions that the code map's table names."""

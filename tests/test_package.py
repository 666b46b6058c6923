"""What an installed package says of itself: version, licence, types, and its exceptions in one place."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import fxckpt
from fxckpt import errors
from tests.support.absent import run_without

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "fxckpt").rglob("*.py"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


READ_VERSION = """
from setuptools.config.expand import read_attr

print(read_attr(sys.argv[1], root_dir=sys.argv[2]))
"""


def test_the_version_is_written_once_and_read_without_importing_anything() -> None:
    data = project()
    assert "version" not in data["project"]
    assert data["project"]["dynamic"] == ["version"]
    attribute = data["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert run_without(("torch", "fxckpt"), READ_VERSION, attribute, str(ROOT)).strip() == fxckpt.__version__


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## [{fxckpt.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_the_one_declared() -> None:
    data = project()["project"]
    assert data["license"] == "Apache-2.0"
    (name,) = data["license-files"]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.match(r"\s+Apache License\s+Version 2\.0, January 2004\s", text)
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "limitations under the License." in text


def test_types_are_part_of_the_package() -> None:
    assert files("fxckpt").joinpath("py.typed").is_file()
    assert "py.typed" in project()["tool"]["setuptools"]["package-data"]["fxckpt"]


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def named(path: Path) -> set[str]:
    """The exceptions and warnings that a page, or the docstrings of a module, name; without Python's own."""
    text = "\n".join(docstrings(path)) if path.suffix == ".py" else path.read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w.])[A-Z]\w*(?:Error|Warning)\b", text))
    return {name for name in found if not hasattr(builtins, name)}


@pytest.mark.parametrize("path", [*TEXTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_exception_that_is_named_comes_from_the_package_itself(path: Path) -> None:
    assert named(path) <= set(fxckpt.__all__)


def test_exceptions_are_named_somewhere() -> None:
    assert {"BudgetError", "CaptureError", "PlanMismatchError"} <= {name for path in SOURCES for name in named(path)}


@pytest.mark.parametrize("name", errors.__all__)
def test_each_exception_is_the_same_in_the_package(name: str) -> None:
    assert name in fxckpt.__all__
    assert name in dir(fxckpt)
    assert getattr(fxckpt, name) is getattr(errors, name)


def test_exceptions_come_without_torch_and_only_when_asked_for() -> None:
    code = (
        "import sys, fxckpt; assert 'fxckpt.errors' not in sys.modules; "
        "fxckpt.CaptureError; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_what_the_package_hands_out() -> None:
    """Names are imported when they are first used, so they stand twice: here they are the same."""
    tree = ast.parse(Path(fxckpt.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {a.name for node in typed.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported == set(fxckpt.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fxckpt.nothing  # noqa: B018

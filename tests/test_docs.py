"""Pages point at what is there: links, files, modules, commands, solvers, their options, scripts, their results."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest

from fxckpt.cli.main import _parser
from fxckpt.core.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "fxckpt/README.md")),
    BENCHMARKS / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_are_relative_and_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        assert not name.startswith("/"), target
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


@each_page
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:benchmarks|docs|examples|tests|\.ci)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_modules_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b((?:benchmarks|tests)(?:\.[a-z_]\w*)+)\b(?!/)", text):
        if not name.endswith((".txt", ".md", ".json")):
            assert find_spec(name), name


def shell_commands() -> Iterator[list[str]]:
    """Calls of fxckpt's command line in the blocks of all pages."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                _, is_call, arguments = line.partition("python -m fxckpt ")
                if is_call:
                    yield shlex.split(arguments)


@pytest.mark.parametrize("arguments", list(shell_commands()), ids=" ".join)
def test_commands_are_understood(arguments: list[str]) -> None:
    assert callable(_parser().parse_args(arguments).command)


def test_each_command_of_the_command_line_is_shown() -> None:
    assert {arguments[0] for arguments in shell_commands()} == {"demo", "plan", "bench", "explain"}


def test_each_example_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert [
        path.name for path in sorted((ROOT / "examples").glob("*.py")) if f"| [`examples/{path.name}`]" not in guide
    ] == []


# Solvers


def solver_sections() -> dict[str, str]:
    parts = re.split(r"^## `(\w+)`$", (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_solver_has_a_section() -> None:
    assert set(solver_sections()) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_section_names_the_options_and_the_source(name: str) -> None:
    function, section = SOLVERS[name].function, solver_sections()[name]
    options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        assert f"`{option}`" in section
    assert options or "*Options.* None." in section
    docstring = importlib.import_module(function.__module__).__doc__ or ""
    for paper in re.findall(r"arXiv:[\d.]+\d|hal-\d+", docstring):
        assert paper in section


# Benchmarks


def scripts() -> list[str]:
    """The modules in benchmarks/ that can be run, and the folders."""
    paths = {path.stem: path for path in BENCHMARKS.glob("*.py")}
    paths |= {path.parent.name: path for path in BENCHMARKS.glob("*/__main__.py")}
    return sorted(n for n, p in paths.items() if '\nif __name__ == "__main__":\n' in p.read_text(encoding="utf-8"))


def rows() -> dict[str, list[str]]:
    """The table in benchmarks/README.md: the cells behind each script."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


def test_each_script_says_what_it_asks_and_writes_and_how_long_it_takes() -> None:
    assert sorted(rows()) == scripts()
    for cells in rows().values():
        question, _, takes = cells
        assert "?" in question
        assert re.search(r"\b(?:second|minute|hour)", takes)


@pytest.mark.parametrize("script", scripts())
def test_what_a_script_writes_is_there(script: str) -> None:
    """`results/x.json`, `.md` means `x.json` and `x.md`; a word in capitals stands for a name."""
    stem = ""
    written = [
        name for name in re.findall(r"`([\w./]+)`", rows()[script][1]) if name.startswith((".", "results/", "graphs/"))
    ]
    assert written
    if script == "gpu" and not (BENCHMARKS / "results" / "gpu").exists():
        pytest.skip("it has not run on a GPU yet")
    for name in written:
        stem = stem if name.startswith(".") else name.rpartition(".")[0]
        pattern = stem + name if name.startswith(".") else name
        assert list(BENCHMARKS.glob(re.sub("[A-Z]+", "*", pattern))), pattern


def test_every_result_is_written_by_a_script_that_is_named() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    known = {name.partition("_MODEL")[0] for name in re.findall(r"results/(\w+)[./]", text)}
    found = {path.stem for path in (BENCHMARKS / "results").iterdir()}
    assert {name for name in found if name not in known and not name.startswith("frontier_")} == set()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_docstrings_of_benchmarks_name_what_is_there(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert docstring
    for name in re.findall(r"\b(?:benchmarks|tests|fxckpt)(?:/\w+)+\.\w+", docstring):
        assert (ROOT / name).exists() or re.search("[A-Z]|results", name), name
    for name in re.findall(r"(?<![\w./])(?:benchmarks|tests|fxckpt)(?:\.[a-z_]\w*)+", docstring):
        assert resolve_name(name) is not None


# Continuous integration


def test_what_continuous_integration_names_is_there() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named = set(re.findall(r"\btests/[\w/.]+\w", script))
    assert {"tests/constraints.txt", "tests/core"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_floor_of_coverage_is_the_one_that_is_told() -> None:
    coverage = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["coverage"]
    assert [(ROOT / source).is_dir() for source in coverage["run"]["source"]] == [True]
    floor = f"floor of {coverage['report']['fail_under']} %"
    assert floor in " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())

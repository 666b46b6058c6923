"""The page of what works, written by the tests that prove it: `python -m tests.what_works`.

A test says by `@pytest.mark.works(row, text)` which row it belongs to, and what it shows; its name says that where no
text is given. Several texts are several things shown.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "what_works.md"
BEGIN, END = "<!-- written by python -m tests.what_works -->", "<!-- end -->"

ROWS: dict[str, str] = {
    "training loops": "",
    "gradients as eager gives them": "",
    "layers and ops": "",
    "inputs, outputs, state": "",
    "precision": "",
    "fused attention": "",
    "transformers": "more in `benchmarks/results/architectures.md`, with the reason where one does not",
    "errors": "",
    "`verify=True`": "",
    "the graph is the model, or it says so": "",
    "threads, processes, interrupts": "",
    "anything else": "",
}
"""The rows, and what is added to them by hand."""


def shown() -> dict[str, dict[str, list[str]]]:
    """For each row what its tests show: by file, in the order of lines."""
    found: dict[str, dict[str, list[str]]] = {row: {} for row in ROWS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT)
        if "integrations" in name.parts:  # they can't be imported where the other packages are missing
            continue
        for row, texts in _marks(".".join(name.with_suffix("").parts)):
            found[row].setdefault(name.as_posix(), []).extend(texts)
    return found


def _marks(module: str) -> Iterator[tuple[str, list[str]]]:
    for name, function in vars(importlib.import_module(module)).items():
        for mark in getattr(function, "pytestmark", ()):
            if name.startswith("test_") and mark.name == "works":
                row, *texts = mark.args
                yield row, texts or [name.removeprefix("test_").replace("_", " ")]


def sections() -> str:
    """A section a row, in markdown."""
    notes = {**ROWS, "anything else": _of_the_long_runs()}
    return "\n\n".join(_section(row, by_file, notes[row]) for row, by_file in shown().items())


def _section(row: str, by_file: dict[str, list[str]], note: str) -> str:
    heading = f"## {row[0].upper()}{row[1:]}"
    items = [f"- {text}" for texts in by_file.values() for text in texts]
    files = ", ".join(f"[`{name}`](../{name})" for name in by_file)
    return "\n".join((heading, "", *items, *filter(None, [note and f"- {note}"]), "", f"Shown by {files}."))


def _of_the_long_runs() -> str:
    """What `python -m tests.fuzz --out` has written."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text(encoding="utf-8"))
    examples, failures = (sum(run[name] for run in runs) for name in ("examples", "failures"))
    noun = "failure" if failures == 1 else "failures"
    found = f"{failures} {noun}, repaired and each a test since" if failures else "no failure"
    return f"{examples:,} of them in long runs with {found} (`benchmarks/results/fuzz.json`)"


def with_sections(page: str) -> str:
    """The page with the sections in their place."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{sections()}\n\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_sections(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

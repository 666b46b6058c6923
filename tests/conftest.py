"""Fixtures and options of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, each in a thread of its own
os.environ["FXCKPT_CACHE_DIR"] = ""  # measured costs are kept by tests that are about that, in folders of their own

# How long an example takes depends on who else runs here. A failure prints the line that repeats it.
hypothesis.settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tests")

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing")


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchDynamo can trace no model, so all are captured by calling their forward once: it warns of that."""
    from fxckpt.upstream.dynamo import NotTraced, Traced

    def give_up(*_: Any, **__: Any) -> Any:
        raise NotTraced("it is turned off", "")

    monkeypatch.setattr(Traced, "__call__", give_up)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with `tests/golden/NAME.txt`, or write that file with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest with --update-golden, and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return compare

"""These tests are read only where they are asked for: importing what they are about takes longer than most tests."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files whose tests `-m` leaves out."""
    left_out = "not integrations" in config.getoption("markexpr")
    return True if left_out and collection_path.name.startswith("test_") else None

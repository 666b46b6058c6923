"""README's table of what works is the one that the tests write."""

from __future__ import annotations

from tests.what_works import ROOT, shown, with_table


def test_the_table_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == with_table(readme), "run python -m tests.what_works"
    assert "| training loops |" in readme


def test_each_row_has_tests() -> None:
    assert [row for row, texts in shown().items() if not texts] == []

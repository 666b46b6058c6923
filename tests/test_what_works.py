"""The page of what works is the one that the tests write."""

from __future__ import annotations

from tests.what_works import PAGE, shown, with_sections


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_sections(page), "run python -m tests.what_works"
    assert "\n## Training loops\n" in page


def test_each_row_has_tests() -> None:
    assert [row for row, by_file in shown().items() if not by_file] == []

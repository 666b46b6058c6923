"""Parts of a text that are written from results, each between two marks."""

from __future__ import annotations

END = "<!-- end -->"


def placed(text: str, begin: str, part: str) -> str:
    """A text with what is between a mark and the next `END` replaced.

    Raises:
        SystemExit: the text has no such marks.
    """
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise SystemExit(f"the text has no place for the figures: put {begin} and {END} where they go")
    return f"{before}{begin}\n\n{part}\n\n{END}{after}" if part else f"{before}{begin}\n{END}{after}"

"""Captured ops and those of eager torch, made comparable: what captures leave out, split or say otherwise is no difference."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from tests.support.dispatched import Called

_NOT_CAPTURED = ("aten.ones_like.default",)
"""Backward starts from the tangent that it is given."""


def differences(ours: Sequence[Called], eager: Sequence[Called]) -> list[str]:
    """What is captured and not called in eager ("+"), or the other way round ("-"); nothing if all is the same."""
    found, expected = list(_comparable(ours)), list(_comparable(eager))
    return [line for line in difflib.ndiff(expected, found) if line[0] in "+-"]


def _comparable(calls: Sequence[Called]) -> Iterator[str]:
    for call in calls:
        if call.note or call.op in _NOT_CAPTURED:
            continue
        namespace, name, overload = call.op.split(".")
        yield f"{name.rstrip('_')} {call.results}"

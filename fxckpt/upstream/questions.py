"""Whether it is compiled, a model asks: no, so that it takes the way that it takes in eager, bit for bit.

Some ask since Dynamo can't follow them there: how transformers' models collect hidden states, for one. So where a
conversion fails behind an answer, that one question hears yes in the next, all others still hear no.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from traceback import FrameSummary
from types import CodeType
from typing import Any

import torch
from torch._dynamo.variables.torch import tracing_state_functions

QUESTIONS = frozenset(function for function, answer in tracing_state_functions().items() if answer is True)
"""Functions of torch that Dynamo answers by yes."""
_EXPORTED = torch.compiler.is_exporting
_INFORMED = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
"""Whose code knows what to do with the truth: torch's and ours."""

_CLOSE = 3
"""The code that failed, what it called, and what that called, may have asked."""

_Asked = tuple[CodeType, ...]
"""Who asked: the code that did, what called it, and so on."""


class Questions:
    """What models hear that ask whether they are compiled, over all conversions of a function."""

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._told: list[_Asked] = []
        self._in_vain: list[_Asked] = []
        self._all = False
        self._failed_at: Any = None

    def begin(self) -> None:
        """A conversion begins."""
        self._asked = []

    def answer(self, function: Any, tx: Any) -> bool | None:
        """What a question hears from the code that is converted; None where Dynamo's own answer is right."""
        if tx.f_code.co_filename.startswith(_INFORMED):
            return None
        if function is _EXPORTED:
            return False
        asked = []
        while tx is not None:
            asked.append(tx.f_code)
            tx = tx.parent
        self._asked.append(tuple(asked))
        return self._all or _is_among(tuple(asked), self._told)

    def tell(self, stack: Sequence[FrameSummary]) -> bool:
        """After a conversion that failed, choose who hears yes in the next: whoever asked last close to the failure.

        Args:
            stack: what was being converted when it failed, outermost first.

        Returns:
            Whether there is anybody: another conversion may succeed.
        """
        failed_at = [(frame.filename, frame.lineno) for frame in stack]
        if self._told and failed_at == self._failed_at:
            self._in_vain.append(self._told.pop())
        self._failed_at = failed_at
        best, depth = None, 0
        for asked in self._asked:
            shared = _shared_depth(asked, stack)
            who = asked[: len(asked) - shared + 1]
            if shared >= depth and len(who) <= _CLOSE and not _is_among(asked, (*self._told, *self._in_vain)):
                best, depth = who, shared
        if best is not None and not self._all:
            self._told.append(best)
            return True
        if self._asked and not self._all:
            self._all = True
            return True
        self.__init__()  # type: ignore[misc]
        return False


def _is_among(asked: _Asked, known: Sequence[_Asked]) -> bool:
    return any(asked[: len(who)] == who for who in known)


def _shared_depth(asked: _Asked, stack: Sequence[FrameSummary]) -> int:
    """How many of the outermost frames, of those in which it was asked, are still there."""
    depth = 0
    for code, frame in zip(reversed(asked), stack, strict=False):
        if (code.co_filename, code.co_name) != (frame.filename, frame.name):
            break
        depth += 1
    return depth

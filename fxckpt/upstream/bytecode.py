"""Python's bytecode: where the answer to a question leads, as far as the instructions tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNCHANGING = ("TO_BOOL", "EXTENDED_ARG")
"""Instructions that may stand between a value and the branch that its truth decides."""
PASSED = ("UNARY_NOT", *UNCHANGING)
"""The same, and what turns the question around."""


def branches(name: str) -> bool:
    """Whether an instruction of this name goes one way or another by the truth of a value."""
    return "JUMP" in name and "_IF_" in name and "NONE" not in name


@dataclass(frozen=True)
class Code:
    """The instructions of a function.

    Attributes:
        names: what each is.
        target: from the place of one to that of the one that it may jump to; None if it doesn't jump.
    """

    names: Sequence[str]
    target: Callable[[int], int | None]

    def way_without_error(self, at: int) -> bool | None:
        """Which value at the branch `at` does not end in `raise` where the other does; None if it is not so."""
        ends = {"TRUE" in self.names[at]: self.target(at), "FALSE" in self.names[at]: at + 1}
        raising = [value for value, start in ends.items() if start is not None and self._raises(start)]
        return (not raising[0]) if len(raising) == 1 else None

    def _raises(self, start: int) -> bool:
        """Whether every way on from an instruction ends in `raise`."""
        seen: set[int] = set()
        pending, raises = [start], False
        while pending:
            at = pending.pop()
            if at in seen:
                continue
            seen.add(at)
            name, target = self.names[at], self.target(at)
            if name.startswith(("RETURN", "YIELD")):
                return False
            if name in ("RAISE_VARARGS", "RERAISE"):
                raises = True
                continue
            if target is not None:
                pending.append(target)
            if target is None or "JUMP" not in name or "_IF_" in name:
                pending.append(at + 1)
        return raises

"""Checks of values that can only lead to an error: `if bad: raise`, `assert good`, those that torch makes itself.

No values are known while a graph is captured. Where a question about them decides only whether an error is raised, the
answer is the one that raises none, and an op in the graph compares it with the right one whenever the step runs. If
they differ, whoever runs the step runs the model's plain forward instead: it knows which error to raise.
"""

from __future__ import annotations

import dis
from bisect import bisect_right
from types import FrameType

from torch import Tensor

from fxckpt.upstream.bytecode import PASSED, Code, branches
from fxckpt.upstream.ops.expect import EXPECT

_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))


def answer_without_error(tensor: Tensor, frame: FrameType) -> bool | None:
    """Whether a tensor that `frame` reads is true, if an error would be raised otherwise; None if it is not so.

    The answer is checked whenever the traced step runs.
    """
    answer = _way_without_error(frame) if tensor.numel() == 1 else None
    if answer is not None:
        EXPECT(tensor.detach(), answer)
    return answer


def _way_without_error(frame: FrameType) -> bool | None:
    """Which value of the expression that a frame is computing does not end in `raise` where the other does."""
    code = list(dis.get_instructions(frame.f_code))
    place = {instruction.offset: i for i, instruction in enumerate(code)}
    at, negated = bisect_right(list(place), frame.f_lasti) - 1, False  # a call is followed by a cache of its own
    if code[at].opname == "PRECALL":  # python 3.11 calls some functions a step early
        at += 1
    if not branches(code[at].opname) and code[at].opname not in PASSED:
        at += 1
    while not branches(code[at].opname):
        if code[at].opname in PASSED:
            negated ^= code[at].opname == "UNARY_NOT"
            at += 1
        elif steps := _read_back(code, at):
            at += steps
        elif code[at].opname == "RETURN_VALUE" and frame.f_back is not None:  # the caller decides by it
            answer = _way_without_error(frame.f_back)
            return None if answer is None else answer ^ negated
        else:
            return None

    def target(at: int) -> int | None:
        return place[code[at].argval] if code[at].opcode in _JUMPS else None

    answer = Code([each.opname for each in code], target).way_without_error(at)
    return None if answer is None else answer ^ negated


def _read_back(code: list[dis.Instruction], at: int) -> int:
    """How many instructions only give a value a name, by which it is read again: from Python 3.13 on it may be one."""
    given = code[at]
    if given.opname == "STORE_FAST_LOAD_FAST":
        return int(given.argval[0] == given.argval[1])
    following = code[at + 1]
    read = given.opname == "STORE_FAST" and following.opname == "LOAD_FAST"
    return 2 * int(read and given.argval == following.argval)

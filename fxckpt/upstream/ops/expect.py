"""A check of values as an op: the answer that was taken for granted is compared with the right one at each run."""

from __future__ import annotations

import torch
from torch import Tensor

from fxckpt.upstream.ops.library import LIBRARY


class UnexpectedValue(Exception):  # noqa: N818 - caught, and answered by the plain forward
    """A question about values has another answer than the one that was captured."""


def _expect(value: Tensor, answer: bool) -> None:
    if bool(value) is not answer:
        raise UnexpectedValue("a check of values in the model's forward found something wrong")


def _expect_nothing(_: Tensor, __: bool) -> None:
    """No values are known."""


LIBRARY.define("expect(Tensor value, bool answer) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("expect", _expect, "CompositeExplicitAutograd")
LIBRARY.impl("expect", _expect_nothing, "Meta")

EXPECT = torch.ops.fxckpt.expect.default

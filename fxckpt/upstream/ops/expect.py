"""A check of values as an op: the answer that was taken for granted is compared with the right one at each run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _get_effect

from fxckpt.upstream.operators import ASSERT_ASYNC, CHECK_ERRORS
from fxckpt.upstream.ops.library import LIBRARY
from fxckpt.upstream.patching import attribute_replaced, function_replaced


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


@contextlib.contextmanager
def checks_kept() -> Iterator[None]:
    """Ops that look at values and raise are ops like others, without a result; tracing keeps them all the same.

    Torch would hand values from one to the next to keep them in order, or leave them out.
    """
    impure = torch.fx.node._side_effectful_functions | {EXPECT, CHECK_ERRORS, ASSERT_ASYNC}
    with (
        function_replaced(_get_effect, _effect_of_others),
        attribute_replaced(torch.fx.node, "_side_effectful_functions", impure),
    ):
        yield


def _effect_of_others(original: Callable[..., Any], op: Any) -> Any:
    return None if op is CHECK_ERRORS else original(op)

"""What is captured is what eager torch dispatches, for a menu of layers, types and layouts."""

from __future__ import annotations

import re

import pytest
import torch

from fxckpt.errors import CaptureError
from tests.support.comparable import differences, unexpected
from tests.support.dispatched import captured, in_eager, quiet
from tests.support.op_menu import MENU

CPU = torch.device("cpu")

REFUSED = re.compile("packed|bincount|ctc|/amp16$|soft_margin_loss")
"""Cases that read values, or that eager torch does not run on a CPU."""


def compare_on_cpu(name: str) -> None:
    with quiet():
        try:
            expected = in_eager(MENU[name], CPU)
        except Exception:
            pytest.skip("eager torch does not run it")
        try:
            ours = captured(MENU[name], CPU)
        except CaptureError:
            assert REFUSED.search(name)
            return
    assert not unexpected(name, differences(ours, expected))


@pytest.mark.parametrize("name", list(MENU)[::37])
def test_every_few_layers(name: str) -> None:
    compare_on_cpu(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MENU))
@pytest.mark.works("layers and ops", f"{len(MENU)} layers, by type and layout: the kernels that eager torch calls")
def test_all_layers(name: str) -> None:
    compare_on_cpu(name)


def test_a_difference_is_told() -> None:
    """Else nothing above would show any."""
    eager = in_eager(MENU["BatchNorm2d/channels last/fp32"], CPU)
    other = in_eager(MENU["BatchNorm2d/contiguous/fp32"], CPU)
    assert differences(other, eager)
    assert differences(eager[:-8], eager)
    assert not differences(eager, eager)

"""What is captured is what eager torch dispatches, for a menu of layers, types and layouts."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxckpt.errors import CaptureError
from tests.support.comparable import differences
from tests.support.dispatched import Called, captured, captured_for_gpu, in_eager, quiet
from tests.support.op_menu import MENU

RECORDED = Path(__file__).parents[1] / "gpu" / "dispatched.json.gz"
CPU = torch.device("cpu")

REFUSED = re.compile("packed|bincount|ctc|/amp16$|soft_margin_loss")
"""Cases that read values, or that eager torch does not run on a CPU."""

OTHERWISE: dict[str, str] = {
    r"(LSTM|GRU|RNN).*": "sigmoid|tanh|add|mul|transpose",  # gates are changed in place, as parts of one tensor
    r".*one_hot.*": "aminmax|_local_scalar_dense|zeros|scatter|ge|all|expect",  # looks at values
    r".*gaussian_nll.*": "_local_scalar_dense|expect|any|lt",  # looks at values
    r"(attention|MultiheadAttention|Transformer).*": "_to_copy",  # weights of attention that nobody asked for
    r"index/.*(reduce|amax).*": "mul|div|eq|where|sum|masked_fill|index_select|gather",  # gradients that nobody asked for
    r"activation/.*(29|30).*": "bernoulli|mul|add",  # draws in the order of memory
    r".*setitem.*": "lift_fresh_copy|index_put|fill|scalar_tensor",
}
"""Where captures differ from eager on purpose, and in which ops."""


def unexpected(name: str, found: list[str]) -> list[str]:
    """The differences but for those that are known."""
    known = "|".join(ops for pattern, ops in OTHERWISE.items() if re.fullmatch(pattern, name))
    return [line for line in found if not (known and re.fullmatch(known, line.split(" ")[1]))]


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

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
from tests.support.comparable import differences, unexpected
from tests.support.dispatched import Called, captured, captured_for_gpu, in_eager, quiet
from tests.support.op_menu import MENU

RECORDED = Path(__file__).parents[1] / "gpu" / "dispatched.json.gz"
"""By `python -m tests.gpu.record_dispatch --out`, on a GPU."""
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


NOT_ON_AN_ABSENT_GPU = re.compile("/amp|packed|average|^RMSNorm")
"""Autocast asks where tensors are; some cases read values; and `nn.RMSNorm` has a gradient of its own on CUDA alone."""

ON_GPU: dict[str, Any] = json.loads(gzip.decompress(RECORDED.read_bytes()))
FOR_GPU = [n for n, calls in ON_GPU["cases"].items() if isinstance(calls, list) and not NOT_ON_AN_ABSENT_GPU.search(n)]


def compare_for_gpu(name: str) -> None:
    recorded = [Called(*call) for call in ON_GPU["cases"][name]]
    with quiet():
        ours = captured_for_gpu(MENU[name], tuple(ON_GPU["device"]["capability"]))
    assert not unexpected(name, differences(ours, recorded))


@pytest.mark.parametrize("name", FOR_GPU[::5])
def test_every_few_layers_as_recorded_on_a_gpu(name: str) -> None:
    compare_for_gpu(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_GPU)
def test_all_layers_as_recorded_on_a_gpu(name: str) -> None:
    compare_for_gpu(name)


def test_a_difference_is_told() -> None:
    """Else nothing above would show any."""
    eager = in_eager(MENU["BatchNorm2d/channels last/fp32"], CPU)
    other = in_eager(MENU["BatchNorm2d/contiguous/fp32"], CPU)
    assert differences(other, eager)
    assert differences(eager[:-8], eager)
    assert not differences(eager, eager)

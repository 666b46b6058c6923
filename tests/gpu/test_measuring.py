"""Measuring on a CUDA device: nothing crashes, nothing is left behind, times and rates are such as a GPU can have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxckpt
from benchmarks.models.cases import case as case_named
from fxckpt.capture.joint import capture
from fxckpt.profile import calibrate, cost_cache, known, measure
from fxckpt.profile.build import working_nodes
from fxckpt.profile.costs import device_profile, estimated
from fxckpt.profile.devices import DEVICES, of_driver
from fxckpt.profile.known import Known

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Known()
    for module in (known, measure, calibrate):
        monkeypatch.setattr(module, "KNOWN", fresh)


class Attention(nn.Module):
    """Each kind of fused attention, as far as the device has it, with dropout: its seeds may be on the CPU."""

    def __init__(self, kind: Any, dropout: float) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).view(x.shape[0], x.shape[1], 4, 16).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel(self.kind):
            return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=self.dropout, is_causal=True)


KINDS = {
    (kind.name, dtype): (kind, dtype)
    for kind in (
        torch.nn.attention.SDPBackend.MATH,
        torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION,
        torch.nn.attention.SDPBackend.FLASH_ATTENTION,
        torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
    )
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_can_be_measured(kind: tuple[str, torch.dtype], dropout: float) -> None:
    backend, dtype = KINDS[kind]
    model = Attention(backend, dropout).to(GPU, dtype)
    x = torch.randn(2, 32, 64, device=GPU, dtype=dtype)
    try:
        model(x).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"eager can't run it: {error}")
    measured_without_trace(model, x)


MENU: dict[str, Any] = {
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(2, 3, 16, 16)),
    "dropout": lambda: (nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3)), torch.randn(8, 64)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50)), torch.randint(50, (4, 8))),
    "pooling": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)), torch.randn(2, 3, 16, 16)),
    "layer norm": lambda: (nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), torch.randn(4, 16)),
}


@pytest.mark.parametrize("name", MENU)
def test_kernels_with_notes_can_be_measured(name: str) -> None:
    model, x = MENU[name]()
    measured_without_trace(model.to(GPU), x.to(GPU))


def measured_without_trace(model: nn.Module, x: Tensor) -> None:
    """Every op can be run by itself, and generators are as before."""
    nodes = working_nodes(capture(model, (x,)))
    before = torch.get_rng_state(), torch.cuda.get_rng_state(GPU)
    measure.correct_private(nodes)
    cost = measure.measured(nodes, estimated(DEVICES["H100"]), times=True)
    torch.cuda.synchronize()
    after = torch.get_rng_state(), torch.cuda.get_rng_state(GPU)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {form for form, _ in known.KNOWN.refused} == set()
    assert all(cost(node).time_us > 0 for node in nodes)


def test_planning_leaves_generators_as_they_were() -> None:
    model, args, kwargs = case_named("gpt_dropout").build()
    args = tuple(x.cuda() for x in args)
    kwargs = {name: x.cuda() for name, x in kwargs.items()}
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(GPU)
    fxckpt.optimize(model.cuda(), 0.9, example_inputs=args, example_kwargs=kwargs)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(GPU), before[1])


def test_the_users_peak_is_not_lost() -> None:
    big = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    del big
    before = torch.cuda.max_memory_allocated(GPU)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU()).cuda()
    fxckpt.plan(model, 1.0, example_inputs=(torch.randn(8, 64, device=GPU),), cost_model="measure", device="H100")
    assert torch.cuda.max_memory_allocated(GPU) >= before


def test_products_take_as_long_as_their_arithmetic() -> None:
    """Three times the rows, three times the time: latency is not what is measured."""
    linear = nn.Linear(4096, 4096, bias=False, device=GPU, dtype=torch.bfloat16)
    times_us = []
    for rows in (4096, 12288):
        x = torch.randn(rows, 4096, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        plan = fxckpt.plan(linear, 1.0, example_inputs=(x,), cost_model="measure")
        times_us.append(max(op.time_us for op in plan.graph.ops if "mm" in op.target))
    assert 2 < times_us[1] / times_us[0] < 4.5


def test_the_device_is_measured_and_near_its_data_sheet(tmp_path: Path) -> None:
    profile = calibrate.profile_of(GPU, tmp_path / "costs.json")
    assert profile.memory_bytes == torch.cuda.get_device_properties(GPU).total_memory
    assert 0 < profile.launch_us < 100
    sheet = of_driver(profile.name)
    if sheet is None:
        pytest.skip(f"there is no data sheet of {profile.name}")
    assert 0.3 < profile.flops_per_s["bfloat16"] / sheet.flops_per_s["bfloat16"] < 1.1
    assert 0.4 < profile.bytes_per_s / sheet.bytes_per_s < 1.1
    assert 0.1 < profile.host_bytes_per_s / sheet.host_bytes_per_s < 1.2
    known.KNOWN.forget()
    assert calibrate.profile_of(GPU, tmp_path / "costs.json") == profile  # from the file
    assert device_profile(torch.device("meta"), "cuda", tmp_path / "costs.json").flops_per_s == profile.flops_per_s


def test_a_second_process_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cost_cache.FOLDER_VARIABLE, str(tmp_path))
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()).cuda(), torch.randn(8, 64, device=GPU)
    fxckpt.optimize(copy.deepcopy(model), 1.0, example_inputs=(x,))
    known.KNOWN.forget()
    monkeypatch.setattr(measure, "clock_of", lambda _: pytest.fail("something is timed again"))
    monkeypatch.setattr(calibrate, "timed", lambda *_: pytest.fail("the device is measured again"))
    fxckpt.optimize(copy.deepcopy(model), 1.0, example_inputs=(x,))

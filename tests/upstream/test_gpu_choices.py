"""What torch chooses on a GPU that is not there, and what is traced for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxckpt
from benchmarks.models.cases import case
from fxckpt.upstream.gpu_choices import Attention, attention_kernel, capability_of
from tests.support.dispatched import captured_for_gpu
from tests.support.op_menu import MENU

HALF, FULL = torch.bfloat16, torch.float32
AMPERE, ADA, HOPPER, VOLTA = (8, 0), (8, 9), (9, 0), (7, 0)


def call(
    dtype: torch.dtype = HALF,
    *,
    width: int = 64,
    of_values: int | None = None,
    heads: tuple[int, int] = (4, 4),
    lengths: tuple[int, int] = (32, 32),
    masked: bool = False,
    trained: bool = False,
    **more: Any,
) -> Attention:
    with FakeTensorMode():
        query = torch.empty(2, heads[0], lengths[0], width, dtype=dtype).requires_grad_()
        key = torch.empty(2, heads[1], lengths[1], width, dtype=dtype)
        value = torch.empty(2, heads[1], lengths[1], of_values or width, dtype=dtype)
        mask = torch.empty(lengths, dtype=dtype, requires_grad=trained) if masked else None
    options = {"dropout": 0.0, "causal": False, "grouped": heads[0] != heads[1], **more}
    return Attention(query, key, value, mask, **options)


@pytest.mark.parametrize(
    ("given", "capability", "kernel"),
    [
        (call(), HOPPER, "cudnn"),
        (call(), AMPERE, "flash"),
        (call(), VOLTA, "math"),
        (call(torch.float16), VOLTA, "efficient"),
        (call(FULL), HOPPER, "efficient"),
        (call(FULL), VOLTA, "efficient"),
        (call(torch.float64), HOPPER, "math"),
        (call(masked=True), HOPPER, "cudnn"),
        (call(masked=True), AMPERE, "efficient"),
        (call(masked=True, trained=True), HOPPER, "efficient"),
        (call(width=192), HOPPER, "flash"),
        (call(width=192, of_values=128), HOPPER, "cudnn"),
        (call(width=320), HOPPER, "efficient"),
        (call(width=33), HOPPER, "flash"),
        (call(FULL, width=33), HOPPER, "math"),
        (call(FULL, width=33), VOLTA, "efficient"),
        (call(width=256), ADA, "flash"),
        (call(width=224), ADA, "efficient"),
        (call(width=256, dropout=0.1), ADA, "efficient"),
        (call(lengths=(32, 48), causal=True), AMPERE, "efficient"),
        (call(lengths=(32, 1)), HOPPER, "flash"),
        (call(lengths=(1, 32), dropout=0.5), HOPPER, "flash"),
        (call(heads=(4, 2)), AMPERE, "flash"),
        (call(FULL, heads=(4, 2)), AMPERE, "math"),
        (call(heads=(4, 2), grouped=False), AMPERE, "math"),
    ],
)
def test_kernels_of_attention(given: Attention, capability: tuple[int, int], kernel: str) -> None:
    assert attention_kernel(given, capability) == kernel


def test_what_the_user_turned_off_is_not_called() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel(call(), HOPPER) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert attention_kernel(call(), HOPPER) == "efficient"


def test_where_all_must_be_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert attention_kernel(call(), HOPPER) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_names() -> None:
    assert capability_of("NVIDIA H100 80GB HBM3") == HOPPER
    assert capability_of("RTX 4090") == ADA
    assert capability_of("cpu") is None


KERNELS = {
    "attention/plain/fp32": "_scaled_dot_product_efficient_attention",
    "attention/plain/bf16": "_scaled_dot_product_cudnn_attention",
    "attention/width 33/bf16": "_scaled_dot_product_flash_attention",
    "BatchNorm2d/contiguous/fp32": "cudnn_batch_norm",
    "BatchNorm2d/channels last/fp32": "cudnn_batch_norm",
    "BatchNorm2d/contiguous/bf16": "native_batch_norm",
    "BatchNorm2d/contiguous/fp32/eval": "cudnn_batch_norm",
    "BatchNorm1d/rows/fp32": "native_batch_norm",
    "InstanceNorm2d/contiguous/fp32": "cudnn_batch_norm",
    "LSTM/plain/fp32": "cudnn_rnn",
    "GRU/bidirectional=True/bf16": "cudnn_rnn",
    "RNN/relu/fp32": "cudnn_rnn",
    "Dropout/odd/fp32": "native_dropout",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_layers(name: str) -> None:
    names = [c.op.split(".")[1] for c in captured_for_gpu(MENU[name], HOPPER)]
    assert any(KERNELS[name] in found for found in names)


SOME = ["Linear/fp32", "attention/dropout/fp32", "BatchNorm2d/contiguous/fp32", "LSTM/plain/fp32"]


@pytest.mark.parametrize("name", SOME)
def test_all_is_on_the_gpu_but_seeds(name: str) -> None:
    for made in captured_for_gpu(MENU[name], HOPPER):
        elsewhere = [form for form in made.results.split(" ") if "@" in form]
        assert elsewhere == (["i64[]()@cpu"] * 2 if made.op.endswith("efficient_attention.default") else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="casts are known where there is a GPU")
def test_autocast_is_refused() -> None:
    x = torch.rand(4, 8)
    with torch.autocast("cpu"), pytest.raises(fxckpt.CaptureError, match="what autocast does on a GPU"):
        fxckpt.plan(nn.Linear(8, 8), "1GB", example_inputs=(x,), device="H100")


def test_a_plan_does_not_depend_on_where_the_model_is() -> None:
    model, args, kwargs = case("gpt_dropout").build()
    options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs, "device": "H100", "solver": "save_all"}
    here = fxckpt.plan(model, "1GB", **options)
    options["example_inputs"] = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
    absent = fxckpt.plan(model.to("meta"), "1GB", **options)
    on_cpu = fxckpt.plan(model, "1GB", **{**options, "device": None})
    assert here.fingerprint == absent.fingerprint != on_cpu.fingerprint
    assert any("efficient_attention" in op.name for op in here.graph.ops)


class Asking(nn.Module):
    """Makes what it needs where its input is, and asks where that is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        here = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)
        there = torch.ones(x.shape[0]).to(x.device)
        return x * here + there if x.is_cuda and x.device.type == "cuda" else x


def test_models_are_told_that_they_are_on_the_gpu() -> None:
    plan = fxckpt.plan(Asking(), "1GB", example_inputs=(torch.rand(4, requires_grad=True),), device="H100")
    assert {"mul", "arange"} <= {op.name for op in plan.graph.ops}

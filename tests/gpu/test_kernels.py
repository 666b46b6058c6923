"""On a CUDA device: what is captured is what eager dispatches, and rules for absent GPUs are those of this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxckpt
from fxckpt.upstream.gpu_choices import Attention, attention_kernel
from tests.support.comparable import differences, unexpected
from tests.support.dispatched import captured, captured_for_gpu, in_eager, quiet
from tests.support.layer_menu import Attend
from tests.support.op_menu import MENU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GPU = torch.device("cuda")
ATTENTION = [name for name in MENU if name.startswith("attention/") and "/amp" not in name and "only" not in name]
KERNELS = ["math", "flash", "efficient", "cudnn"]
"""By torch's numbers of them."""


@pytest.mark.parametrize("name", list(MENU)[::11])
def test_captured_ops_are_those_of_eager(name: str) -> None:
    with quiet():
        try:
            eager = in_eager(MENU[name], GPU)
        except Exception:
            pytest.skip("eager torch does not run it")
        try:
            ours = captured(MENU[name], GPU)
        except fxckpt.CaptureError as refusal:
            pytest.skip(str(refusal))
    assert not unexpected(name, differences(ours, eager))


@pytest.mark.parametrize("name", list(MENU)[5::53])
def test_models_on_meta_are_traced_as_on_the_gpu(name: str) -> None:
    with quiet():
        try:
            here = captured(MENU[name], GPU)
        except Exception:
            pytest.skip("can't be captured")
        assert captured_for_gpu(MENU[name], torch.cuda.get_device_capability()) == here


@pytest.mark.parametrize("name", ATTENTION)
def test_rules_are_those_of_torch(name: str) -> None:
    with torch.device(GPU):
        model, inputs = MENU[name].made()
    layer: Any = model.layer
    assert isinstance(layer, Attend)
    query, key, value, *mask = inputs
    dropout, causal = (layer.dropout if model.training else 0.0), layer.options["is_causal"]
    given = Attention(query, key, value, mask[0] if mask else None, dropout, causal, layer.options["enable_gqa"])
    options = {"dropout_p": dropout, "is_causal": causal, **layer.options}
    try:
        chosen = torch._fused_sdp_choice(query, key, value, given.mask, **options)
    except RuntimeError:
        pytest.skip("torch refuses it")
    assert attention_kernel(given, torch.cuda.get_device_capability()) == KERNELS[chosen]


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "dropout": 0.3}, {"bidirectional": True, "batch_first": True}]
)
def test_recurrent_layers_are_bitwise(kind: Any, options: dict[str, Any]) -> None:
    model = kind(16, 32, **options).cuda()
    x = torch.rand(6, 6, 16, device="cuda")

    def step(called: Any) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        called(x)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = step(model)
    optimized = fxckpt.optimize(model, "1GB", solver="min_memory", example_inputs=(x,))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(optimized), expected, strict=True))

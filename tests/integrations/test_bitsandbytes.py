"""bitsandbytes on CPU: frozen 4-bit weights under trained adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

bitsandbytes = pytest.importorskip("bitsandbytes")

from tests.integrations.support import check

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]


class Adapted(nn.Module):
    """A quantized layer that is frozen, and a low-rank addition that is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = bitsandbytes.nn.Linear4bit(width, width, compute_dtype=torch.float32, quant_type="nf4")
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Net(nn.Module):
    """Some adapted layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(4) for layer in (Adapted(64), nn.GELU())))

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.layers(x), x)


def test_adapters_on_4bit_weights() -> None:
    def build() -> nn.Module:
        return Net().to("cpu")  # quantizes

    def loss_of(model: Any, number: int) -> Tensor:
        loss: Tensor = model(torch.randn(256, 64, generator=torch.Generator().manual_seed(number)))
        return loss

    check(build, loss_of, 0.8)

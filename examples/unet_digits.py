"""Train a U-Net to segment noisy handwritten digits, plain and in half the memory: the losses are the same.

    python examples/unet_digits.py [--quick]

Data: scikit-learn's digits (8×8 images of the UCI ML repository, part of the package), enlarged and covered with noise.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a few steps on few images")
options = parser.parse_args()
STEPS, BATCH = (3, 8) if options.quick else (60, 32)


def double(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv2d(channels, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels down, three up, with skips between them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(1, width), double(width, 2 * width), double(2 * width, 4 * width)])
        self.up = nn.ModuleList([double(6 * width, 2 * width), double(3 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for level, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        y: Tensor = self.head(x)
        return y


digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
images = F.interpolate(digits, size=64, mode="bilinear")
masks = (images > 0.4).float()


def train(memory_budget: float | None) -> tuple[list[float], int]:
    """Losses of the steps, and the measured peak of one [B]."""
    torch.manual_seed(0)
    model: nn.Module = UNet()
    if memory_budget is not None:
        model = fxckpt.optimize(model, memory_budget)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        noisy = images[chosen] + 0.5 * torch.randn(BATCH, 1, 64, 64)
        loss = F.binary_cross_entropy_with_logits(model(noisy), masks[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, fxckpt.measure(model, noisy).peak_bytes


plain, plain_bytes = train(None)
within, within_bytes = train(0.5)
print(f"loss {plain[0]:.4f} -> {plain[-1]:.4f}; with fxckpt {within[0]:.4f} -> {within[-1]:.4f}")
print("losses identical:", plain == within)
print(f"peak {plain_bytes / 2**20:.1f} MiB; with fxckpt {within_bytes / 2**20:.1f} MiB")

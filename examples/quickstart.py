"""The shortest use of fxckpt: the same model, the same gradients, half the memory."""

import torch
from torch import nn

import fxckpt

model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(8)))
x = torch.randn(2048, 256)
before = fxckpt.measure(model, x)

model = fxckpt.optimize(model, memory_budget=0.5)  # or "8GB"; captured and planned at the first call
model(x).square().mean().backward()

fxckpt.print_plan(model, measurement=fxckpt.measure(model, x))
print(f"measured before: {before.peak_bytes / 2**20:.1f} MiB")

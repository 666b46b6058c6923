"""The shortest use of fxckpt: the same model, the same gradients, half the memory."""

import torch
from torch import nn

import fxckpt

model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)))
x = torch.randn(2048, 256)
plain = fxckpt.measure(model, x)

model = fxckpt.optimize(model, memory_budget=0.5, example_inputs=(x,))  # or "8GB", and planned at the first call
fxckpt.print_plan(model, measurement=fxckpt.measure(model, x))
print(f"\nmeasured without fxckpt: peak {plain.peak_bytes / 2**20:.1f} MiB, step {plain.step_us / 1e3:.1f} ms")

model(x).square().mean().backward()  # train as ever

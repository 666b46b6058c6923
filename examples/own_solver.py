"""Write a solver of your own: a function from a graph and a budget in bytes to a schedule.

A graph has ops, which read and write storages; a schedule is an order of ops in which an op may stand twice. fxckpt
simulates what the function returns, refuses it if it is not valid or over the budget, and emits and runs it like any
other plan.
"""

import torch
from torch import nn

import fxckpt
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate

COSTLY = ("mm", "convolution", "attention")


def recompute_cheap_ops(graph: Graph, budget_bytes: int) -> Schedule:
    """Repeat what costs little, largest result first, just before the first backward op that needs it."""
    steps = list(plain(graph).order)
    candidates = [
        index
        for index, op in enumerate(graph.ops[: graph.forward_count])
        if not op.pinned and not any(name in op.target for name in COSTLY)
    ]
    candidates.sort(key=lambda index: -graph.bytes_of(graph.ops[index].writes))
    for index in candidates:
        if simulate(graph, Schedule(tuple(steps), graph.forward_count)).peak_bytes <= budget_bytes:
            break
        written = set(graph.ops[index].writes)
        position = next(
            (n for n in range(graph.forward_count, len(steps)) if written & set(graph.ops[steps[n]].reads)), None
        )
        if position is not None:
            steps.insert(position, index)
    return Schedule(tuple(steps), graph.forward_count)


block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
model = nn.Sequential(*(nn.Sequential(*block) for _ in range(6)))
x = torch.randn(1024, 256)

for solver in (recompute_cheap_ops, "selective", "auto"):
    plan = fxckpt.plan(model, 0.7, example_inputs=(x,), solver=solver)
    plain_figures, figures = plan.baseline, plan.predicted
    print(
        f"{plan.solver:20} peak {figures.peak_bytes / 2**20:.1f} of {plain_figures.peak_bytes / 2**20:.1f} MiB, "
        f"recomputation {100 * figures.recompute_us / plain_figures.step_us:.2f} % of the step"
    )

optimized = fxckpt.optimize(model, 0.7, solver=recompute_cheap_ops)
optimized(x).square().mean().backward()
gradient = next(optimized.parameters()).grad
model.zero_grad()
model(x).square().mean().backward()
print("gradients identical:", torch.equal(gradient, next(model.parameters()).grad))

"""Ask a captured step what networkx can tell: where all paths meet, and which ops can't run side by side.

A plan holds the captured step as data, `plan.graph`. `to_networkx` makes a directed graph of ops and storages of it.
Here two of the algorithms of networkx answer questions about a network of residual blocks:

- Dominators. What every path from the model's input to its output goes through is a natural checkpoint: from it alone,
  and parameters, all that follows can be computed again.
- The longest path. No machine with however many streams is faster than the ops on it, one after the other.
"""

import networkx as nx
import torch
from torch import nn

import fxckpt


class Residual(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


model = nn.Sequential(nn.Linear(64, 128), *(Residual(128) for _ in range(4)), nn.Linear(128, 10))
x = torch.randn(32, 64)
graph = fxckpt.plan(model, 1.0, example_inputs=(x,), cost_model="reference").graph
net = graph.to_networkx()

# Dominators of the output in forward. Parameters are there anyway, so only paths from the input count.
forward = nx.DiGraph(net.subgraph(("op", i) for i in range(graph.forward_count)))
forward.add_edges_from(net.in_edges(list(forward)))
forward.add_edges_from(net.out_edges(list(forward)))
start = next(("storage", i) for i, s in enumerate(graph.storages) if s.kind == "input")
dominator = nx.immediate_dominators(forward, start)
found, node = [], ("storage", graph.outputs[0])
while (node := dominator[node]) != start:
    found.append(node)
checkpoints = [index for kind, index in reversed(found) if kind == "storage"]
print(f"{len(checkpoints)} tensors from each of which all that follows can be computed:")
for index in checkpoints:
    storage, module = graph.storages[index], graph.ops[graph.producer[index]].module
    print(f"    {storage.name:12} {storage.size_bytes / 1024:6.1f} KiB   {module}")

# The longest path through forward and backward.
path = nx.dag_longest_path(net, weight="time_us")
longest = [graph.ops[index] for kind, index in path if kind == "op"]
longest_us = sum(op.time_us for op in longest)
print(f"\n{len(longest)} of {len(graph.ops)} ops are on the longest path, {longest_us:.0f} of {graph.step_us:.0f} µs.")
print("The rest could run beside it, such as gradients of weights:")
beside = [op for op in graph.ops if op not in longest]
for op in sorted(beside, key=lambda op: -op.time_us)[:3]:
    print(f"    {op.name:12} {op.time_us:6.1f} µs   {op.module}")

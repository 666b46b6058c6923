"""torch_geometric's layers: messages along the edges of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

geometric = pytest.importorskip("torch_geometric")


import fxckpt
from fxckpt.errors import CaptureError
from tests.integrations.support import check

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]

NODES, EDGES, WIDTH = 200, 800, 16
LAYERS = {
    "gcn": lambda: geometric.nn.GCNConv(WIDTH, WIDTH, add_self_loops=False),
    "gat": lambda: geometric.nn.GATConv(WIDTH, WIDTH // 2, heads=2, dropout=0.1, add_self_loops=False),
    "sage": lambda: geometric.nn.SAGEConv(WIDTH, WIDTH),
    "gcn, loops added once": lambda: geometric.nn.GCNConv(WIDTH, WIDTH, cached=True),
    "gcn, loops added at each step": lambda: geometric.nn.GCNConv(WIDTH, WIDTH),
}


class Net(nn.Module):
    """Some layers of a kind, and the loss of classified nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind]() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(layer(x, edges).relu(), 0.2, self.training)
        return F.cross_entropy(self.head(x), labels)


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Features of nodes, edges, labels of nodes."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(NODES, WIDTH, generator=generator), torch.randint(0, 4, (NODES,), generator=generator)
    return x, torch.randint(0, NODES, (2, EDGES), generator=generator), labels


@pytest.mark.parametrize("kind", list(LAYERS)[:4])
def test_layers(kind: str) -> None:
    given = graph()

    def build() -> nn.Module:
        net = Net(kind)
        with torch.no_grad():
            net(*given)  # a layer that keeps its normalized edges has them from here on
        return net

    def loss_of(model: Any, _: int) -> Tensor:
        loss: Tensor = model(*given)
        return loss

    check(build, loss_of, 0.9, inputs=given)


def test_edges_chosen_by_value_are_refused_by_name() -> None:
    """How many loops there are among the edges is known only when they are looked at."""
    ours = fxckpt.optimize(Net("gcn, loops added at each step"), 0.8)
    with pytest.raises(CaptureError, match=r"loop\.py.*shape"):
        ours(*graph())

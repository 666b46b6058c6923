"""Optimized models in other processes: spawned ones that train, and workers that load data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, TensorDataset

import fxckpt
from benchmarks.models.cases import project
from benchmarks.models.training import assert_same_bits


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.GELU(), nn.Linear(64, 4))


def rows(count: int = 12) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Parameters after a step for each batch."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        project(model(x)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_and_save(rank: int, model: nn.Module, folder: str) -> None:
    trained = train(copy.deepcopy(model), [rows() + rank])
    torch.save(trained, Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("planned", [False, True], ids=["not yet planned", "planned"])
@pytest.mark.works("threads, processes, interrupts")
def test_spawned_processes(planned: bool, tmp_path: Path) -> None:
    model = layers()
    optimized = fxckpt.optimize(model, "1GB", solver="min_memory", example_inputs=(rows(),) if planned else None)
    spawn(train_and_save, (optimized, str(tmp_path)), nprocs=2)
    for rank in range(2):
        expected = train(copy.deepcopy(model), [rows() + rank])
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert_same_bits(found, expected[name], name)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
@pytest.mark.works("threads, processes, interrupts")
def test_workers_that_load_data() -> None:
    model = layers()
    optimized = fxckpt.optimize(copy.deepcopy(model), "1GB", solver="min_memory")
    left = []
    for m in (optimized, model):
        loader = DataLoader(TensorDataset(rows(30)), batch_size=12, num_workers=2)  # the last batch is smaller
        left.append(train(m, [x for (x,) in loader]))
    for name, expected in left[1].items():
        assert_same_bits(left[0][name], expected, name)

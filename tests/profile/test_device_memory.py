"""Plans for a GPU that is not there: whole blocks, what cuBLAS keeps, what the caching allocator makes of it."""

from __future__ import annotations

import io

import pytest
import torch

import fxckpt
from fxckpt.core.caching_allocator import AllocatorSettings
from fxckpt.core.plans import Plan
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.profile.device_memory import allocator_settings, block_bytes
from fxckpt.profile.devices import DEVICES, DeviceProfile
from fxckpt.units import CUDA_BLOCK_BYTES
from fxckpt.upstream.blas import blas_workspace_bytes

META, CPU, MIB = torch.device("meta"), torch.device("cpu"), 2**20


def network() -> tuple[torch.nn.Module, torch.Tensor]:
    """Layers whose results take 6 MiB and a bit each."""
    with torch.device("meta"):
        layers = [torch.nn.Sequential(torch.nn.Linear(1001, 1001), torch.nn.Tanh()) for _ in range(8)]
        return torch.nn.Sequential(*layers), torch.empty(1601, 1001)


def planned(budget: float | int | str, device: str | DeviceProfile | None = "H100") -> Plan:
    model, x = network()
    return fxckpt.plan(model, budget, example_inputs=(x,), device=device, effort="fast")


def test_sizes_are_whole_blocks() -> None:
    graph = planned(1.0).graph
    assert all(storage.size_bytes % CUDA_BLOCK_BYTES == 0 for storage in graph.storages)
    assert graph.allocated_gradient_bytes % CUDA_BLOCK_BYTES == 0
    assert any(storage.size_bytes % CUDA_BLOCK_BYTES for storage in planned(1.0, None).graph.storages)


def test_what_cublas_keeps_is_named_and_no_fraction_is_taken_of_it() -> None:
    plan, half = planned(1.0), planned(0.9)
    kept_bytes = plan.graph.library_bytes
    assert kept_bytes in (64 * MIB, 66 * MIB)  # a workspace of 32 MiB for each thread, and one of cuBLASLt before 2.13
    assert plan.timeline.at_peak["libraries"] == kept_bytes
    assert half.budget_bytes - kept_bytes == int((plan.budget_bytes - kept_bytes) * 0.9)
    text = io.StringIO()
    fxckpt.print_plan(plan, file=text)
    assert "libraries" in text.getvalue()
    assert "100.0% of the plain model's peak (what libraries keep aside)" in text.getvalue()


def test_a_budget_is_for_blocks() -> None:
    plain = planned(1.0)
    assert plain.blocks is not None
    assert not plain.schedule.repeats()
    assert plain.blocks.plan.allocated_bytes > plain.predicted.peak_bytes
    for budget in (0.97, 0.95, 0.9):
        plan = planned(budget)
        assert plan.blocks is not None
        assert plan.peak_bytes == plan.blocks.plan.allocated_bytes <= plan.budget_bytes
        assert plan.schedule.repeats()
        text = io.StringIO()
        fxckpt.print_plan(plan, file=text)
        assert "by the CUDA caching allocator's rule" in text.getvalue()


def test_a_budget_that_only_sizes_fit_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError) as refused:
        planned("70MiB")
    plan = planned(refused.value.floor_bytes)
    assert plan.peak_bytes <= refused.value.floor_bytes


def test_on_a_cpu_nothing_is_rounded() -> None:
    plan = planned(1.0, "cpu")
    assert (plan.blocks, plan.graph.library_bytes) == (None, 0)
    assert allocator_settings(CPU, "H100") is None
    assert block_bytes(CPU, "H100") == block_bytes(META, None) == 1
    assert block_bytes(META, "A100") == CUDA_BLOCK_BYTES
    assert allocator_settings(META, "A100") == AllocatorSettings()


def test_a_plan_and_its_file_are_equal() -> None:
    plan = planned(0.9)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read.blocks is None  # it depends on how the allocator is set where the plan is used
    assert read.graph.library_bytes == plan.graph.library_bytes


@pytest.mark.parametrize("ops", [["aten.relu.default"], []])
def test_steps_without_matrix_products_have_no_workspace(ops: list[str]) -> None:
    assert blas_workspace_bytes(ops, threads=2, chosen_bytes=DEVICES["H100"].blas_bytes) == 0


def test_each_thread_has_a_workspace() -> None:
    small = DEVICES["A100"].blas_bytes
    assert blas_workspace_bytes(["aten::mm"], threads=1, chosen_bytes=small) == small == 8 * MIB + 2**17
    assert blas_workspace_bytes(["aten.bmm.default"], threads=2, chosen_bytes=small) == 2 * small

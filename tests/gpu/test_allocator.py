"""The model of the caching allocator against torch's own: the same requests, the same blocks at the same addresses."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.models.cases import case as case_named
from fxckpt.core.caching_allocator import AllocatorSettings, CachingAllocator
from fxckpt.profile.devices import of_driver
from fxckpt.steps.step import TrainingStep
from fxckpt.upstream.allocator import allocations, caching_allocator_settings
from fxckpt.upstream.blas import blas_workspace_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

KIB, MIB = 2**10, 2**20
REQUESTS = 600
MOST_BYTES = 4 * 2**30

SETTINGS = {
    "": AllocatorSettings(),
    "expandable_segments:True": AllocatorSettings(expandable_segments=True),
    "max_split_size_mb:32": AllocatorSettings(max_split_bytes=32 * MIB),
    "roundup_power2_divisions:8": AllocatorSettings(divisions=(8,) * 16),
}


@contextmanager
def allocator_set(text: str) -> Iterator[None]:
    """Other settings of torch's allocator, and no cached memory in the stream that is then used."""
    change: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    change = change or torch.cuda.memory._set_allocator_settings
    default = "expandable_segments:False,max_split_size_mb:1000000,roundup_power2_divisions:1"
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    change(text or default)
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            yield
    finally:
        change(default)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def some_size(draw: random.Random) -> int:
    kind = draw.randrange(7)
    if kind == 0:
        return draw.randint(1, 4 * KIB)
    if kind == 1:
        return draw.randint(1, MIB)
    if kind == 2:
        return MIB + draw.randint(-600, 600)
    if kind == 3:
        return draw.randint(MIB, 10 * MIB)
    if kind == 4:
        return 10 * MIB + draw.randint(-600, 600)
    if kind == 5:
        return draw.randint(1, 20) * 2 * MIB + draw.choice((-512, 0, 1, 512, MIB))
    return draw.randint(10 * MIB, 80 * MIB)


@pytest.mark.parametrize("text", SETTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_those_of_torch(text: str, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [some_size(draw) for _ in range(12)]  # a step asks for few sizes, each many times
    with allocator_set(text):
        address = 0
        model = CachingAllocator(SETTINGS[text], lambda _: address)
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        used: list[tuple[torch.Tensor, Any]] = []
        for number in range(REQUESTS):
            size = draw.choice(sizes) if draw.random() < 0.8 else some_size(draw)
            tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
            address = tensor.data_ptr()  # where a new segment is only the driver knows
            block = model.allocate(size)
            assert block is not None
            used.append((tensor, block))
            del tensor
            where = f"request {number} of {size} bytes"
            if not SETTINGS[text].expandable_segments:
                assert block.address == address, where
            assert model.allocated_bytes == torch.cuda.memory_allocated() - allocated, where
            assert model.reserved_bytes == torch.cuda.memory_reserved() - reserved, where
            while used and (model.allocated_bytes > MOST_BYTES or draw.random() < 0.48):
                model.free(used.pop(draw.randrange(len(used)))[1])
            assert model.allocated_bytes == torch.cuda.memory_allocated() - allocated, where
        assert model.peak_allocated_bytes == torch.cuda.max_memory_allocated() - allocated
        assert model.peak_reserved_bytes == torch.cuda.max_memory_reserved() - reserved
        used.clear()


def steps_of(name: str) -> TrainingStep:
    case = case_named(name)
    model, args, kwargs = case.build()
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), (args, kwargs))
    return TrainingStep(model.cuda(), args, kwargs)


@pytest.mark.parametrize("name", ["mlp", "gpt", "gpt_dropout", "resnet", "unet"])
def test_the_peak_of_the_events_is_that_of_the_counters(name: str) -> None:
    step = steps_of(name)
    step.warm_up()
    for _ in range(3):
        with step.without_trace():
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found = allocations(step.run, step.device)
            assert found.peak_bytes == torch.cuda.max_memory_allocated() - before
            assert sum(found.changes_bytes) == torch.cuda.memory_allocated() - before
            assert found.peak_bytes > 0


def test_measuring_leaves_the_peak_that_is_being_recorded() -> None:
    big = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    del big
    recorded = torch.cuda.max_memory_allocated()
    step = steps_of("mlp")
    step.warm_up()
    assert step.allocated_bytes() > 0
    assert torch.cuda.max_memory_allocated() == recorded


def test_what_cublas_keeps() -> None:
    x, weight, bias = (torch.randn(64, 64, device="cuda", requires_grad=True) for _ in range(3))
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        start = torch.cuda.memory_allocated()
        y = torch.mm(x, weight)
        found.append(torch.cuda.memory_allocated() - start - 64 * 64 * 4)
        del y
        z = torch.addmm(bias[0], x, weight)
        found.append(torch.cuda.memory_allocated() - start - 64 * 64 * 4)
        gradients = torch.autograd.grad(z.sum(), (x, weight))
        torch.cuda.synchronize()
        del z, gradients
        found.append(torch.cuda.memory_allocated() - start)
    assert found[0] == blas_workspace_bytes(["aten::mm"], threads=1)
    assert found[1] == blas_workspace_bytes(["aten::mm", "aten.addmm.default"], threads=1)
    both = blas_workspace_bytes(["aten::mm"], threads=1)
    assert found[2] == found[1] + both  # backward has no bias
    profile = of_driver(torch.cuda.get_device_name())
    if profile is not None and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        assert found[1] == blas_workspace_bytes(["aten::addmm"], threads=1, chosen_bytes=profile.blas_bytes)


def test_settings_are_those_in_use() -> None:
    with allocator_set("max_split_size_mb:64,roundup_power2_divisions:4"):
        found = caching_allocator_settings(torch.device("cuda"))
    assert found is not None
    assert (found["max_split_size"], found["large_segment_size"]) == (64 * MIB, 20 * MIB)
    assert set(found["roundup_power2_divisions"].values()) == {4}

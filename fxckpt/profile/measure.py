"""The measuring cost model: run each distinct op of a graph once or a few times on its device.

Workspaces (memory that a kernel allocates inside and frees before it returns) can't be known otherwise: CPU
convolutions allocate more than their outputs. Results are kept for the life of the process, by the form of the op and
the number of threads; `cost_file` keeps them longer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import device, is_random, value
from fxckpt.profile import cost_cache, private
from fxckpt.profile.build import CostModel, OpCost, op_form, written_bytes
from fxckpt.upstream.allocator import allocation_changes, peak_allocated_bytes
from fxckpt.upstream.dispatch import plain_execution
from fxckpt.upstream.pytree import tree_map_only

_FEWEST_RUNS, _MOST_RUNS, _ENOUGH_US = 5, 20, 10_000.0
_MARK_BYTES = 14_407  # the size of an allocation that stands between two ops in the list of allocations

_WORKSPACE_BYTES: dict[tuple[str, int], int] = {}
_TIME_US: dict[tuple[str, int], float] = {}


def measure_private(nodes: Iterable[fx.Node]) -> None:
    """Find the sizes of buffers in a private format, read or not, and correct what was traced."""
    for recurrent in filter(private.is_producer, nodes):
        with _without_trace(recurrent):
            call = _Call.of(recurrent)
            if call is not None:
                private.correct_sizes(recurrent, call.run())


def measure_workspaces(nodes: Iterable[fx.Node]) -> None:
    """Find the workspace of each distinct op that is not known yet. Ops that can't be run alone have none."""
    fresh = _distinct(nodes, _WORKSPACE_BYTES)
    on_cpu = {key: node for key, node in fresh.items() if device(node).type == "cpu"}
    for key, node in fresh.items():
        if key not in on_cpu:
            with _without_trace(node):
                call = _Call.of(node)
                peak_bytes = peak_allocated_bytes(call.run, device(node)) if call else 0
            _WORKSPACE_BYTES[key] = max(0, peak_bytes - written_bytes(node))
    if on_cpu:
        _measure_on_cpu(on_cpu)


def measure_times(nodes: Iterable[fx.Node], fallback: CostModel) -> None:
    """Find the time of each distinct op that is not known yet. Ops that can't be run alone get the estimate of
    `fallback`.

    After a warm-up the fastest of several runs counts, not their median: what disturbs a run only ever adds time, so
    the least is nearest to what the op itself takes (Chen and Revels, 2016, arXiv:1608.04295). On a busy machine both
    scatter alike, but the median is also too high.
    """
    for key, node in _distinct(nodes, _TIME_US).items():
        with _without_trace(node):
            call = _Call.of(node)
            _TIME_US[key] = _fastest_us(call, device(node)) if call else fallback(node).time_us


def measured(node: fx.Node) -> OpCost:
    """Cost of an op that `measure_times` and `measure_workspaces` have seen."""
    return OpCost(_TIME_US[_key(node)], _WORKSPACE_BYTES[_key(node)])


def with_workspaces(cost: CostModel) -> CostModel:
    """A cost model with its workspaces replaced by the measured ones."""
    return lambda node: OpCost(cost(node).time_us, _WORKSPACE_BYTES.get(_key(node), 0))


@contextmanager
def cost_file(path: str | os.PathLike[str] | None, nodes: Sequence[fx.Node]) -> Iterator[None]:
    """Costs are known that the file at `path` holds; what is measured meanwhile for `nodes` is added to it.

    Raises:
        CostCacheError: the file is damaged, or can't be read or written.
    """
    if path is None or not nodes:
        yield
        return
    file, machine, threads = Path(path), cost_cache.machine_name(device(nodes[0])), torch.get_num_threads()
    kept = cost_cache.read(file, machine)
    for form, cost in kept.items():
        if "time_us" in cost:
            _TIME_US.setdefault((form, threads), float(cost["time_us"]))
        if "workspace_bytes" in cost:
            _WORKSPACE_BYTES.setdefault((form, threads), int(cost["workspace_bytes"]))
    yield
    costs = {key[0]: _known(key) for key in map(_key, nodes)}
    if any(kept.get(name, {}) != cost for name, cost in costs.items()):
        cost_cache.write(file, machine, costs)


def _known(key: tuple[str, int]) -> dict[str, float]:
    tables = (("time_us", _TIME_US), ("workspace_bytes", _WORKSPACE_BYTES))
    return {name: table[key] for name, table in tables if key in table}


@contextmanager
def _without_trace(node: fx.Node) -> Iterator[None]:
    """Run an op without gradients; what it draws is undone, and generators are left alone where it draws nothing."""
    ran = (node, *filter(None, map(private.producer, node.all_input_nodes)))
    with torch.no_grad(), torch.random.fork_rng(enabled=any(map(is_random, ran))):
        yield


@dataclass(frozen=True)
class _Call:
    """An op with real arguments of the right form."""

    target: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> _Call | None:
        """The call of a node, or None if it can't be made up."""
        made: dict[fx.Node, Any] = {}
        for source in node.all_input_nodes:
            recurrent = private.producer(source)
            if recurrent is not None:
                call = cls.of(recurrent)
                if call is None:
                    return None
                made[source] = call.run()[source.args[1]]
            else:
                made[source] = tree_map_only(torch.Tensor, _tensor_like, value(source))
        args, kwargs = tree_map_only(fx.Node, made.get, (node.args, node.kwargs))
        call = cls(node.target, args, kwargs)
        try:
            call.run()
        except Exception:  # values that the op refuses: it is then estimated
            return None
        return call

    def run(self) -> Any:
        """Run the op as emitted graphs do."""
        with plain_execution():
            return self.target(*self.args, **self.kwargs)


def _tensor_like(traced: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same form: small positive numbers, zeros for integers (valid as indices)."""
    size_bytes = traced.untyped_storage().nbytes()
    flat = torch.zeros(size_bytes // max(traced.element_size(), 1), dtype=traced.dtype, device=traced.device)
    if traced.dtype.is_floating_point or traced.dtype.is_complex:
        flat.fill_(0.5)
    return flat.as_strided(traced.shape, traced.stride(), traced.storage_offset())


def _measure_on_cpu(nodes: dict[tuple[str, int], fx.Node]) -> None:
    """Run the ops one after another under one profiler, with a marking allocation before each."""
    ran: list[tuple[tuple[str, int], fx.Node]] = []

    def run_all() -> None:
        for key, node in nodes.items():
            with _without_trace(node):
                call = _Call.of(node)
                if call is None:
                    _WORKSPACE_BYTES[key] = 0
                    continue
                ran.append((key, node))
                torch.empty(_MARK_BYTES, dtype=torch.uint8)
                result = call.run()
                torch.empty(_MARK_BYTES, dtype=torch.uint8)
                del result, call

    changes = list(allocation_changes(run_all))
    for (key, node), peak_bytes in zip(ran, _peaks_between_marks(changes), strict=True):
        _WORKSPACE_BYTES[key] = max(0, peak_bytes - written_bytes(node))


def _peaks_between_marks(changes: list[int]) -> Iterator[int]:
    """Peaks of the stretches that stand between an odd mark and the next."""
    inside, in_use, peak = False, 0, 0
    for change in changes:
        if change == _MARK_BYTES:
            if inside:
                yield peak
            inside, in_use, peak = not inside, 0, 0
        elif change != -_MARK_BYTES and inside:
            in_use += change
            peak = max(peak, in_use)


def _fastest_us(call: _Call, place: torch.device) -> float:
    times: list[float] = []
    while len(times) < _FEWEST_RUNS or (len(times) < _MOST_RUNS and sum(times) < _ENOUGH_US):
        _wait(place)
        start = time.perf_counter()
        call.run()
        _wait(place)
        times.append((time.perf_counter() - start) * 1e6)
    return min(times)


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.get_device_module(place.type).synchronize(place)


def _distinct(nodes: Iterable[fx.Node], known: dict[tuple[str, int], Any]) -> dict[tuple[str, int], fx.Node]:
    return {key: node for node in nodes if (key := _key(node)) not in known}


def _key(node: fx.Node) -> tuple[str, int]:
    return op_form(node), torch.get_num_threads()

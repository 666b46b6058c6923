"""What other planners do to a captured step, as schedules of its graph: so that one simulator prices all of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import GradAOTOutput
from torch._functorch.partitioners import min_cut_rematerialization_partition

from benchmarks.peers.subjects import GROUP_SIZES, segment_counts
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.profile.build import Profile
from fxckpt.upstream.ops.dropout import DROPOUT, DROPOUT_BACKWARD

Group = tuple[str, ...]
"""Paths of modules that are wrapped in one call of `checkpoint`."""

_TORCH_DROPOUT: dict[Any, Any] = {
    DROPOUT: torch.ops.aten.native_dropout.default,
    DROPOUT_BACKWARD: torch.ops.aten.native_dropout_backward.default,
}


def every(blocks: Sequence[str], size: int) -> list[Group]:
    """Blocks in groups of `size` neighbours."""
    return [tuple(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def sequential(blocks: Sequence[str], segments: int) -> list[Group]:
    """The groups of `checkpoint_sequential`, which leaves the last segment as it is."""
    length = len(blocks) // segments
    return [tuple(blocks[i * length : (i + 1) * length]) for i in range(segments - 1)]


def by_hand(graph: Graph, blocks: Sequence[str]) -> Iterator[tuple[str, Schedule]]:
    """What a user can do with `torch.utils.checkpoint` on these blocks: names and schedules."""
    for size in GROUP_SIZES:
        yield f"checkpoint every {size}", checkpointed(graph, every(blocks, size))
    for segments in segment_counts(len(blocks)):
        yield f"checkpoint_sequential {segments}", checkpointed(graph, sequential(blocks, segments))
    products = {s for op in graph.ops[: graph.forward_count] if op.flops for s in op.writes}
    yield "selective", checkpointed(graph, every(blocks, 1), kept=products)


def checkpointed(graph: Graph, groups: Sequence[Group], kept: Collection[int] = ()) -> Schedule:
    """The step in which each group of modules is run again before its backward.

    As `torch.utils.checkpoint` does it (not reentrant): all of a group's forward is repeated, in order, up to the last
    op that its backward needs, except for ops whose results a policy keeps.
    """
    group_of = [_group(op.module, groups) for op in graph.ops]
    order = list(range(graph.forward_count))
    repeated: set[int] = set()
    for index in range(graph.forward_count, len(graph.ops)):
        group = group_of[index]
        if group is not None and group not in repeated:
            order += _again(graph, group_of, group, kept)
            repeated.add(group)
        order.append(index)
    return Schedule(tuple(order), graph.forward_count)


def _group(module: str, groups: Sequence[Group]) -> int | None:
    for number, paths in enumerate(groups):
        if any(module == path or module.startswith(path + ".") for path in paths):
            return number
    return None


def _again(graph: Graph, group_of: list[int | None], group: int, kept: Collection[int]) -> list[int]:
    """The forward ops of a group that are repeated."""
    own = [i for i in range(graph.forward_count) if group_of[i] == group]
    repeatable = [i for i in own if not graph.ops[i].pinned and not _all_kept(graph, i, kept)]
    readers = [i for i in range(graph.forward_count, len(graph.ops)) if group_of[i] == group]
    needed = {s for i in readers for s in graph.ops[i].reads} - set(kept)
    last = max((i for i in repeatable if needed.intersection(graph.ops[i].writes)), default=-1)
    return [i for i in repeatable if i <= last]


def _all_kept(graph: Graph, index: int, kept: Collection[int]) -> bool:
    """Whether an op writes only what is kept."""
    return bool(graph.ops[index].writes) and all(s in kept for s in graph.ops[index].writes)


def torch_planner(profile: Profile, budget: float) -> Schedule:
    """What `torch.compile` runs with this `activation_memory_budget`: torch's own partitioner, in the order it emits.

    Its pass that merges equal ops is left out, since it is not about what to recompute and would change the graph.
    """
    module = _copied(profile.joint.module)
    outputs = module.graph.output_node()
    count = sum(not isinstance(desc, GradAOTOutput | None) for desc in outputs.meta["desc"])
    with functorch_config.patch(activation_memory_budget=budget, cse=False):
        halves = min_cut_rematerialization_partition(module, (), num_fwd_outputs=count)
    index_of = {op.name: index for index, op in enumerate(profile.graph.ops)}
    steps = [
        [index_of[n.name] for n in half.graph.nodes if n.op == "call_function" and n.name in index_of]
        for half in halves
    ]
    return Schedule((*steps[0], *steps[1]), len(steps[0]))


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy to partition, with dropout as the op that torch's partitioner knows."""
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in copied.graph.nodes:
        node.target = _TORCH_DROPOUT.get(node.target, node.target)
    return copied

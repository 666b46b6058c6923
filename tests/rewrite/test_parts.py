"""An op of the plan may stand for several nodes of the captured graph, which run as one, or for none."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxckpt.capture.watch import watch
from fxckpt.core.graph import Graph, Op
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import lowest
from fxckpt.errors import InvalidScheduleError, VerificationError
from fxckpt.options import Options
from fxckpt.pipeline import make_program, profile_step
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, run_forward


class Net(nn.Module):
    """Dropout, views, an op with several results, and ops that share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            hidden = F.gelu(self.first(x)).view(-1, 4, 16).transpose(1, 2).reshape(-1, 64)
            x = x + F.dropout(self.second(torch.tanh(hidden) * torch.sigmoid(hidden)), 0.3)
            x = self.norm(x)
        return x.square().sum()


def profile_of(model: nn.Module, x: Tensor) -> Profile:
    options = Options(2**62, cost_model="reference", run_ops=False)
    return profile_step(model, (x,), {}, options, forward=model.forward, gradients_allocated=False)


def joined(first: Op, second: Op) -> Op:
    """One op that does what two neighbours do, one after the other."""
    reads = dict.fromkeys((*first.reads, *(s for s in second.reads if s not in first.writes)))
    return replace(
        first,
        name=f"{first.name}+{second.name}",
        target=f"{first.target}+{second.target}",
        reads=tuple(reads),
        writes=(*first.writes, *second.writes),
        replay=(*first.replay, *second.replay),
        time_us=first.time_us + second.time_us,
        ordered=first.ordered or second.ordered,
    )


def in_pairs(profile: Profile) -> Profile:
    """The profile with every second op joined to the one before, in forward and in backward."""
    graph, ops, parts = profile.graph, list[Op](), list[tuple[fx.Node, ...]]()
    forward_count = 0
    for half in (range(graph.forward_count), range(graph.forward_count, len(graph.ops))):
        for group in (half[i : i + 2] for i in range(0, len(half), 2)):
            members = [graph.ops[i] for i in group]
            ops.append(joined(*members) if len(members) == 2 else members[0])
            parts.append(tuple(node for i in group for node in profile.parts[i]))
        forward_count = forward_count or len(ops)
    coarse = replace(graph, ops=tuple(ops), forward_count=forward_count)
    coarse.check()
    return replace(profile, graph=coarse, parts=tuple(parts))


def gradients(model: nn.Module, program: Program, x: Tensor) -> list[Tensor]:
    def no_other(_: object) -> Program:
        raise AssertionError("backward starts from other outputs")

    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    (loss,) = run_forward(program, watch(model).given(program.roles.inputs, [x]), no_other)
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def plain_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    model(x).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("solver", ["save_all", "min_memory", "sqrt"])
def test_pairs_of_nodes_run_as_one_op_with_the_same_bits(solver: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 16)
    profile = in_pairs(profile_of(model, x))
    assert len(profile.graph.ops) < len(profile.nodes)
    found = lowest(profile.graph, solver)
    assert solver == "save_all" or found.schedule.repeats()
    program = make_program(profile, found.timeline)  # verified: order, arguments and lifetimes are those simulated
    steps = [
        (node.meta["fxckpt_step"], node.meta["fxckpt_node"])
        for graph in (program.emitted.forward, program.emitted.backward)
        for node in graph.nodes
        if "fxckpt_step" in node.meta
    ]
    assert steps == [(s, n) for s, op in enumerate(found.schedule.order) for n in profile.parts[op]]
    for ours, theirs in zip(gradients(model, program, x), plain_gradients(model, x), strict=True):
        assert torch.equal(ours, theirs)


def test_the_nodes_of_a_part_are_checked_one_by_one() -> None:
    profile = in_pairs(profile_of(Net(), torch.randn(32, 16)))
    index = next(i for i, part in enumerate(profile.parts) if len(part) == 2)
    parts = list(profile.parts)
    parts[index] = parts[index][:1]
    with pytest.raises((VerificationError, InvalidScheduleError)):
        make_program(replace(profile, parts=tuple(parts)), simulate(profile.graph, plain(profile.graph)))


def test_an_op_without_a_node_is_refused_by_name() -> None:
    profile = profile_of(Net(), torch.randn(32, 16))
    graph = profile.graph
    storage = next(
        s
        for s, info in enumerate(graph.storages)
        if info.kind == "activation" and 0 <= graph.producer[s] < graph.forward_count
    )
    fetch = Op(name="fetch", target="fxckpt.fetch", reads=(), writes=(storage,))
    wider: Graph = replace(graph, ops=(*graph.ops, fetch), alternatives=1)
    wider.check()
    order = (*range(graph.forward_count), len(graph.ops), *range(graph.forward_count, len(graph.ops)))
    timeline = simulate(wider, Schedule(order, graph.forward_count))
    widened = replace(profile, graph=wider, parts=(*profile.parts, ()))
    with pytest.raises(InvalidScheduleError, match=r"runs fetch, which stands for no op of the captured graph"):
        make_program(widened, timeline)
    make_program(widened, simulate(wider, plain(wider)))  # nobody has to take the other way


def test_every_pair_is_a_pair_of_neighbours() -> None:
    profile = profile_of(Net(), torch.randn(32, 16))
    coarse = in_pairs(profile)
    assert list(coarse.nodes) == list(profile.nodes)
    place = {node: i for i, node in enumerate(profile.nodes)}
    assert all(place[b] == place[a] + 1 for part in coarse.parts for a, b in pairwise(part))

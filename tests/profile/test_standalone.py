"""Ops are measured on arguments that mean something to them, and nothing that is run leaves a trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxckpt
from fxckpt.capture.joint import JointGraph, capture
from fxckpt.errors import MeasuringWarning
from fxckpt.profile import known, measure, standalone, workspace
from fxckpt.profile.build import OpCost, working_nodes
from fxckpt.profile.known import Known
from fxckpt.profile.measure import measured
from fxckpt.profile.standalone import NoMemory, NotRunnable, Standalone, has_meaning, try_run

MAGIC, SEED = 1234.5, 77
LIBRARY = torch.library.Library("hidden_meaning", "DEF")
WRONG: list[str] = []
"""What the kernels below were given instead of what they had noted."""


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN", Known())
    monkeypatch.setattr(measure, "KNOWN", known.KNOWN)
    WRONG.clear()


def _forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    notes = torch.full(x.shape[:1], MAGIC)
    return x * 2, notes, torch.tensor(SEED), torch.empty(3, device="meta")


def _forward_described(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:1]), torch.empty((), dtype=torch.long), torch.empty(3)


def _backward(gradient: Tensor, y: Tensor, notes: Tensor, seed: Tensor, elsewhere: Tensor) -> Tensor:
    if not bool((notes == MAGIC).all()):
        WRONG.append("notes")
    if int(seed) != SEED:
        WRONG.append("seed")
    if elsewhere.device.type != "meta":  # as tracing does not say
        WRONG.append("device")
    return gradient * y


LIBRARY.define("forward(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    "backward(Tensor gradient, Tensor y, Tensor notes, Tensor seed, Tensor elsewhere) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("forward", _forward, "CPU")
LIBRARY.impl("forward", _forward_described, "Meta")
LIBRARY.impl("backward", _backward, "CPU")
LIBRARY.impl("backward", lambda gradient, *_: torch.empty_like(gradient), "Meta")


def graph_of(*nodes: tuple[Any, tuple[Any, ...], Any]) -> list[fx.Node]:
    """A graph of calls, each a target, arguments (numbers of earlier nodes are nodes) and a traced value."""
    graph = fx.Graph()
    made: list[fx.Node] = []
    for target, args, traced in nodes:
        if target is None:
            node = graph.placeholder(f"x{len(made)}")
        else:
            node = graph.call_function(target, tuple(made[a.index] if isinstance(a, At) else a for a in args))
        node.meta["val"] = traced
        made.append(node)
    return made


class At:
    """The node of this number."""

    def __init__(self, index: int) -> None:
        self.index = index


def test_what_an_op_notes_for_another_is_handed_over_as_it_was_returned() -> None:
    import operator

    x = torch.empty(5, 4, device="meta")
    described = (x, x[:, 0].clone(), torch.empty((), dtype=torch.long, device="meta"), torch.empty(3, device="meta"))
    on_cpu = [torch.empty(t.shape, dtype=t.dtype) for t in described]
    ops = torch.ops.hidden_meaning
    notes = on_cpu[1]
    nodes = graph_of(
        (None, (), torch.empty(5, 4)),
        (ops.forward.default, (At(0),), tuple(on_cpu)),
        *((operator.getitem, (At(1), i), on_cpu[i]) for i in range(4)),
        (torch.ops.aten.view.default, (At(3), [1, 5]), notes.view(1, 5)),
        (torch.ops.aten.view.default, (At(6), [5]), notes.view(5)),
        (ops.backward.default, (At(0), At(2), At(7), At(4), At(5)), torch.empty(5, 4)),
    )
    call = Standalone().call(nodes[-1])
    try_run(call)
    assert WRONG == []
    assert [has_meaning(n) for n in nodes] == [False, True, False, True, True, True, True, True, False]
    assert bool((call.args[1] == 1.0).all())  # the first result is there, too, so it is what belongs to the others


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(2, 8, 4, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


class Mixture(nn.Module):
    """Experts are chosen by numbers: what is gathered depends on indices that the model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(16, 3), nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        mixed: Tensor = (self.expert[chosen] * weights[..., None]).sum(-2)
        return mixed.cumsum(0)


class Ranked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        order = x.argsort(-1)
        kept = x > 0
        return x.gather(-1, order).masked_fill(kept, 0.0)


MENU = {
    "attention": (Attention(), torch.randn(2, 8, 16, requires_grad=True)),
    "batch norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)),
    "dropout": (nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), torch.randn(4, 16)),
    "group norm": (nn.GroupNorm(2, 4), torch.randn(2, 4, 8)),
    "layer norm": (nn.LayerNorm(16), torch.randn(4, 16)),
    "lstm": (nn.LSTM(4, 5, 2), torch.randn(3, 2, 4)),
    "mixture": (Mixture(), torch.randn(4, 16)),
    "pooling": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), torch.randn(2, 3, 8, 8)),
    "ranked": (Ranked(), torch.randn(4, 16, requires_grad=True)),
}


@pytest.fixture(params=MENU)
def joint(request: pytest.FixtureRequest) -> JointGraph:
    model, x = MENU[request.param]
    return capture(model, (x,))


def test_nothing_but_numbers_is_made_up(joint: JointGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up: list[Tensor] = []
    original = standalone._tensor_like

    def noting(traced: Tensor) -> Tensor:
        made_up.append(traced)
        return original(traced)

    monkeypatch.setattr(standalone, "_tensor_like", noting)
    nodes = working_nodes(joint)
    for node in nodes:
        call = Standalone().call(node)
        with call.aside():
            try_run(call)
    assert made_up
    given = [id(node.meta["val"]) for node in joint.module.graph.nodes if node.op == "placeholder"]
    assert all(t.dtype.is_floating_point or id(t) in given for t in made_up)
    notes = {id(t) for n in nodes if isinstance(n.meta["val"], tuple) for t in n.meta["val"][1:]}
    assert not notes & {id(t) for t in made_up}


def test_generators_are_left_as_they_were(joint: JointGraph) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured(working_nodes(joint), lambda _: OpCost(1.0), times=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not known.KNOWN.refused


def test_an_op_that_does_not_say_that_it_draws_is_undone_too() -> None:
    library = torch.library.Library("draws_in_secret", "DEF")
    library.define("noise(Tensor x) -> Tensor")

    def noise(x: Tensor) -> Tensor:
        return x + torch.rand(())

    register: Any = library.impl
    register("noise", noise, "CPU")
    nodes = graph_of((None, (), torch.empty(3)), (torch.ops.draws_in_secret.noise.default, (At(0),), torch.empty(3)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured(nodes[1:], lambda _: OpCost(1.0), times=True)
    assert known.KNOWN.times_us
    assert torch.equal(torch.get_rng_state(), before)


ACTS: dict[str, Any] = {
    "collective": lambda x: (torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"), torch.empty(3)),
    "waits": lambda x: (torch.ops._c10d_functional.wait_tensor.default, (x,), torch.empty(3)),
    "looks at values": lambda x: (torch.ops.aten._assert_async.default, (x,), None),
    "no operator": lambda x: (torch.add, (x, x), torch.empty(3)),
}


@pytest.mark.parametrize("what", ACTS)
def test_what_acts_on_more_than_its_arguments_is_never_run(what: str) -> None:
    nodes = graph_of((None, (), torch.empty(3)), ACTS[what](At(0)))
    with pytest.raises(NotRunnable, match="acts on more"):
        Standalone().call(nodes[1])
    cost = measured(nodes[1:], lambda _: OpCost(7.0), times=True)
    assert cost(nodes[1]) == OpCost(7.0, 0)


def test_results_of_what_is_never_run_make_nothing_up() -> None:
    reduce, wait = torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default
    index = torch.empty(3, dtype=torch.long)
    nodes = graph_of(
        (None, (), torch.empty(3, dtype=torch.long)),
        (reduce, (At(0), "sum", "0"), index),
        (wait, (At(1),), index),
        (None, (), torch.empty(9)),
        (torch.ops.aten.gather.default, (At(3), 0, At(2)), torch.empty(3)),
    )
    with pytest.raises(NotRunnable, match="wait_tensor"):
        Standalone().call(nodes[-1])


class Last(nn.Module):
    """Zeros for lengths, which nobody gave, would index in front of the first element."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        features: Tensor = self.linear(x)
        return features.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 4)).sum()


def test_integers_are_those_of_the_call() -> None:
    model, args = Last(), (torch.randn(3, 5, 4), torch.tensor([5, 2, 3]))
    fxckpt.plan(model, 1.0, example_inputs=args, cost_model="measure")
    assert known.KNOWN.workspace_bytes
    assert not known.KNOWN.refused


def test_constants_and_given_tensors_are_not_changed_by_ops_that_change_their_arguments() -> None:
    ids = torch.tensor([1, 2, 3])
    nodes = graph_of(
        (None, (), torch.empty(3, dtype=torch.long)),
        (torch.ops.aten.add_.Scalar, (At(0), 1), torch.empty(3, dtype=torch.long)),
    )
    try_run(Standalone({nodes[0]: ids}).call(nodes[1]))
    assert ids.tolist() == [1, 2, 3]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrix products of more than the first number of rows find no memory; the second counts how often."""
    limit = [4, 0]
    original = standalone.try_run

    def run(call: Any) -> Any:
        if call.target is torch.ops.aten.mm.default and call.args[0].shape[0] > limit[0]:
            limit[1] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(call)

    monkeypatch.setattr(workspace, "try_run", run)
    return limit


def products() -> list[fx.Node]:
    mm = torch.ops.aten.mm.default
    nodes = graph_of(
        (None, (), torch.empty(4, 4)),
        (None, (), torch.empty(8, 4)),
        (mm, (At(0), At(0)), torch.empty(4, 4)),
        (mm, (At(1), At(0)), torch.empty(8, 4)),
    )
    return nodes[2:]


def test_short_memory_is_said_and_not_taken_for_no_workspace(small_memory: list[int]) -> None:
    small, large = products()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known.KNOWN.workspace_bytes[known.key_of(small)] = 64  # as large as its result
    with pytest.warns(MeasuringWarning, match="not enough memory to measure 1 ops"):
        cost = measured([small, large], lambda _: OpCost(1.0), times=False)
    assert cost(large).workspace_bytes == 128
    assert small_memory[1] == 2  # tried again when what torch keeps in reserve is free
    assert known.key_of(large) not in known.KNOWN.workspace_bytes  # another time there may be enough
    small_memory[0] = 100
    assert measured([small, large], lambda _: OpCost(1.0), times=False)(large).workspace_bytes == 0


def test_memory_that_is_there_at_the_second_try_is_enough() -> None:
    tries = []

    def run() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return 3

    assert standalone.with_memory(run) == 3

    def never() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(NoMemory, match="out of memory"):
        standalone.with_memory(never)


def test_an_error_of_the_device_ends_planning() -> None:
    """All that runs after it would fail, too, and be taken for ops that can't be run."""
    library = torch.library.Library("breaks_the_device", "DEF")
    library.define("op(Tensor x) -> Tensor")

    def op(_: Tensor) -> Tensor:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    register: Any = library.impl
    register("op", op, "CPU")
    nodes = graph_of((None, (), torch.empty(3)), (torch.ops.breaks_the_device.op.default, (At(0),), torch.empty(3)))
    with pytest.raises(torch.AcceleratorError):
        measured(nodes[1:], lambda _: OpCost(1.0), times=False)

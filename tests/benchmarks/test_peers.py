"""What other ways to save memory do, as benchmarks apply it, is what the simulated schedules of them say."""

from __future__ import annotations

import pytest

from benchmarks import torch_planner
from benchmarks.peers.eager import applied, peers, run_flops
from benchmarks.peers.schedules import by_hand, sequential
from benchmarks.peers.schedules import torch_planner as torch_schedule
from benchmarks.peers.subjects import Subject, subjects
from benchmarks.torch_planner import Comparison, Cost, Rival
from fxckpt.capture.joint import capture
from fxckpt.core.schedule import plain
from fxckpt.profile.build import Profile, build
from fxckpt.profile.costs import estimated
from fxckpt.profile.devices import DEVICES
from fxckpt.steps.comparison import gradients_of, largest_difference

WITH_PYTREE_WARNING = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")


def profile(subject: Subject) -> Profile:
    model, args, kwargs = subject.quick.build()
    return build(capture(model, args, kwargs), estimated(DEVICES["cpu"]))


def subject(name: str) -> Subject:
    return subjects([name])[0]


@pytest.mark.parametrize("name", ["gpt12_dropout", "unet4", "mlp32"])
def test_checkpoints_repeat_the_flops_that_their_schedules_say(name: str) -> None:
    model = subject(name).quick.build()[0]
    blocks = list(subject(name).paths(model))
    graph = profile(subject(name)).graph
    predicted = {name: Cost.of(graph, schedule) for name, schedule in by_hand(graph, blocks)}
    plain_step = applied(subject(name).quick, lambda model: model)
    gradients, plain_flops = gradients_of(plain_step), run_flops(plain_step)
    compared = 0
    for peer in peers(model, blocks, subject(name).is_chain, ()):
        step = applied(subject(name).quick, peer.apply)
        assert largest_difference(gradients_of(step), gradients) == 0, peer.name
        if peer.name in predicted:
            compared += 1
            ratio = run_flops(step) / plain_flops - 1
            assert ratio == pytest.approx(predicted[peer.name].repeated_flops_ratio), peer.name
    assert compared == (len(predicted) if subject(name).is_chain else 2)


@pytest.mark.slow
@WITH_PYTREE_WARNING
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["gpt12", "unet4", "llama12"])
def test_torchs_planner_repeats_the_flops_that_its_schedule_says(name: str, budget: float) -> None:
    profiled = profile(subject(name))
    predicted = Cost.of(profiled.graph, torch_schedule(profiled, budget))
    model = subject(name).quick.build()[0]
    compiled = [p for p in peers(model, (), False, [budget]) if p.family == "torch.compile"]
    step = applied(subject(name).quick, compiled[0].apply)
    step.warm_up()
    plain_flops = sum(op.flops for op in profiled.graph.ops)
    assert run_flops(step) / plain_flops - 1 == pytest.approx(predicted.repeated_flops_ratio)


@pytest.mark.slow
@WITH_PYTREE_WARNING
@pytest.mark.parametrize("name", torch_planner.MODELS)
def test_no_peer_repeats_fewer_flops_at_its_peak(name: str) -> None:
    found = torch_planner.compare(subject(name), [0.0, 0.05, 0.25, 0.5, 1.0], quick=True)
    assert [rival.name for rival in found.rivals if not rival.is_met] == []
    assert found.floor_bytes < found.lowest_peak_bytes


def test_the_last_segment_of_checkpoint_sequential_is_left_as_it_is() -> None:
    assert sequential(["a", "b", "c", "d", "e"], 2) == [("a", "b")]
    assert sequential(["a", "b", "c", "d", "e", "f"], 3) == [("a", "b"), ("c", "d")]


def test_a_comparison_is_not_met_where_a_peer_is_better() -> None:
    peer = Cost(100, 0.25)
    better, worse, absent = Rival("", peer, Cost(90, 0.25)), Rival("", peer, Cost(90, 0.5)), Rival("", peer, None)

    def is_met(rival: Rival, floor_bytes: int = 50) -> bool:
        return Comparison("", 200, 10, floor_bytes, (rival,)).is_met

    assert is_met(better)
    assert not is_met(worse)
    assert not is_met(absent)
    assert not is_met(better, floor_bytes=100)


def test_a_cost_of_the_plain_step_repeats_nothing() -> None:
    graph = profile(subject("mlp32")).graph
    assert Cost.of(graph, plain(graph)).repeated_flops_ratio == 0

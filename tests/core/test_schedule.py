from dataclasses import replace

import pytest
from hypothesis import given

from fxckpt.core import schedule as schedules
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.schedule import Delivery, Schedule, deliveries, plain
from fxckpt.errors import InvalidScheduleError
from tests.support.strategies import chain, graphs, graphs_with_schedules

# The ops of chain(): f0 f1 f2 f3 are 0-3, b3 b2 b1 b0 are 4-7.


def test_the_plain_schedule_runs_every_op_once() -> None:
    schedule = plain(chain())
    assert schedule == Schedule((0, 1, 2, 3, 4, 5, 6, 7), 4)
    assert len(schedule) == 8
    assert schedule.repeats() == {}


def test_repeats_count_the_runs_after_the_first() -> None:
    assert Schedule((0, 1, 0, 2, 0, 1), 4).repeats() == {0: 2, 1: 1}


@given(graphs_with_schedules())
def test_valid_schedules_pass(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    schedules.check(graph, plain(graph))
    schedules.check(graph, schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule((0, 1, 2, 3, 4, 5, 6, 7), 9), "forward_steps is 9 of 8"),
        (Schedule((0, 1, 2, 3, 4, 5, 6, 7), -1), "forward_steps is -1"),
        (Schedule((0, 1, 2, 3, 4, 5, 6, 8), 4), "step 7 names op 8"),
        (Schedule((0, 1, 2, 3, 4, 5, 6, -1), 4), "step 7 names op -1"),
        (Schedule((0, 2, 1, 3, 4, 5, 6, 7), 4), "step 1 runs f2, which reads a1"),
        (Schedule((0, 1, 2, 3, 5, 4, 6, 7), 4), "step 4 runs b2, which reads ga2"),
        (Schedule((0, 1, 2, 3, 4, 5, 6, 7), 5), "step 4 runs the backward op b3 in forward"),
        (Schedule((0, 1, 2, 4, 5, 6, 7), 3), "forward ends, but nothing wrote a3"),
        (Schedule((0, 1, 2, 3, 4, 5, 6), 4), "backward ends, but nothing wrote gw0"),
        (Schedule((0, 1, 2, 3), 4), "backward ends, but nothing wrote gw0"),
        (Schedule((0, 1, 2), 3), "forward ends, but nothing wrote a3"),
        (Schedule((), 0), "forward ends, but nothing wrote a3"),
    ],
)
def test_what_does_not_compute_the_step_is_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(InvalidScheduleError, match=message):
        schedules.check(chain(), schedule)


def test_an_update_must_be_written_in_forward() -> None:
    graph = replace(chain(), outputs=(), updates=(8,))
    schedules.check(graph, plain(graph))
    with pytest.raises(InvalidScheduleError, match="forward ends, but nothing wrote a3"):
        schedules.check(graph, Schedule((0, 1, 2, 3, 4, 5, 6, 7), 3))


def test_a_pinned_op_must_not_be_repeated() -> None:
    graph = chain()
    graph = replace(graph, ops=(replace(graph.ops[0], pinned="it sends mail"), *graph.ops[1:]))
    schedules.check(graph, Schedule((0, 1, 2, 3, 4, 5, 1, 6, 7), 4))
    with pytest.raises(InvalidScheduleError, match="step 6 repeats f0, which must run once: it sends mail"):
        schedules.check(graph, Schedule((0, 1, 2, 3, 4, 5, 0, 6, 7), 4))


def two_draws(*, ordered: bool) -> Graph:
    names = ("first", "second")
    ops = tuple(Op(name, "rand", (), (i,), ordered=ordered) for i, name in enumerate(names))
    return Graph(ops, tuple(Storage(n, 1, "activation") for n in names), forward_count=2)


def test_first_runs_of_ordered_ops_keep_their_order() -> None:
    swapped = Schedule((1, 0), 2)
    schedules.check(two_draws(ordered=False), swapped)
    with pytest.raises(InvalidScheduleError, match="first must run before second"):
        schedules.check(two_draws(ordered=True), swapped)


def test_repeats_of_ordered_ops_may_come_in_any_order() -> None:
    schedules.check(two_draws(ordered=True), Schedule((0, 1, 1, 0, 1), 2))


def test_ordered_ops_run_and_those_of_forward_in_forward() -> None:
    schedules.check(two_draws(ordered=False), Schedule((0,), 1))
    with pytest.raises(InvalidScheduleError, match=r"forward ends, but second, which .* never ran"):
        schedules.check(two_draws(ordered=True), Schedule((0,), 1))
    with pytest.raises(InvalidScheduleError, match=r"forward ends, but second, which .* never ran"):
        schedules.check(two_draws(ordered=True), Schedule((0, 1), 1))
    backward = replace(two_draws(ordered=True), forward_count=1)
    schedules.check(backward, Schedule((0, 1), 1))
    with pytest.raises(InvalidScheduleError, match=r"backward ends, but second, which .* never ran"):
        schedules.check(backward, Schedule((0,), 1))


def test_a_tangent_may_be_a_gradient_without_any_backward_op() -> None:
    graph = Graph((), (Storage("t", 8, "tangent"),), forward_count=0, gradients=(0,))
    schedules.check(graph, Schedule((), 0))


def test_gradients_leave_one_by_one_when_each_fills_a_stage() -> None:
    graph = chain(weight_bytes=1000)  # gradients are 4000 bytes: a stage is 31
    gw3, gw2, gw1, gw0 = 11, 13, 15, 16
    assert deliveries(graph, plain(graph)) == [
        Delivery(4, (gw3,)),
        Delivery(5, (gw2,)),
        Delivery(6, (gw1,)),
        Delivery(7, (gw0,)),
    ]


def test_small_gradients_wait_for_each_other() -> None:
    small, big = Storage("small", 1, "backward"), Storage("big", 1000, "backward")
    ops = tuple(Op(f"b{i}", "op", (), (i,)) for i in range(5))
    graph = Graph(ops, (small, small, big, small, small), forward_count=0, gradients=(0, 1, 2, 3, 4))
    assert graph.stage_bytes == 1004 // 8
    assert deliveries(graph, plain(graph)) == [Delivery(2, (0, 1, 2)), Delivery(4, (3, 4))]


def test_a_gradient_that_is_a_tangent_leaves_first_and_a_repeat_delivers_nothing() -> None:
    storages = (Storage("t", 512, "tangent"), Storage("g", 512, "backward"))
    graph = Graph((Op("b", "op", (0,), (1,)),), storages, forward_count=0, gradients=(1, 0))
    assert deliveries(graph, Schedule((0, 0), 0)) == [Delivery(0, (0, 1))]


@given(graphs_with_schedules())
def test_every_gradient_leaves_once_and_no_more_than_a_stage_waits(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    stages = deliveries(graph, schedule)
    delivered = [s for stage in stages for s in stage.gradients]
    assert len(set(delivered)) == len(delivered)
    if len(schedule) > schedule.forward_steps:
        assert set(delivered) == set(graph.gradients)
    assert [s.step for s in stages] == sorted({s.step for s in stages})
    for stage in stages:
        written = {s for i in schedule.order[: stage.step + 1] for s in graph.ops[i].writes}
        waiting_bytes = sum(graph.storages[s].size_bytes for s in stage.gradients)
        last = stage.step == len(schedule) - 1
        assert all(s in written or graph.storages[s].kind == "tangent" for s in stage.gradients)
        assert last or waiting_bytes >= graph.stage_bytes
    for stage in stages:
        finished_here = set(graph.ops[schedule.order[stage.step]].writes)
        before = sum(graph.storages[s].size_bytes for s in stage.gradients if s not in finished_here)
        first_of_backward = stage.step == schedule.forward_steps  # tangents that pass through wait from the start
        assert before < graph.stage_bytes or first_of_backward or stage.step == len(schedule) - 1


@given(graphs())
def test_schedules_of_odd_graphs_are_still_checked(graph: Graph) -> None:
    schedule = plain(graph)
    if graph.gradients and any(graph.storages[s].kind == "backward" for s in graph.gradients):
        with pytest.raises(InvalidScheduleError):
            schedules.check(graph, Schedule(schedule.order[: graph.forward_count], graph.forward_count))

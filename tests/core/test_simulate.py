import numpy as np
import pytest
from hypothesis import given

from fxckpt.core.graph import RESIDENT, Graph, Op, Storage
from fxckpt.core.lifetimes import Lifetime
from fxckpt.core.schedule import Schedule, deliveries, plain
from fxckpt.core.simulate import PEAK_KINDS, Timeline, simulate
from fxckpt.errors import InvalidScheduleError
from tests.support.strategies import chain, graphs_with_schedules

# chain(): activations a0 a1 a2 a3 of 10 20 40 1 bytes (storages 5-8), a tangent of 1 (9), then ga2 gw3, ga1 gw2,
# ga0 gw1, gw0 (10-16); weights and their gradients take 4. f<i> takes i+1 µs, b<i> twice that. Always there: x 7 and
# 4 weights, 23 bytes.


def test_the_plain_chain() -> None:
    timeline = simulate(chain(), plain(chain()))
    assert timeline.live_bytes.tolist() == [
        23 + 10,  # f0: a0
        23 + 10 + 20,  # f1: a0 a1
        23 + 10 + 20 + 40,  # f2: a0 a1 a2
        23 + 10 + 20 + 40 + 1,  # f3: a0 a1 a2 a3
        23 + 10 + 20 + 40 + 1 + 1 + 40 + 4,  # b3: a0 a1 a2 a3, tangent, ga2, gw3
        23 + 10 + 20 + 1 + 40 + 20 + 4 + 4,  # b2: a0 a1 a3, ga2 ga1, gw3 gw2
        23 + 10 + 1 + 20 + 10 + 4 + 4 + 4,  # b1: a0 a3, ga1 ga0, gw3 gw2 gw1
        23 + 1 + 10 + 4 + 4 + 4 + 4,  # b0: a3, ga0, gw3 gw2 gw1 gw0
    ]
    assert (timeline.peak_step, timeline.peak_bytes) == (4, 139)
    assert (timeline.step_us, timeline.recompute_us) == (30.0, 0.0)
    assert timeline.saved == (5, 6, 7)
    assert timeline.saved_bytes == 70


def test_recomputing_the_widest_activation_does_not_help_where_its_gradient_stands_beside_it() -> None:
    # f2 runs again just before b3, so a2 is gone only between f3 and b3, and the peak is at b3 as before.
    timeline = simulate(chain(), Schedule((0, 1, 2, 3, 2, 4, 5, 6, 7), 4))
    assert timeline.live_bytes.tolist() == [
        33,
        53,
        93,
        94,
        23 + 10 + 20 + 1 + 1 + 40,  # f2 again: a0 a1 a3, tangent, a2
        139,
        102 + 20,
        76,
        50,
    ]
    assert timeline.peak_bytes == 139
    assert (timeline.step_us, timeline.recompute_us) == (33.0, 3.0)
    assert timeline.saved == (5, 6)


def test_recomputing_the_rest_does_help() -> None:
    # a0 is freed after f1 and made again before b1; a1 is freed after f2 and made again, with a0 for it, before b2.
    timeline = simulate(chain(), Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4))
    assert timeline.live_bytes.tolist() == [
        23 + 10,  # f0
        23 + 10 + 20,  # f1
        23 + 20 + 40,  # f2: a0 is gone
        23 + 40 + 1,  # f3: a1 is gone
        23 + 40 + 1 + 1 + 40 + 4,  # b3: a2 a3, tangent, ga2, gw3
        23 + 1 + 40 + 4 + 10,  # f0 again: a3, ga2, gw3, a0
        23 + 1 + 40 + 4 + 10 + 20,  # f1 again
        23 + 1 + 40 + 4 + 10 + 20 + 20 + 4,  # b2: a0 a1 a3, ga2 ga1, gw3 gw2
        23 + 1 + 10 + 20 + 10 + 12,  # b1
        23 + 1 + 10 + 16,  # b0
    ]
    assert timeline.peak_bytes == 122
    assert timeline.recompute_us == 3.0
    assert timeline.saved == (7,)
    assert [x for x in timeline.lifetimes if x.storage == 5] == [Lifetime(5, 0, 1, False), Lifetime(5, 5, 8, True)]


def test_allocated_gradients_are_there_from_the_start_and_new_ones_leave_at_once() -> None:
    graph = chain(weight_bytes=400).with_gradients(allocated=True)  # a stage is 12 bytes: each gradient is one
    timeline = simulate(graph, plain(graph))
    always = 7 + 4 * 400 + 4 * 400
    assert timeline.live_bytes.tolist() == [
        always + 10,
        always + 30,
        always + 70,
        always + 71,
        always + 70 + 1 + 1 + 40 + 400,  # b3 makes gw3, which leaves
        always + 30 + 1 + 40 + 20 + 400,
        always + 10 + 1 + 20 + 10 + 400,
        always + 1 + 10 + 400,
    ]


def test_waiting_gradients_live_until_their_stage_ends() -> None:
    storages = (Storage("small", 1, "backward"), Storage("big", 999, "backward"), Storage("other", 7, "backward"))
    ops = tuple(Op(name, "op", (), (i,)) for i, name in enumerate(("b0", "b1", "b2")))
    graph = Graph(ops, storages, 0, gradients=(0, 1, 2), gradients_allocated=True, allocated_gradient_bytes=1007)
    assert graph.stage_bytes == 7
    assert simulate(graph, plain(graph)).live_bytes.tolist() == [1008, 1007 + 1 + 999, 1007 + 7]


def test_fresh_gradients_stay_to_the_end() -> None:
    storages = (Storage("g0", 1, "backward"), Storage("g1", 2, "backward"))
    graph = Graph(tuple(Op(f"b{i}", "op", (), (i,)) for i in range(2)), storages, 0, gradients=(0, 1))
    assert simulate(graph, plain(graph)).live_bytes.tolist() == [1, 3]


def test_updates_live_to_the_end_of_forward_and_outputs_to_the_end_of_the_step() -> None:
    storages = tuple(Storage(n, s, "activation") for n, s in (("update", 1), ("output", 2), ("other", 4)))
    ops = (*(Op(f"f{i}", "op", (), (i,)) for i in range(3)), Op("b", "op", (), ()))
    graph = Graph(ops, storages, 3, outputs=(1,), updates=(0,))
    assert simulate(graph, plain(graph)).live_bytes.tolist() == [1, 3, 7, 2]


def test_a_repeat_of_what_makes_an_output_makes_a_second_copy() -> None:
    storages = (Storage("output", 8, "activation"),)
    graph = Graph((Op("f", "op", (), (0,)), Op("b", "op", (0,), ())), storages, 1, outputs=(0,))
    assert simulate(graph, Schedule((0, 0, 1), 1)).live_bytes.tolist() == [8, 16, 16]


def test_tangents_come_with_backward_and_go_with_their_last_reader() -> None:
    storages = (Storage("t", 8, "tangent"), Storage("unread", 16, "tangent"))
    ops = (Op("f", "op", (), ()), Op("b0", "op", (0,), ()), Op("b1", "op", (), ()))
    assert simulate(Graph(ops, storages, 1), plain(Graph(ops, storages, 1))).live_bytes.tolist() == [0, 24, 0]


def test_what_an_op_writes_takes_memory_even_if_nobody_reads_it() -> None:
    graph = Graph((Op("f", "op", (), (0,)), Op("g", "op", (), ())), (Storage("unread", 8, "activation"),), 2)
    assert simulate(graph, plain(graph)).live_bytes.tolist() == [8, 0]


def test_workspace_counts_while_its_op_runs_each_time_it_runs() -> None:
    graph = Graph((Op("f", "op", (), (), workspace_bytes=5), Op("g", "op", (), ())), (), 2, reserved_bytes=100)
    timeline = simulate(graph, Schedule((0, 1, 0), 3))
    assert timeline.live_bytes.tolist() == [105, 100, 105]
    assert timeline.breakdown(0)["temporaries"] == 5
    assert timeline.breakdown(0)["reserved"] == 100


def test_what_a_repeat_replays_takes_memory_only_if_the_op_is_repeated() -> None:
    storages = (Storage("mask", 1, "activation"), Storage("state", 50, "activation"))
    ops = (Op("rand", "op", (), (0,), replay=(1,)), Op("other", "op", (), ()), Op("b", "op", (0,), ()))
    graph = Graph(ops, storages, 2)
    assert simulate(graph, plain(graph)).live_bytes.tolist() == [1, 1, 1]
    repeated = simulate(graph, Schedule((0, 1, 0, 2), 2))
    assert repeated.live_bytes.tolist() == [51, 50, 51, 1]
    assert repeated.saved == (1,)
    assert repeated.saved_bytes == 50


def test_an_empty_step_takes_what_is_there_anyway() -> None:
    graph = Graph((), (Storage("w", 12, "parameter"),), 0, reserved_bytes=3)
    timeline = simulate(graph, Schedule((), 0))
    assert (timeline.peak_step, timeline.peak_bytes, timeline.step_us) == (-1, 15, 0)


def test_breakdown_of_the_peak() -> None:
    timeline = simulate(chain(), Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4))
    assert timeline.breakdown(7) == {
        "parameters and buffers": 16,
        "gradients": 4 + 4,
        "inputs and outputs": 7 + 1,
        "saved": 0,
        "recomputed": 10 + 20,
        "temporaries": 40 + 20,
        "libraries": 0,
        "reserved": 0,
    }
    assert timeline.breakdown(4)["saved"] == 40
    assert timeline.breakdown(4)["inputs and outputs"] == 7 + 1 + 1


def test_an_invalid_schedule_has_no_timeline() -> None:
    with pytest.raises(InvalidScheduleError):
        simulate(chain(), Schedule((1, 0, 2, 3, 4, 5, 6, 7), 4))


# An independent definition, straight from the words and as slow as they are: a copy of a storage is made by each run of
# the op that writes it; a read means the most recent copy; a copy is live from when it is made to its last reader.


def slow_live_bytes(graph: Graph, schedule: Schedule) -> list[int]:
    steps, split = len(schedule), schedule.forward_steps
    runs = [graph.ops[i] for i in schedule.order]
    repeated = [i in schedule.order[:step] for step, i in enumerate(schedule.order)]

    def made_at(storage: int) -> list[int]:
        if graph.storages[storage].kind == "tangent":
            return [split] if split < steps else []
        if storage in graph.replayed:
            return [s for s in range(steps) if storage in runs[s].replay and not repeated[s]]
        return [s for s in range(steps) if storage in runs[s].writes]

    def reads(step: int, storage: int) -> bool:
        return storage in runs[step].reads or (storage in runs[step].replay and repeated[step])

    def last_step(storage: int, copy: int) -> int:
        """The last step at which copy number `copy` is live; the step it is made at if nobody wants it."""
        made = [*made_at(storage), steps]
        until = range(made[copy] + 1, min(made[copy + 1], steps - 1) + 1)
        if graph.storages[storage].kind == "tangent":  # it is there before the op of its step runs
            until = range(split, steps)
        last = max([made[copy], *(s for s in until if reads(s, storage))])
        if copy > 0:
            return last
        if storage in graph.outputs or (storage in graph.gradients and not graph.gradients_allocated):
            return steps - 1
        if storage in graph.updates:
            last = max(last, split - 1)
        if storage in graph.gradients:
            last = max(last, next(d.step for d in deliveries(graph, schedule) if storage in d.gradients))
        return last

    live = []
    for step in range(steps):
        total = graph.reserved_bytes + runs[step].workspace_bytes
        if graph.gradients_allocated:
            total += graph.allocated_gradient_bytes
        for index, storage in enumerate(graph.storages):
            if storage.kind in RESIDENT:
                total += storage.size_bytes
                continue
            if index in graph.replayed and not any(reads(s, index) for s in range(steps)):
                continue
            copies = sum(s <= step <= last_step(index, copy) for copy, s in enumerate(made_at(index)))
            total += copies * storage.size_bytes
        live.append(total)
    return live


@given(graphs_with_schedules())
def test_bytes_are_those_of_the_slow_definition(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    assert timeline.live_bytes.dtype == np.int64
    assert timeline.live_bytes.tolist() == slow_live_bytes(graph, schedule)


@given(graphs_with_schedules())
def test_time_is_the_sum_over_runs(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    assert timeline.step_us == sum(graph.ops[i].time_us for i in schedule.order)
    assert timeline.recompute_us == timeline.step_us - graph.step_us
    assert timeline.start_us.tolist() == [
        sum(graph.ops[i].time_us for i in schedule.order[:s]) for s in range(len(schedule) + 1)
    ]


def test_time_does_not_depend_on_the_order_in_the_last_bit() -> None:
    storages = (Storage("x", 1, "input"), *(Storage(f"y{i}", 1, "activation") for i in range(3)))
    ops = tuple(Op(f"f{i}", "op", (0,), (i + 1,), time_us=time_us) for i, time_us in enumerate((0.1, 0.2, 0.3)))
    graph = Graph(ops, storages, 0, outputs=(), gradients=())
    times = {simulate(graph, Schedule(order, 0)).step_us for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))}
    assert times == {graph.step_us}


@given(graphs_with_schedules())
def test_equal_steps_have_equal_timelines(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    assert (timeline, hash(timeline)) == (simulate(graph, schedule), hash(simulate(graph, schedule)))
    assert (timeline == simulate(graph, plain(graph))) == (schedule == plain(graph))


@given(graphs_with_schedules())
def test_the_largest_at_the_peak_is_a_fifth_of_it(drawn: tuple[Graph, Schedule]) -> None:
    timeline = simulate(*drawn)
    sizes_bytes = [timeline.graph.storages[x.storage].size_bytes for x in timeline.alive_at(timeline.peak_step)]
    large = [size_bytes for size_bytes in sizes_bytes if 5 * size_bytes >= timeline.peak_bytes]
    if timeline.largest is None:
        assert not large
    else:
        assert timeline.graph.storages[timeline.largest].size_bytes == max(large)
    assert timeline.at_peak[timeline.dominant] == max(timeline.at_peak.values())
    assert sum(timeline.at_peak.values()) == timeline.peak_bytes


@given(graphs_with_schedules())
def test_every_breakdown_adds_up(drawn: tuple[Graph, Schedule]) -> None:
    timeline = simulate(*drawn)
    for step, live_bytes in enumerate(timeline.live_bytes.tolist()):
        parts = timeline.breakdown(step)
        assert tuple(parts) == PEAK_KINDS
        assert all(size_bytes >= 0 for size_bytes in parts.values())
        assert sum(parts.values()) == live_bytes
    assert sum(timeline.breakdown(-1).values()) == timeline.graph.static_bytes


@given(graphs_with_schedules())
def test_kinds_hold_the_bytes_of_their_lifetimes(drawn: tuple[Graph, Schedule]) -> None:
    timeline = simulate(*drawn)
    static = timeline.breakdown(-1)
    for step, op in enumerate(timeline.schedule.order):
        sums = dict(static)
        sums["temporaries"] += timeline.graph.ops[op].workspace_bytes
        for kind, life in zip(timeline.kinds, timeline.lifetimes, strict=True):
            sums[kind] += timeline.graph.storages[life.storage].size_bytes if life.born <= step <= life.dies else 0
        assert timeline.breakdown(step) == sums


def saved_by_definition(timeline: Timeline) -> int:
    """Bytes made in forward, read in backward, and not handed to the caller."""
    graph, schedule = timeline.graph, timeline.schedule
    runs = [graph.ops[i] for i in schedule.order]
    split, total = schedule.forward_steps, 0
    for index, storage in enumerate(graph.storages):
        if storage.kind in RESIDENT or storage.kind == "tangent" or index in graph.outputs:
            continue
        made = [s for s in range(split) if index in runs[s].writes]
        again = [s for s in range(split, len(schedule)) if index in runs[s].writes]
        read = [s for s in range(split, len(schedule)) if index in runs[s].reads and s <= min(again, default=s)]
        total += storage.size_bytes if made and read else 0
    for index in graph.replayed:
        first = next(s for s, run in enumerate(runs) if index in run.replay)
        again = [s for s, run in enumerate(runs) if index in run.replay and s > max(first, split - 1)]
        total += graph.storages[index].size_bytes if first < split and again else 0
    return total


@given(graphs_with_schedules())
def test_saved_is_what_forward_made_and_backward_reads(drawn: tuple[Graph, Schedule]) -> None:
    timeline = simulate(*drawn)
    assert timeline.saved_bytes == saved_by_definition(timeline)

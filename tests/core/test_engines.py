"""Clocks of several engines: cases worked out by hand, the critical path found another way, what is kept in flight.

With compute alone everything is a sum, and the same to the last bit as without engines.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from math import fsum
from random import Random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.engines import clocks
from fxckpt.core.graph import Graph, Op, Place, Storage
from fxckpt.core.schedule import Delivery, Schedule, deliveries, departures, plain
from fxckpt.core.simulate import Figures, Timeline, simulate
from tests.support.strategies import (
    chain,
    graphs_with_schedules,
    steps_with_alternatives,
    with_offload,
)

# chain(): f0 f1 f2 f3 are ops 0-3 of 1 2 3 4 µs, b3 b2 b1 b0 are 4-7 of 8 6 4 2 µs; a0 and a1 are storages 5 and 6.
A0, A1 = 5, 6
SEND, SENT, FETCH = 8, 9, 10  # the alternatives of one offloaded storage
ONE = Schedule((0, 1, SEND, 2, SENT, 3, 4, FETCH, 5, 6, 7), 6)


def offloading(out_us: float, in_us: float) -> Timeline:
    return simulate(with_offload(chain(), A0, out_us=out_us, in_us=in_us), ONE)


def test_a_storage_on_the_host_takes_no_memory_of_the_device() -> None:
    timeline = offloading(2.0, 3.0)
    assert timeline.live_bytes.tolist() == [
        23 + 10,  # f0: a0
        23 + 10 + 20,  # f1: a0 a1
        23 + 10 + 20,  # a0 is sent
        23 + 10 + 20 + 40,  # f2: a0 a1 a2
        23 + 10 + 20 + 40,  # it has been sent: a0 is in use until then
        23 + 20 + 40 + 1,  # f3: a1 a2 a3
        23 + 20 + 40 + 1 + 1 + 40 + 4,  # b3: a1 a2 a3, tangent, ga2, gw3
        23 + 20 + 1 + 40 + 4 + 10,  # a0 is fetched: a1 a3, ga2, gw3, a0
        23 + 20 + 1 + 40 + 4 + 10 + 20 + 4,  # b2: a1 a3, ga2 ga1, gw3 gw2, a0
        23 + 1 + 10 + 20 + 10 + 4 + 4 + 4,  # b1: a3, a0, ga1 ga0, gw3 gw2 gw1
        23 + 1 + 10 + 4 + 4 + 4 + 4,  # b0
    ]
    assert timeline.live_bytes_at("host").tolist() == [0, 0, 10, 10, 10, 10, 10, 10, 10, 10, 0]
    assert timeline.live_bytes_at("disk").tolist() == [0] * 11
    assert timeline.peak_bytes == 129
    assert simulate(chain(), plain(chain())).peak_bytes == 139
    assert timeline.saved == (6, 7)
    assert (timeline.recompute_us, Figures.of(timeline).saved_bytes) == (0.0, 60)


def test_copies_that_are_quick_enough_take_no_time() -> None:
    hours = offloading(2.0, 3.0).clocks
    #                                 f0   f1  send   f2  sent   f3    b3  fetch   b2    b1    b0
    assert hours.start_us.tolist() == [0.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0, 18.0, 18.0, 24.0, 28.0, 30.0]
    assert hours.end_us.tolist() == [1.0, 3.0, 5.0, 6.0, 6.0, 10.0, 18.0, 21.0, 24.0, 28.0, 30.0]
    assert (hours.step_us, hours.waiting_us) == (30.0, 0.0)


def test_compute_waits_where_a_copy_must_have_been_sent() -> None:
    hours = offloading(7.0, 3.0).clocks
    assert hours.start_us.tolist() == [0.0, 1.0, 3.0, 3.0, 10.0, 10.0, 14.0, 22.0, 22.0, 28.0, 32.0, 34.0]
    assert hours.end_us.tolist()[2] == 10.0
    assert (hours.step_us, hours.waiting_us) == (34.0, 4.0)


def test_compute_waits_for_a_copy_that_it_reads() -> None:
    hours = offloading(2.0, 9.0).clocks
    assert hours.start_us.tolist() == [0.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0, 18.0, 18.0, 27.0, 31.0, 33.0]
    assert hours.end_us.tolist()[7] == 27.0
    assert (hours.step_us, hours.waiting_us) == (33.0, 3.0)


def two_offloaded() -> Graph:
    """a0 by ops 8-10 and a1 by ops 11-13, each 4 µs out and 2 µs in."""
    graph = with_offload(chain(), A0, out_us=4.0, in_us=2.0)
    return with_offload(graph, A1, out_us=4.0, in_us=2.0)


def test_copies_of_one_engine_stand_in_line() -> None:
    timeline = simulate(two_offloaded(), Schedule((0, 1, 8, 2, 11, 9, 3, 12, 4, 13, 10, 5, 6, 7), 8))
    start_us, end_us = timeline.clocks.start_us.tolist(), timeline.clocks.end_us.tolist()
    assert (start_us[2], end_us[2]) == (3.0, 7.0)  # a0 goes out
    assert (start_us[4], end_us[4]) == (6.0, 11.0)  # a1 is to follow at 6, and can at 7
    assert start_us[5:8] == [7.0, 7.0, 11.0]  # a0 is out at 7, 1 µs late; f3; a1 is out at 11, just in time
    assert (start_us[9], end_us[9], end_us[10]) == (19.0, 21.0, 23.0)  # a1 comes back, then a0
    assert start_us[11:] == [21.0, 27.0, 31.0, 33.0]  # b2 waits for a1 2 µs; b1 finds a0
    assert (timeline.step_us, timeline.clocks.waiting_us) == (33.0, 3.0)


def test_copies_out_and_in_run_side_by_side() -> None:
    timeline = simulate(two_offloaded(), Schedule((0, 1, 8, 2, 9, 3, 11, 10, 4, 12, 13, 5, 6, 7), 6))
    start_us, end_us = timeline.clocks.start_us.tolist(), timeline.clocks.end_us.tolist()
    assert start_us[6] == start_us[7] == start_us[8] == 11.0  # f3 ended: a1 goes out, a0 comes in, b3 starts
    assert (end_us[6], end_us[7], end_us[8]) == (15.0, 13.0, 19.0)


def test_a_copy_that_ends_last_ends_the_step() -> None:
    graph = with_offload(chain(), A0, out_us=50.0)
    timeline = simulate(graph, Schedule((0, SEND, *range(1, 8)), 5))
    assert (timeline.step_us, timeline.start_us[-1]) == (51.0, 51.0)
    assert timeline.clocks.waiting_us == 0.0
    in_flight = [life for life in timeline.lifetimes if life.storage in (A0, 17)]
    assert [life.dies for life in in_flight] == [8, 8]  # nobody waited for it, so both stay


def test_a_fetched_copy_is_waited_for_with_all_that_it_is_made_from() -> None:
    """Without `sent`, the original is in use until compute reads what came back: transfers one after the other."""
    graph = with_offload(chain(), A0, out_us=2.0, in_us=3.0)
    timeline = simulate(graph, Schedule((0, 1, SEND, 2, 3, 4, FETCH, 5, 6, 7), 5))
    assert [(x.born, x.dies) for x in timeline.lifetimes if x.storage == A0] == [(0, 8), (6, 8)]
    assert [(x.born, x.dies) for x in timeline.lifetimes if x.storage == 17] == [(2, 8)]


def test_what_has_been_computed_again_is_not_waited_for() -> None:
    graph = with_offload(chain(), A0, out_us=2.0, in_us=50.0)
    timeline = simulate(graph, Schedule((0, 1, SEND, 2, SENT, 3, 4, FETCH, 5, 0, 6, 7), 6))
    assert timeline.start_us.tolist()[9:12] == [24.0, 25.0, 29.0]  # f0 again, b1, b0; the copy comes at 68
    assert (timeline.step_us, timeline.clocks.waiting_us, timeline.recompute_us) == (68.0, 0.0, 1.0)
    assert [(x.born, x.dies) for x in timeline.lifetimes if x.storage == A0] == [(0, 4), (7, 11), (9, 10)]


def exchange() -> Graph:
    """Forward gathers w (8 B, 4 µs) from a shard beside x (3 µs) and uses both; backward sums up two gradients.

    The gradients of 100 B are reduced to g0 and g1 of 10 B over the network, 5 µs each.
    """
    storages = (
        Storage("shard", 2, "parameter"),
        Storage("w", 8, "activation"),
        Storage("x", 1, "activation"),
        Storage("y", 1, "activation"),
        Storage("t", 1, "tangent"),
        Storage("full1", 100, "backward"),
        Storage("g1", 10, "backward"),
        Storage("full0", 100, "backward"),
        Storage("g0", 10, "backward"),
    )
    ops = (
        Op("gather", "gather", (0,), (1,), time_us=4.0, engine="network"),
        Op("f", "f", (), (2,), time_us=3.0),
        Op("use", "use", (1, 2), (3,), time_us=1.0),
        Op("b1", "b", (4,), (5,), time_us=2.0),
        Op("reduce1", "reduce", (5,), (6,), time_us=5.0, engine="network"),
        Op("b0", "b", (4,), (7,), time_us=2.0),
        Op("reduce0", "reduce", (7,), (8,), time_us=5.0, engine="network"),
        Op("reduced1", "wait", (6,), ()),
    )
    return Graph(ops, storages, 3, outputs=(3,), gradients=(6, 8), alternatives=1)


def test_collectives_run_beside_compute() -> None:
    graph = exchange()
    graph.check()
    timeline = simulate(graph, plain(graph))
    assert timeline.start_us.tolist() == [0.0, 0.0, 4.0, 5.0, 7.0, 7.0, 9.0, 17.0]
    assert timeline.clocks.end_us.tolist() == [4.0, 3.0, 5.0, 7.0, 12.0, 9.0, 17.0]
    assert deliveries(graph, plain(graph)) == [Delivery(6, (6, 8))]  # nobody waits for them before the end
    assert timeline.live_bytes.tolist() == [10, 11, 12, 104, 114, 214, 223]
    assert timeline.recompute_us == 0.0


def test_a_gradient_leaves_when_it_has_been_waited_for() -> None:
    graph = exchange()
    schedule = Schedule((0, 1, 2, 3, 4, 5, 7, 6), 3)
    assert deliveries(graph, schedule) == [Delivery(6, (6,)), Delivery(7, (8,))]
    timeline = simulate(graph, schedule)
    assert timeline.start_us.tolist() == [0.0, 0.0, 4.0, 5.0, 7.0, 7.0, 12.0, 12.0, 17.0]  # reduced1 waits until 12
    assert timeline.live_bytes.tolist() == [10, 11, 12, 104, 114, 214, 213, 123]  # full1 goes when g1 is there
    allocated = replace(graph, gradients_allocated=True, allocated_gradient_bytes=20)
    assert simulate(allocated, schedule).live_bytes.tolist() == [30, 31, 32, 124, 134, 234, 233, 133]  # and so does g1


def test_outputs_are_waited_for_when_forward_ends() -> None:
    storages = (Storage("x", 1, "input"), Storage("y", 2, "activation"), Storage("z", 4, "activation"))
    ops = (Op("f", "f", (0,), (1,)), Op("g", "g", (1,), (2,), time_us=9.0, engine="network"), Op("b", "b", (), ()))
    timeline = simulate(Graph(ops, storages, 2, outputs=(2,)), Schedule((0, 1, 2), 2))
    assert timeline.start_us.tolist() == [0.0, 0.0, 9.0, 9.0]
    assert timeline.live_bytes.tolist() == [3, 7, 5]


def test_an_alternative_that_computes_adds_to_the_time() -> None:
    """An activation is compressed to a tenth and comes back: work that the plain step does not have."""
    graph = chain()
    small = Storage("a2.small", 4, "activation")
    ops = (Op("pack", "pack", (7,), (17,), time_us=0.5), Op("unpack", "unpack", (17,), (7,), time_us=0.25))
    graph = replace(graph, ops=(*graph.ops, *ops), storages=(*graph.storages, small), alternatives=2)
    graph.check()
    timeline = simulate(graph, Schedule((0, 1, 2, 3, 8, 9, 4, 5, 6, 7), 5))
    assert (timeline.step_us, timeline.recompute_us) == (30.75, 0.75)
    assert timeline.saved == (5, 6, 17)
    assert timeline.live_bytes.tolist()[3:6] == [94, 23 + 71 + 4, 23 + 10 + 20 + 40 + 1 + 1 + 4]


# With compute alone


@given(graphs_with_schedules())
@settings(max_examples=100)
def test_with_compute_alone_times_are_sums(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    uneven = replace(graph, ops=tuple(replace(op, time_us=op.time_us * 0.1 + i / 3) for i, op in enumerate(graph.ops)))
    times_us = [uneven.ops[i].time_us for i in schedule.order]
    timeline = simulate(uneven, schedule)
    assert timeline.step_us == fsum(times_us) == fsum(reversed(times_us))
    assert timeline.start_us.tolist() == list(accumulate(times_us, initial=0.0))
    assert timeline.clocks.end_us.tolist() == timeline.start_us.tolist()[1:]
    assert timeline.recompute_us == fsum(uneven.ops[i].time_us * n for i, n in schedule.repeats().items())
    assert timeline.live_bytes_at("device").tolist() == timeline.live_bytes.tolist()
    assert not timeline.live_bytes_at("host").any()


@given(graphs_with_schedules())
@settings(max_examples=100)
def test_clocks_of_one_engine_are_sums_too(drawn: tuple[Graph, Schedule]) -> None:
    """The pass that minds several engines, made to run by a step that takes no time and touches nothing."""
    graph, schedule = drawn
    uneven = replace(graph, ops=tuple(replace(op, time_us=op.time_us * 0.1 + i / 3) for i, op in enumerate(graph.ops)))
    idle = replace(uneven, ops=(*uneven.ops, Op("idle", "idle", (), (), engine="network")), alternatives=1)
    longer = Schedule((len(graph.ops), *schedule.order), schedule.forward_steps + 1)
    alone, several = simulate(uneven, schedule), simulate(idle, longer)
    assert several.step_us == alone.step_us
    assert several.recompute_us == alone.recompute_us
    assert several.start_us.tolist() == [0.0, *alone.start_us.tolist()]
    assert several.live_bytes.tolist()[1:] == alone.live_bytes.tolist()


# Independent definitions


def critical_path(graph: Graph, schedule: Schedule) -> tuple[list[float], list[float], float]:
    """Start and end of each op, and of the step, as longest paths through all that has to come one after the other."""
    order, steps = schedule.order, len(schedule)
    net: nx.DiGraph[tuple[str, int]] = nx.DiGraph()
    net.add_edge(("begin", 0), ("reached", 0), us=0.0)
    writer: dict[int, int] = {}
    first: dict[int, int] = {}
    last_of: dict[str, int] = {}
    leaving = departures(graph, schedule)
    for step, index in enumerate(order):
        op = graph.ops[index]
        net.add_edge(("start", step), ("end", step), us=op.time_us)
        net.add_edge(("reached", step), ("start", step), us=0.0)
        before = [writer[s] for s in op.reads if s in writer]
        before += [last_of[op.engine]] if op.engine in last_of else []
        net.add_edges_from(((("end", s), ("start", step)) for s in before), us=0.0)
        last_of[op.engine] = step
        handed = ("end" if op.engine == "compute" else "reached", step)
        net.add_edge(handed, ("reached", step + 1), us=0.0)
        net.add_edge(("end", step), ("over", 0), us=0.0)
        writer |= dict.fromkeys(op.writes, step)
        first = dict.fromkeys(op.writes, step) | first
        for storage in leaving.get(step, ()):
            if storage in first:
                net.add_edge(("end", first[storage]), ("reached", step + 1), us=0.0)
    net.add_edge(("reached", steps), ("over", 0), us=0.0)
    at: dict[tuple[str, int], float] = {}
    for node in nx.topological_sort(net):
        at[node] = max((at[a] + data["us"] for a, _, data in net.in_edges(node, data=True)), default=0.0)
    kind = "start", "reached"
    starts = [at[kind[graph.ops[i].engine != "compute"], step] for step, i in enumerate(order)]
    return [*starts, at["over", 0]], [at["end", step] for step in range(steps)], at["over", 0]


@given(steps_with_alternatives())
@settings(max_examples=200)
def test_a_step_takes_as_long_as_its_critical_path(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    hours = clocks(graph, schedule)
    starts, ends, over = critical_path(graph, schedule)  # times are whole, so sums are exact
    assert hours.start_us.tolist() == starts
    assert hours.end_us.tolist() == ends
    assert hours.step_us == over == simulate(graph, schedule).step_us
    assert all(early <= late for early, late in pairwise(starts))
    busy_us = fsum(graph.ops[i].time_us for i in schedule.order if graph.ops[i].engine == "compute")
    assert hours.waiting_us <= hours.step_us - busy_us <= fsum(graph.ops[i].time_us for i in schedule.order) - busy_us


@given(steps_with_alternatives())
@settings(max_examples=200)
def test_memory_is_not_free_before_all_that_uses_it_has_ended(drawn: tuple[Graph, Schedule]) -> None:
    """What dies in a step is used by no engine when the steps behind it start, though bytes know of no clock."""
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    hours = timeline.clocks
    for step, index in enumerate(schedule.order):
        op = graph.ops[index]
        used = {*op.reads, *op.writes, *(op.replay if index in schedule.order[:step] else ())}
        for life in timeline.lifetimes:
            if life.storage in used and life.born <= step <= life.dies < len(schedule) - 1:
                newer = [x.born for x in timeline.lifetimes if x.storage == life.storage and life.born < x.born <= step]
                if not newer:
                    assert hours.end_us[step] <= hours.start_us[life.dies + 1]


@given(steps_with_alternatives(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_bytes_do_not_depend_on_times(drawn: tuple[Graph, Schedule], rng: Random) -> None:
    graph, schedule = drawn
    other = replace(graph, ops=tuple(replace(op, time_us=rng.random()) for op in graph.ops))
    timeline, slower = simulate(graph, schedule), simulate(other, schedule)
    assert timeline.lifetimes == slower.lifetimes
    for place in ("device", "host", "disk"):
        assert timeline.live_bytes_at(place).tolist() == slower.live_bytes_at(place).tolist()


@given(steps_with_alternatives())
@settings(max_examples=100)
def test_every_memory_holds_what_lives_there(drawn: tuple[Graph, Schedule]) -> None:
    graph, schedule = drawn
    timeline = simulate(graph, schedule)
    for place in ("device", "host", "disk"):
        for step, live_bytes in enumerate(timeline.live_bytes_at(place).tolist()):
            here = [x.storage for x in timeline.alive_at(step) if graph.storages[x.storage].place == place]
            always = graph.static_bytes + graph.ops[schedule.order[step]].workspace_bytes if place == "device" else 0
            assert live_bytes == graph.bytes_of(here) + always
    for step, live_bytes in enumerate(timeline.live_bytes.tolist()):
        assert sum(timeline.breakdown(step).values()) == live_bytes


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_is_given_elsewhere_takes_nothing_here(place: Place) -> None:
    graph = chain()
    away = replace(graph, storages=tuple(replace(s, place=place) if s.name == "w1" else s for s in graph.storages))
    assert graph.static_bytes - away.static_bytes == 4
    there = simulate(away, plain(away))
    assert there.live_bytes_at(place).tolist() == [4] * 8
    assert (there.live_bytes + 4).tolist() == simulate(graph, plain(graph)).live_bytes.tolist()
    assert sum(there.at_peak.values()) == there.peak_bytes

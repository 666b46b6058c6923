"""Polish: valid, never over budget, never slower, always the same; and the tape under it agrees with the simulator."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.schedule import Schedule, check, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers.chain.dp import LEVELS, Effort
from fxckpt.core.solvers.keep import schedule_keeping
from fxckpt.core.solvers.search.moves import area_shifted, earliest, latest, remove, shift, window
from fxckpt.core.solvers.search.polish import polish
from fxckpt.core.solvers.search.tape import EMPTY, Tape
from fxckpt.core.solvers.search.wiring import Wiring
from tests.support.strategies import chain, graphs_with_schedules


def assert_agrees(graph: Graph, tape: Tape) -> None:
    """The tape's bytes are the simulator's at every step, and its time too."""
    timeline = simulate(graph, tape.schedule())
    tape.peak_bytes()  # gives gradients that were moved their new deliveries
    assert [int(b) for op, b in zip(tape.slots, tape.live, strict=True) if op != EMPTY] == list(timeline.live_bytes)
    if len(timeline.schedule):
        assert tape.peak_bytes() == timeline.peak_bytes
    assert tape.step_us == pytest.approx(timeline.step_us)


@given(graphs_with_schedules(), st.integers(0, 3))
def test_a_tape_holds_what_the_simulator_counts(case: tuple[Graph, Schedule], gap: int) -> None:
    graph, schedule = case
    tape = Tape(Wiring(graph), schedule, gap=gap)
    assert tape.schedule() == schedule
    assert_agrees(graph, tape)


@given(graphs_with_schedules(), st.integers(0, 2**20))
def test_edits_keep_the_tape_exact_and_can_be_undone(case: tuple[Graph, Schedule], seed: int) -> None:
    graph, schedule = case
    rng = Random(seed)
    tape = Tape(Wiring(graph), schedule, gap=3)
    tape.peak_bytes()
    start = tape.live.copy()
    for _ in range(12):
        random_edit(tape, rng)
        check(graph, tape.schedule())
        assert tape.area == tape.live.sum()
        assert_agrees(graph, tape)
    tape.undo(0)
    assert tape.schedule() == schedule
    tape.peak_bytes()
    assert (tape.live == start).all()


def random_edit(tape: Tape, rng: Random) -> None:
    slot = rng.randrange(len(tape.slots))
    op = tape.slots[slot]
    if op != EMPTY:
        low, high = window(tape, slot)
        targets = [s for s in range(low + 1, high) if tape.slots[s] == EMPTY]
        if slot in (run for _, run in tape.repeated()) and rng.random() < 0.5:
            remove(tape, slot)
        elif slot > tape.split and targets:
            shift(tape, slot, rng.choice(targets))
    elif slot > tape.split:
        again = [o for o, runs in enumerate(tape.runs) if not tape.wiring.pinned[o] and runs[0] < slot]
        if again:
            tape.put(rng.choice(again), slot)


@given(graphs_with_schedules(), st.integers(0, 3), st.integers(0, 2**16))
def test_what_a_move_would_hold_is_known_before_it_is_made(case: tuple[Graph, Schedule], gap: int, seed: int) -> None:
    graph, schedule = case
    tape, rng = Tape(Wiring(graph), schedule, gap=gap), Random(seed)
    for slot in rng.sample(range(tape.split + 1, tape.end), max(tape.end - tape.split - 1, 0)):
        op = tape.slots[slot]
        if op == EMPTY:
            continue
        for way in (latest, earliest) if tape.runs[op][0] == slot else (latest,):
            target = way(tape, slot)
            if target < 0:
                continue
            foreseen, before, mark = area_shifted(tape, slot, target), tape.area, tape.mark()
            shift(tape, slot, target)
            assert tape.area - before == foreseen
            if rng.random() < 0.5:
                break  # the next moves start from here
            tape.undo(mark)


@pytest.mark.parametrize("effort", ["fast", "default"])
@settings(max_examples=60)
@given(case=graphs_with_schedules(), ratio=st.floats(0, 1.1))
def test_polish_fits_and_is_never_slower(effort: Effort, case: tuple[Graph, Schedule], ratio: float) -> None:
    graph, schedule = case
    before = simulate(graph, schedule)
    budget_bytes = int(graph.static_bytes + ratio * (before.peak_bytes - graph.static_bytes))
    after = simulate(graph, polish(graph, schedule, budget_bytes, search=LEVELS[effort].search))
    if before.peak_bytes <= budget_bytes:
        assert after.peak_bytes <= budget_bytes
        assert after.step_us <= before.step_us
    else:
        assert after.peak_bytes <= before.peak_bytes


@given(graphs_with_schedules())
@settings(max_examples=20)
def test_the_same_call_gives_the_same_schedule(case: tuple[Graph, Schedule]) -> None:
    graph, schedule = case
    budget_bytes = simulate(graph, schedule).peak_bytes
    first, second = (polish(graph, schedule, budget_bytes, search=LEVELS["default"].search) for _ in range(2))
    assert first == second


def test_repeats_that_the_budget_does_not_need_go() -> None:
    graph = chain()
    wasteful = schedule_keeping(graph, ())
    enough = simulate(graph, plain(graph)).peak_bytes
    assert polish(graph, wasteful, enough).order == plain(graph).order


def test_the_dearest_repeat_that_can_go_goes_first() -> None:
    graph = chain((10, 10, 10, 10))
    schedule = Schedule((0, 1, 2, 3, 4, 3, 5, 0, 6, 7, 8, 9), 5)
    budget_bytes = simulate(graph, schedule).peak_bytes
    assert not polish(graph, schedule, budget_bytes).repeats()


def test_a_large_gradient_waits_until_there_is_room() -> None:
    """Fresh gradients: the op that makes a large one moves behind what it need not come before."""
    storages = (
        Storage("x", 1, "input"),
        Storage("a", 50, "activation"),
        Storage("tangent", 1, "tangent"),
        Storage("large", 60, "backward"),
        Storage("small", 1, "backward"),
    )
    ops = (
        Op("forward", "f", (0,), (1,)),
        Op("large", "b", (2,), (3,)),
        Op("small", "b", (1, 2), (4,)),
    )
    graph = Graph(ops, storages, 1, gradients=(3, 4))
    polished = polish(graph, plain(graph), graph.static_bytes + 70)
    assert polished.order == (0, 2, 1)

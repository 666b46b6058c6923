"""The calls of a step share a budget: against every choice there is."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from fxckpt.core.schedule import plain
from fxckpt.core.shares import Offer, lean, peak_bytes, share, share_in_any_order
from fxckpt.core.simulate import simulate
from tests.support.strategies import graphs

OFFERS = st.builds(
    lambda held, more, time_us: Offer(held, held + more, float(time_us)),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 20),
)
CALLS = st.lists(st.lists(OFFERS, min_size=1, max_size=4), max_size=4)


def by_moments(calls: list[list[Offer]], chosen: tuple[int, ...]) -> int:
    """The peak, moment by moment: each forward in turn, then each backward in the reverse order."""
    taken = [offers[i] for offers, i in zip(calls, chosen, strict=True)]
    moments = [0]
    for running in [*range(len(taken)), *reversed(range(len(taken)))]:
        moments.append(sum(offer.held_bytes for offer in taken[:running]) + taken[running].peak_bytes)
    return max(moments)


@given(CALLS, st.integers(0, 120))
def test_the_choice_is_the_fastest_that_fits(calls: list[list[Offer]], budget_bytes: int) -> None:
    every = [tuple(chosen) for chosen in product(*(range(len(offers)) for offers in calls))]
    fitting = [chosen for chosen in every if by_moments(calls, chosen) <= budget_bytes]
    found = share(calls, [budget_bytes] * len(calls))

    def time_us(chosen: tuple[int, ...]) -> float:
        return sum(offers[i].time_us for offers, i in zip(calls, chosen, strict=True))

    if not fitting:
        assert found is None
    else:
        assert found in fitting
        assert time_us(found) == min(map(time_us, fitting))


@given(CALLS, st.integers(0, 150))
def test_in_any_order_the_choice_is_the_fastest_that_fits(calls: list[list[Offer]], budget_bytes: int) -> None:
    def peak(chosen: tuple[int, ...]) -> int:
        taken = [offers[i] for offers, i in zip(calls, chosen, strict=True)]
        held_bytes = sum(offer.held_bytes for offer in taken)
        return max((held_bytes - offer.held_bytes + offer.peak_bytes for offer in taken), default=0)

    every = [tuple(chosen) for chosen in product(*(range(len(offers)) for offers in calls))]
    times_us = {c: sum(o[i].time_us for o, i in zip(calls, c, strict=True)) for c in every if peak(c) <= budget_bytes}
    found = share_in_any_order(calls, budget_bytes) if calls else ()
    if calls and not times_us:
        assert found is None
    elif calls:
        assert found in times_us
        assert times_us[found] == min(times_us.values())


@given(CALLS)
def test_the_lean_choice_has_the_lowest_peak(calls: list[list[Offer]]) -> None:
    every = [tuple(chosen) for chosen in product(*(range(len(offers)) for offers in calls))]
    assert by_moments(calls, lean(calls)) == min(by_moments(calls, chosen) for chosen in every)


@given(CALLS, st.data())
def test_the_peak_is_that_of_all_moments(calls: list[list[Offer]], data: st.DataObject) -> None:
    chosen = tuple(data.draw(st.integers(0, len(offers) - 1)) for offers in calls)
    assert peak_bytes(calls, chosen) == by_moments(calls, chosen)


@given(graphs())
def test_an_offer_adds_up_to_what_is_simulated(graph: object) -> None:
    timeline = simulate(graph, plain(graph))  # type: ignore[arg-type]
    offer = Offer.of(timeline)
    inputs = sum(s.size_bytes for s in timeline.graph.storages if s.kind == "input")
    assert offer.peak_bytes + timeline.graph.static_bytes - inputs == timeline.peak_bytes
    assert offer.held_bytes >= timeline.saved_bytes + inputs
    assert offer.time_us == timeline.step_us

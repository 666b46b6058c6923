"""Random small models under random plans: some at each run, many by `python -m tests.fuzz`, and what that has found."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from fxckpt.core import schedule as schedules
from fxckpt.core.graph import Graph
from tests.fuzz import MENU, Input, Line, Output, Program, Refused, Sizes, Trial, check, trials
from tests.fuzz.__main__ import Run
from tests.fuzz.menu import OF_PYTHON
from tests.support.strategies import graphs

EXAMPLES = 30


@pytest.fixture(autouse=True, scope="module")
def _nothing_to_collect_in_what_is_imported() -> Iterator[None]:
    """Measuring collects garbage first, which would look through all modules each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(trials())
@pytest.mark.works(
    "anything else",
    "random models of many layers, under random budgets and solvers: outputs, gradients, buffers, random state, peak",
)
def test_random_models(trial: Trial) -> None:
    with contextlib.suppress(Refused):
        check(trial)


@pytest.mark.slow
def test_many_random_models() -> None:
    run = Run(1000)
    run.some(seed=1)
    assert run.counts["failures"] == 0
    assert run.counts["refused"] < run.counts["examples"] / 10


ROWS, TWO_ROWS = (Input("rows"),), (Input("rows"), Input("rows"))
GIVEN_ROWS, GIVEN_SEQUENCE = (Input("rows", requires_grad=True),), (Input("sequence", requires_grad=True),)
WIDE, SINGLE = Sizes(batch=64, width=64), Sizes(length=1, width=32)

FOUND: dict[str, Trial] = {
    "what checks of values may put back takes no memory that plans count": Trial(
        Program(
            (Input("sequence"),),
            (
                Line("distribution (sequence)", (0,), dtype="double"),
                Line("last of sequence", (1,), dtype="float", mode="frozen"),
                Line("einsum", (2,), dtype="bfloat16"),
                Line("square root (rows)", (3,), mode="evaluated"),
                Line("exp (rows)", (4,), dtype="bfloat16"),
                Line("power (rows)", (5,)),
            ),
            (Output(6, how="chunks"), Output(1)),
            sizes=Sizes(batch=64, length=1, width=6),
        ),
        solver="random",
        budget=1.0,
        training=False,
        unused=1,
    ),
    "a loss does not hold the memory of its terms": Trial(
        Program(
            (Input("image"),),
            (
                Line("conv2d", (0,)),
                Line("loss (image)", (1,)),
                Line("exp (image)", (2,)),
                Line("loss (image)", (3,)),
                Line("tanh (image)", (4,)),
            ),
            (Output(5),),
            sizes=Sizes(batch=64, side=14),
        ),
        solver="random",
    ),
    "rolled values keep channels last": Trial(
        Program(
            (Input("image"),),
            (
                Line("channels last", (0,)),
                Line("roll (image)", (1,)),
                Line("conv2d", (2,)),
                Line("conv2d", (3,)),
            ),
            (Output(4),),
            sizes=Sizes(batch=3, side=14),
        ),
        solver="random",
    ),
    "what changes an expanded tensor reaches the tensor behind it without rounding": Trial(
        Program(
            (Input("rows"),),
            (
                Line("linear", (0,)),
                Line("sequence of rows", (1,)),
                Line("tanh in place (sequence)", (2,)),
            ),
            (Output(3),),
            sizes=Sizes(batch=64, length=1),
        ),
        solver="save_all",
    ),
    "a result is not written over a value that the op also reads as a view": Trial(
        Program(
            (Input("ids"),),
            (
                Line("embedding", (0,)),
                Line("expand (sequence)", (1,)),
                Line("stopped gradient (sequence)", (2,), dtype="bfloat16"),
                Line("bernoulli (sequence)", (3,), mode="autocast"),
            ),
            (Output(4),),
            "double",
            SINGLE,
        ),
        "selective",
        0.5,
    ),
    "a result is not written over a conjugated view": Trial(
        Program(GIVEN_ROWS, (Line("complex", (0,), dtype="float"),), (Output(1),)), "min_memory"
    ),
    "a tangent has memory of its own, not that of the view it belongs to": Trial(
        Program(
            GIVEN_SEQUENCE,
            (Line("tanh gelu (sequence)", (0,)), Line("tanh (sequence)", (1,))),
            (Output(2, "transposed"), Output(1), Output(1, "chunks")),
        ),
        "sqrt",
        unused=1,
    ),
    "parts of an input are returned": Trial(
        Program(GIVEN_ROWS, (Line("square root (rows)", (0,)),), (Output(1), Output(0, "chunks"))), "save_all"
    ),
    "views of an input are returned": Trial(
        Program(
            GIVEN_SEQUENCE,
            (Line("gelu (sequence)", (0,)),),
            (Output(1, "transposed"), Output(1), Output(0, "transposed")),
        )
    ),
    "a detached view of a returned tensor requires no gradient": Trial(
        Program(
            GIVEN_SEQUENCE,
            (Line("tanh (sequence)", (0,)), Line("last of sequence", (1,))),
            (Output(2, "transposed"), Output(2, "detached")),
        ),
        "random",
    ),
    "three views of a tensor that is not returned": Trial(
        Program(
            GIVEN_SEQUENCE,
            (Line("tanh (sequence)", (0,)), Line("flat view (sequence)", (1,))),
            (Output(2), Output(2, "detached"), Output(2, "transposed")),
        )
    ),
    "a repeated draw whose op has an argument called device": Trial(
        Program(
            ROWS,
            (Line("linear", (0,)), Line("normal noise (rows)", (1,)), Line("power (rows)", (2,))),
            (Output(3),),
            sizes=WIDE,
        ),
        "selective",
    ),
    "other outputs than expected are differentiated, under autocast": Trial(
        Program(
            GIVEN_SEQUENCE,
            (Line("RNN", (0,), mode="frozen"), Line("gelu (sequence)", (1,)), Line("add in place (sequence)", (1, 2))),
            (Output(3, "chunks"), Output(1, "transposed")),
        ),
        "auto",
        0.25,
        backward="one by one",
        autocast=True,
    ),
    "saved values that a backward from other outputs does not need": Trial(
        Program(
            (Input("image", requires_grad=True),),
            (
                Line("interpolate (image)", (0, 0), dtype="double"),
                Line("interpolate (image)", (1, 1), dtype="bfloat16"),
                Line("running instance norm", (2,), dtype="double"),
            ),
            (Output(3), Output(1, "chunks"), Output(2, "detached")),
            "double",
        ),
        "dp",
        unused=1,
    ),
    "hooks of parameters that get no gradient are not called": Trial(
        Program(
            (Input("image"),),
            (Line("batch norm 2d", (0,)), Line("conv2d", (1,))),
            (Output(2), Output(1, "chunks")),
        ),
        "min_memory",
        backward="one by one",
        unused=1,
        hooks=True,
    ),
    "backward has no ops": Trial(
        Program(GIVEN_ROWS, (Line("normal noise (rows)", (0,)),), (Output(1, "transposed"), Output(1))), "sqrt"
    ),
    "a weight that autocast casts once for several uses": Trial(
        Program(
            ROWS,
            (Line("linear", (0,)), Line("linear", (1,), shares=0), Line("linear", (2,), shares=0)),
            (Output(3),),
            sizes=WIDE,
        ),
        "min_memory",
        autocast=True,
    ),
    "an input that autocast casts once for several uses": Trial(
        Program(GIVEN_ROWS, (Line("linear", (0,)), Line("similarities", (0, 1))), (Output(2),)), autocast=True
    ),
    "recurrent kernels hand large buffers to backward": Trial(
        Program(
            (Input("ids"),),
            (Line("embedding", (0,)), Line("two-way LSTM", (1,)), Line("GRU", (2,))),
            (Output(3, "transposed"),),
            sizes=Sizes(width=6),
        ),
        "random",
    ),
    "a view of what hardswish's backward lays out in its own way": Trial(
        Program(
            (Input("sequence"),),
            (
                Line("multi-head attention", (0,), mode="autocast"),
                Line("log of sums (sequence)", (1,), dtype="double"),
                Line("hardswish (sequence)", (2,)),
                Line("roll (sequence)", (3,)),
            ),
            (Output(4),),
            "double",
            Sizes(length=5),
        ),
        "uniform",
        0.75,
        training=False,
        autocast=True,
    ),
    "gradients of dropout are laid out as what comes in": Trial(
        Program(
            (Input("ids"),),
            (
                Line("embedding", (0,)),
                Line("cross attention", (1, 1)),
                Line("dropout function (sequence)", (2,)),
            ),
            (Output(3, "transposed"),),
            sizes=WIDE,
        ),
        "save_all",
    ),
    "one of two parts of an input is differentiated": Trial(
        Program(
            (Input("rows"), *GIVEN_ROWS),
            (Line("linear", (0,)), Line("similarities", (2, 1))),
            (Output(3, "transposed"), Output(1, "chunks")),
        ),
        "save_all",
        unused=2,
    ),
    "a repeated op reads a changed buffer and what was computed from it": Trial(
        Program(
            (Input("image"),),
            (Line("conv2d", (0,)), Line("running instance norm", (1,))),
            (Output(2),),
            "bfloat16",
            Sizes(batch=64, length=1, width=6),
        ),
        "random",
        0.5,
        allocated=True,
        backward="twice",
        autocast=True,
        hooks=True,
    ),
    "a tensor and a view of it are returned, and the view is read on": Trial(
        Program(
            (Input("sequence"),),
            (
                Line("layer norm of sequence", (0,)),
                Line("last of sequence", (1,)),
                Line("tanh (rows)", (2,)),
                Line("multiply (rows)", (3, 2)),
            ),
            (Output(4), Output(2), Output(1)),
        ),
        "save_all",
    ),
    "batch norm of transposed values": Trial(
        Program(
            (Input("ids"),),
            (
                Line("embedding", (0,)),
                Line("batch norm of sequence", (1,), dtype="bfloat16"),
                Line("cross attention", (2, 1)),
            ),
            (Output(3),),
            "bfloat16",
            Sizes(batch=64, width=32),
        ),
        "save_all",
    ),
    "what dropout that drops nothing gives is what it was given": Trial(
        Program(
            ROWS,
            (
                Line("parametric relu", (0,)),
                Line("dropout", (1,), mode="evaluated"),
                Line("multiply in place (rows)", (2,)),
            ),
            (Output(3), Output(1)),
            sizes=Sizes(batch=64),
        ),
        "save_all",
    ),
    "the gradient of a maximum of transposed values": Trial(
        Program(
            (Input("ids"), Input("sequence", requires_grad=True)),
            (
                Line("embedding", (0,)),
                Line("batch norm of sequence", (2,)),
                Line("maximum (sequence)", (3, 1)),
                Line("batch norm of sequence", (4,), mode="frozen"),
            ),
            (Output(5, "transposed"),),
            sizes=Sizes(batch=64),
        ),
        "save_all",
        training=False,
    ),
    "a recurrent kernel whose buffer nobody reads": Trial(
        Program((Input("ids"),), (Line("embedding", (0,)), Line("LSTM", (1,))), (Output(2), Output(1)), sizes=WIDE),
        "save_all",
        unused=1,
    ),
    "random fills draw in the order of memory": Trial(
        Program(GIVEN_ROWS, (Line("views (rows)", (0,)), Line("alpha dropout", (1,))), (Output(2),)), "min_memory"
    ),
    "a gradient that nobody wants of batch norm is not there": Trial(
        Program(
            (Input("image"),),
            (Line("batch norm 2d", (0,), dtype="double"),),
            (Output(1),),
            sizes=Sizes(batch=32, side=14),
        ),
        "save_all",
        training=False,
    ),
    "views of a copy that was dropped are in its source's memory": Trial(
        Program(
            (Input("image", requires_grad=True),),
            (Line("tanh (image)", (0,)), Line("changed view (image)", (1,), dtype="double")),
            (Output(2),),
            "bfloat16",
            Sizes(batch=64, length=1),
        ),
        "save_all",
        allocated=True,
    ),
}
"""Failures that the fuzzer has found, each repaired and now a test."""


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.works("anything else", "all that this has found")
def test_what_was_found(name: str) -> None:
    check(FOUND[name])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in MENU if name not in OF_PYTHON])
def test_each_layer_in_small_batches(name: str, batch: int) -> None:
    inputs = tuple(Input(form, form != "ids") for form in MENU[name].reads)
    sizes = Sizes(batch=batch, length=1 if batch == 1 else 4, width=6, side=4)
    lines = (Line(name, tuple(range(len(inputs)))),)
    with contextlib.suppress(Refused):
        check(Trial(Program(inputs, lines, (Output(len(inputs)),), sizes=sizes), "min_memory"))


# The fuzzer itself


def test_a_failure_says_how_to_see_it_again() -> None:
    trial = FOUND["an input that autocast casts once for several uses"]
    with (
        mock.patch("tests.fuzz.trial._assert_same", side_effect=AssertionError("spoiled")),
        pytest.raises(AssertionError, match="spoiled") as caught,
    ):
        check(trial)
    source = caught.value.__notes__[0].partition("check(")[2].removesuffix(")")
    names = {kind.__name__: kind for kind in (Trial, Program, Line, Input, Output, Sizes)}
    assert eval(source, dict(names)) == trial


@settings(derandomize=True, database=None)
@given(graphs())
def test_repeats_at_random_are_a_valid_schedule(graph: Graph) -> None:
    assume(graph.ops)
    schedule = Trial(Program(ROWS, (), ()), solver="random").schedule(graph, 0)
    schedules.check(graph, schedule)


@pytest.mark.parametrize("name", MENU)
def test_each_layer_of_the_menu_works(name: str) -> None:
    layer, sizes = MENU[name], Sizes()
    torch.manual_seed(0)
    made = layer.make(sizes)
    given = [
        torch.zeros(sizes.shape(f), dtype=torch.long) if f == "ids" else torch.rand(sizes.shape(f)) for f in layer.reads
    ]
    assert made(*given).shape == sizes.shape(layer.writes)

"""How long does the CPU take to launch a step's ops, against eager's? What a GPU computes meanwhile aside.

    python -m benchmarks.host_time [--rounds 200] [--output benchmarks/results/host_time.json] [case …]

The models of the menu with tensors of a few elements, so that ops take next to no time beside what it takes to call
them, and budgets in which nothing is repeated. Plain and optimized steps take turns in one process with one thread; the
time is the CPU time of that thread, and the ratio the median over all rounds, with the quartiles behind it. Gradients
are fresh, as after `zero_grad()`. For scale: `compiled` is `torch.compile(model, backend="aot_eager")`, whose graphs
are the same ops without a plan.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxckpt
from benchmarks.models import cases
from benchmarks.models.cases import Case
from fxckpt.api import plan_of

HEADERS = ("case", "ops", "plain us", "us/op", "step ratio", "forward ratio", "backward ratio")
ENOUGH = 2**40
WARM_UP = 5

TINY: tuple[Case, ...] = (
    Case("mlp", lambda: cases.mlp(32, 1, 1)),
    Case("gpt", lambda: cases.gpt(12, 4, 2, 1, 8, 0.0)),
    Case("gpt_dropout", lambda: cases.gpt(12, 4, 2, 1, 8, 0.1)),
    Case("resnet", lambda: cases.resnet((3, 4, 6, 3), 1, 2, 8)),
    Case("unet", lambda: cases.unet(4, 1, 2, 16)),
    Case("dense", lambda: cases.dense(12, 1, 1, 2, 1)),
    Case("lstm", lambda: cases.lstm(1, 64, 1)),
    Case("towers", lambda: cases.towers(1, 8, 1)),
    Case("bert", lambda: cases.bert(6, 4, 2, 1), cases.own_loss),
    Case("roberta", lambda: cases.roberta(6, 4, 2, 1), cases.own_loss),
    Case("gpt2", lambda: cases.gpt2(6, 4, 2, 1), cases.own_loss),
    Case("llama", lambda: cases.llama(6, 8, 2, 1), cases.own_loss),
    Case("t5", lambda: cases.t5(4, 4, 2, 1), cases.own_loss),
    Case("vit", lambda: cases.vit(6, 4, 8, 1), cases.own_loss),
)
"""The cases at full depth and in the smallest sizes that they take."""


@dataclass
class Side:
    """A model's steps, and the CPU time that each took, forward and backward apart [µs]."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    end: Callable[[Any], Tensor]
    forward_us: list[float]
    backward_us: list[float]

    def step(self) -> None:
        self.model.zero_grad()
        start = time.thread_time_ns()
        end = self.end(self.model(*self.args, **self.kwargs))
        middle = time.thread_time_ns()
        end.backward(_ONES[end.shape])
        stop = time.thread_time_ns()
        self.forward_us.append((middle - start) / 1000)
        self.backward_us.append((stop - middle) / 1000)

    @property
    def step_us(self) -> list[float]:
        return [f + b for f, b in zip(self.forward_us, self.backward_us, strict=True)]


class _Ones(dict[torch.Size, Tensor]):
    """A tangent for each shape."""

    def __missing__(self, shape: torch.Size) -> Tensor:
        self[shape] = torch.ones(shape)
        return self[shape]


_ONES = _Ones()


def _end(case: Case) -> Callable[[Any], Tensor]:
    """What backward starts from: the model's own loss, or its output, without a loss outside that would add time."""
    return cases.own_loss if case.loss is cases.own_loss else lambda output: output


def measured(case: Case, rounds: int, *, compiled: bool = False) -> dict[str, Any]:
    """Times of the plain model, and of the optimized one against it."""
    plain, args, kwargs = case.build()
    twin = copy.deepcopy(plain)
    if compiled:
        optimized, ops = torch.compile(twin, backend="aot_eager"), 0
    else:
        optimized = fxckpt.optimize(twin, ENOUGH)
    sides = [Side(model, args, kwargs, _end(case), [], []) for model in (plain, optimized)]
    for _ in range(WARM_UP):
        for side in sides:
            side.step()
    if not compiled:
        plan = plan_of(optimized)
        assert not plan.schedule.repeats()
        ops = len(plan.graph.ops)
    for side in sides:
        side.forward_us.clear()
        side.backward_us.clear()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for side in sides[:: 1 if number % 2 else -1]:
                side.step()
    finally:
        gc.enable()
    ours, theirs = sides[1], sides[0]
    return {
        "case": case.name,
        "ops": ops,
        "plain_us": statistics.median(theirs.step_us),
        "step_ratio": quartiles(ours.step_us, theirs.step_us),
        "forward_ratio": quartiles(ours.forward_us, theirs.forward_us),
        "backward_ratio": quartiles(ours.backward_us, theirs.backward_us),
    }


def quartiles(ours: list[float], theirs: list[float]) -> list[float]:
    """Quartiles of the ratios of times that were measured in turn."""
    return statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)


def _row(result: dict[str, Any]) -> list[str]:
    ratios = [result[f"{part}_ratio"] for part in ("step", "forward", "backward")]
    per_op = result["plain_us"] / result["ops"] if result["ops"] else float("nan")
    cells = [f"{median:.3f} ({low:.2f}-{high:.2f})" for low, median, high in ratios]
    return [result["case"], str(result["ops"]), f"{result['plain_us']:.0f}", f"{per_op:.1f}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile's aot_eager instead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for case in TINY:
        if options.cases and case.name not in options.cases:
            continue
        results.append(measured(case, options.rounds, compiled=options.compiled))
        print(tabulate([_row(results[-1])], HEADERS if len(results) == 1 else (), tablefmt="plain"), flush=True)
    print(f"worst: {max(result['step_ratio'][1] for result in results):.3f}")
    if options.output is not None:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

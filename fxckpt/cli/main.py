"""The command line: `python -m fxckpt demo | plan | bench | explain`.

Exit codes: 0 done, 1 the demo or bench found a difference between gradients, 2 a wrong argument or anything else that
fxckpt refuses, with the reason on stderr, 130 interrupted. Torch is imported only by the commands that need it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fxckpt import __version__
from fxckpt.calls import INPUTS
from fxckpt.cli.arguments import add_options, given_options, load_model, read_budget
from fxckpt.core.plans import Plan
from fxckpt.core.report.plot import save_timeline
from fxckpt.core.report.table import plan_text
from fxckpt.errors import FxckptError, PlanFormatError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `arguments` are those after the program's name. Returns the exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no µ or … shows ? instead
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FxckptError as error:
        print(f"fxckpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxckpt: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fxckpt",
        description="Train a PyTorch model inside a budget of memory: same gradients, least recomputation.",
    )
    parser.add_argument("--version", action="version", version=f"fxckpt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small GPT, plain and inside 40 %% of its memory, and compare")
    demo.add_argument("--steps", type=int, default=None, metavar="N", help="training steps (at least 2)")
    demo.add_argument("--tiny", action="store_true", help="a much smaller model: seconds instead of a minute or two")
    demo.set_defaults(command=_demo)

    plan = commands.add_parser("plan", help="plan a model of yours and print the plan")
    _add_model(plan)
    add_options(plan)
    plan.add_argument("--output", type=Path, metavar="PLAN.JSON", help="write the plan to this file")
    _add_outputs(plan)
    plan.set_defaults(command=_plan)

    bench = commands.add_parser("bench", help="optimize a model of yours and run it against the plain one")
    _add_model(bench)
    add_options(bench, without=("gradients",))
    bench.add_argument("--runs", type=int, default=15, metavar="N", help="steps to time (default: %(default)s)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(command=_bench)

    explain = commands.add_parser("explain", help="print a plan that was written to a file")
    explain.add_argument("file", type=Path, metavar="PLAN.JSON")
    _add_outputs(explain)
    explain.set_defaults(command=_explain)
    return parser


def _add_outputs(command: argparse.ArgumentParser) -> None:
    """The arguments that say how to show a plan."""
    command.add_argument("--all", action="store_true", help="print every row of the table")
    command.add_argument("--html", type=Path, metavar="PLAN.HTML", help="write a page with a timeline to point at")
    command.add_argument("--timeline", type=Path, metavar="PLAN.SVG", help="write the timeline as SVG, PNG or PDF")
    command.add_argument("--animate", type=Path, metavar="PLAN.GIF", help="write a film of the step")


def _add_model(command: argparse.ArgumentParser) -> None:
    """The arguments that say what to plan, and in how much memory."""
    command.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help=f"called without arguments, returns (model, inputs); inputs: {INPUTS}",
    )
    command.add_argument(
        "--memory-budget", required=True, metavar="SIZE", help='such as 2GB or 500MiB; 40%% or "0.4": of the plain peak'
    )


def _demo(options: argparse.Namespace) -> int:
    from fxckpt.cli import demo

    return demo.run(steps=options.steps, tiny=options.tiny)


def _plan(options: argparse.Namespace) -> int:
    from fxckpt import api

    budget = read_budget(options.memory_budget)
    model, args, kwargs = load_model(options.function)
    found = api.plan(model, budget, example_inputs=args, example_kwargs=kwargs, **given_options(options))
    print(plan_text(found, all=options.all), end="")
    if options.output is not None:
        _write(options.output, found.to_json())
        print(f"\nwritten to {options.output}")
    _draw(found, options)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from fxckpt import api

    budget = read_budget(options.memory_budget)
    model, args, kwargs = load_model(options.function)
    optimized = api.optimize(model, budget, **given_options(options))
    found = api.benchmark(model, optimized, example_inputs=args, example_kwargs=kwargs, runs=options.runs)
    print(found.to_json() if options.json else found)
    return 0 if found.same_bits else 1


def _explain(options: argparse.Namespace) -> int:
    try:
        plan = Plan.from_json(_read(options.file))
    except PlanFormatError as error:
        raise PlanFormatError(f"can't read {options.file}: {error}") from error
    print(plan_text(plan, all=options.all), end="")
    _draw(plan, options)
    return 0


def _draw(plan: Plan, options: argparse.Namespace) -> None:
    if options.html is not None:
        plan.save_html(options.html)
    if options.timeline is not None:
        save_timeline(plan, options.timeline)
    if options.animate is not None:
        plan.animate(options.animate)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanFormatError("it is not text") from error
    except OSError as error:
        raise FxckptError(f"can't read {file}: {error.strerror}") from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxckptError(f"can't write {file}: {error.strerror}") from error

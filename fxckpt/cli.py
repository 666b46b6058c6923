"""The command line: `python -m fxckpt demo | plan | explain`.

Exit codes: 0 done, 1 the demo found a difference, 2 a wrong argument or anything else that fxckpt refuses, with the
reason on stderr, 130 interrupted. Torch is imported only by the commands that need it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fxckpt.errors import BudgetError, FxckptError, PlanFormatError
from fxckpt.plans import Plan
from fxckpt.report.table import plan_text

_INPUTS = "a tuple of arguments, a dict of keyword arguments, or a pair (arguments, keyword arguments)"


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
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small GPT, plain and inside 40 %% of its memory, and compare")
    demo.add_argument("--steps", type=int, default=None, metavar="N", help="training steps (at least 2)")
    demo.add_argument("--tiny", action="store_true", help="a much smaller model: seconds instead of a minute or two")
    demo.set_defaults(command=_demo)

    plan = commands.add_parser("plan", help="plan a model of yours and print the plan")
    plan.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help=f"called without arguments, returns (model, inputs); inputs: {_INPUTS}",
    )
    plan.add_argument(
        "--memory-budget", required=True, metavar="SIZE", help='such as 2GB or 500MiB; 40%% or "0.4": of the plain peak'
    )
    plan.add_argument("--solver", default="auto", help="name of a solver (default: %(default)s)")
    plan.add_argument("--cost-model", default="auto", help="where times come from (default: %(default)s)")
    plan.add_argument(
        "--gradients",
        default="auto",
        choices=("auto", "fresh", "allocated"),
        help="whether .grad is empty or filled before the step (default: %(default)s)",
    )
    plan.add_argument("--output", type=Path, metavar="PLAN.JSON", help="write the plan to this file")
    plan.add_argument("--all", action="store_true", help="print every row of the table")
    plan.set_defaults(command=_plan)

    explain = commands.add_parser("explain", help="print a plan that was written to a file")
    explain.add_argument("file", type=Path, metavar="PLAN.JSON")
    explain.add_argument("--all", action="store_true", help="print every row of the table")
    explain.set_defaults(command=_explain)
    return parser


def _demo(options: argparse.Namespace) -> int:
    _quieten_profiler()
    from fxckpt import demo

    return demo.run(steps=options.steps, tiny=options.tiny)


def _plan(options: argparse.Namespace) -> int:
    _quieten_profiler()
    from fxckpt import api

    budget = _budget(options.memory_budget)
    model, args, kwargs = _model(options.function)
    found = api.plan(
        model,
        budget,
        example_inputs=args,
        example_kwargs=kwargs,
        solver=options.solver,
        cost_model=options.cost_model,
        gradients=options.gradients,
    )
    print(plan_text(found, all=options.all), end="")
    if options.output is not None:
        _write(options.output, found.to_json())
        print(f"\nwritten to {options.output}")
    return 0


def _quieten_profiler() -> None:
    """Torch's profiler measures memory and announces on stderr that it starts; torch looks here when imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _explain(options: argparse.Namespace) -> int:
    print(plan_text(Plan.from_json(_read(options.file)), all=options.all), end="")
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanFormatError(f"{file} is not a plan written by fxckpt: it is not text") from error
    except OSError as error:
        raise FxckptError(f"can't read {file}: {error.strerror}") from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxckptError(f"can't write {file}: {error.strerror}") from error


def _budget(text: str) -> str | float:
    """The budget as `optimize` takes it: "2GB" stays, "40%" and "0.4" are fractions of the plain peak."""
    number, factor = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
    if factor == 1.0 and "." not in number:
        return text
    try:
        fraction = float(number) * factor
    except ValueError:
        return text
    if not 0 < fraction <= 1:
        raise BudgetError(f"a fraction of the plain peak must be above 0 and at most 1 (100%), but it is {text}")
    return fraction


def _model(text: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call MODULE:FUNCTION; the model, positional and keyword inputs."""
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise FxckptError(f"{text!r} names no function: write MODULE:FUNCTION, such as train:build")
    if module_name.endswith(".py"):
        name = module_name.removesuffix(".py").replace(os.sep, ".")
        raise FxckptError(f"name the module, not its file: {name}:{function_name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise FxckptError(f"importing {module_name} failed: {error}") from error
        raise FxckptError(f"there is no module {error.name!r} here or on the path of Python") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise FxckptError(f"module {module_name!r} has no function {function_name!r}")
    result = function()
    if not isinstance(result, tuple) or len(result) != 2:
        raise FxckptError(f"{text} must return (model, inputs), but it returned {type(result).__name__}")
    args, kwargs = _inputs(result[1], text)
    return result[0], args, kwargs


def _inputs(inputs: Any, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return inputs[0], inputs[1]
        return inputs, {}
    raise FxckptError(f"{text} must return (model, inputs), where inputs is {_INPUTS}; it is {type(inputs).__name__}")

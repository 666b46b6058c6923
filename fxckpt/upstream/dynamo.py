"""TorchDynamo, which reads forward's bytecode and guards all that it read: what we need of it, behind names of our own.

Settings of Dynamo are changed for the time of a compilation and in the thread that compiles, never for the process.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo import config, convert_frame, eval_frame, exc
from torch.distributions import Distribution
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _disable_current_modes

from fxckpt.errors import FxckptError
from fxckpt.upstream.answers import Seen, answers
from fxckpt.upstream.floats import Floats, is_exact
from fxckpt.upstream.questions import Questions
from fxckpt.upstream.versions import APART

_SETTINGS: dict[str, Any] = {
    "accumulated_recompile_limit": sys.maxsize,
    "allow_rnn": True,
    "automatic_dynamic_shapes": False,
    "enable_compiler_collectives": False,
    "error_on_nested_fx_trace": False,
    "optimize_ddp": False,
    "recompile_limit": sys.maxsize,  # whoever plans counts plans
    "rewrite_assert_with_torch_assert": False,
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "suppress_errors": False,
    "trace_autograd_ops": True,
    "use_numpy_random_stream": True,  # numpy's draws are numpy's: they are refused rather than made torch's
}


_FAILURES = (exc.TorchDynamoException, GuardOnDataDependentSymNode, AssertionError, IndexError)
"""What Dynamo raises where it can't go on, or where it has a fault itself: some are of its own code."""


_CHANGED_MEANWHILE = "Guard failed on the same frame it was created"
"""What Dynamo says where something else is true at the end of tracing than at its start: a patch of torch that another
thread made, or took away, since Dynamo guards the code of functions."""
_ATTEMPTS = 3


class NotTraced(Exception):  # noqa: N818 - caught, and answered by another way to capture
    """Dynamo can't make one graph of a function.

    Attributes:
        reason: what it says about that, in some words.
        line: "file:line (code)" of the user's code, "" if it is unknown.
    """

    def __init__(self, reason: str, line: str) -> None:
        super().__init__(f"{line} {reason}" if line else reason)
        self.reason, self.line = reason, line


@dataclass(frozen=True)
class TracedGraph:
    """A graph of torch functions that Dynamo made of a function, or of a part of one.

    Attributes:
        module: the graph. It takes flat tensors and returns them.
        examples: the tensors of the call that it was made in.
        sources: for each of them where Dynamo finds it, as Python code; behind "number: " if it is a number.
        loss: index of the output that the function returns as `loss`, if there is one.
        checkpointed: the function checkpoints activations itself.
    """

    module: fx.GraphModule
    examples: Sequence[Any]
    sources: Sequence[str]
    loss: int | None
    checkpointed: bool


NOT_MEANWHILE = convert_frame.compile_lock
"""Held while Dynamo converts a frame: whoever changes what tracing calls, for a while, holds it too."""

Make = Callable[[TracedGraph], Callable[..., Any]]
"""Given a graph, what runs in its place."""

FUNCTION = "L['function']"
"""Name of the traced function in the sources of a graph's inputs; those of its arguments begin with `L['args']`."""


class Traced:
    """A function that Dynamo has in hand: at each call it looks for a graph that holds, and makes one if none does.

    Attributes:
        why_again: why a graph did not hold last.
        random_state: of Python's random numbers when the present call, or the last, was first traced; None if it was
            not.

    What Dynamo keeps of a function is kept with the function's code. So the function is called from code of its own,
    and what is kept goes when this goes.
    """

    def __init__(self, function: Callable[..., Any], make: Make, *, one_graph: bool = True) -> None:
        self._make = make
        self.why_again = ""
        self.random_state: Any = None
        self._seen = Seen()
        self._floats = Floats()
        owner = _in_own_code(function)
        backend, note_failure = _weakly(self, Traced._graph), _weakly(self, Traced._note_failure)
        with _validation_kept():
            context: Any = torch._dynamo.optimize(
                backend, nopython=one_graph, dynamic=False, guard_fail_fn=note_failure, **APART
            )
        context.callback = _Callback(context.callback, self._floats, _weakly(self, Traced._begin))
        self._call = context(owner)
        self._code = owner.__code__
        weakref.finalize(self, _let_go, self._code, id(eval_frame.innermost_backend(context.callback)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result.

        Raises:
            NotTraced: the function can't be traced.
        """
        self.random_state = None
        if eval_frame._stance.stance != "default":  # it is about functions that users compiled
            with torch.compiler.set_stance("default"):
                return self._call(*args, **kwargs)
        return self._call(*args, **kwargs)

    def forget(self) -> None:
        """Drop all graphs."""
        _reset(self._code)

    def _begin(self, seen: Seen) -> None:
        self._seen = seen
        if self.random_state is None:
            self.random_state = random.getstate()

    def _graph(self, module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        floats = [n for n in module.graph.nodes if n.op == "placeholder" and _source(n) in self._floats.inputs]
        if not is_exact(module, floats):
            raise _Inexact
        return self._make(traced_graph(module, examples, self._seen))

    def _note_failure(self, failure: Any) -> None:
        self.why_again = " ".join(str(failure.reason).split("\n")[0].split(" #")[0].split())


def traced_graph(module: fx.GraphModule, examples: Sequence[Any], seen: Seen | None = None) -> TracedGraph:
    """A graph as Dynamo hands it to a backend, and what was `seen` while it was made."""
    seen = seen or Seen()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sources = ["number: " * _is_number(node) + _source(node) for node in placeholders]
    returned: Any = module.graph.output_node().args[0]
    names = [getattr(node, "name", None) for node in returned]
    loss = names.index(seen.loss) if seen.loss in names else None
    return TracedGraph(module, examples, sources, loss, seen.checkpointed)


def module_key(module: torch.nn.Module) -> str:
    """What Dynamo calls a module in the metadata of nodes."""
    return str(id(module))


def _source(node: fx.Node) -> str:
    """Where Dynamo finds the tensor that an input of a graph stands for, "" if that is unknown."""
    given = node.meta.get("grapharg")
    return "" if given is None or given.source is None else str(given.source.name)


def _is_number(node: fx.Node) -> bool:
    """Whether an input of a graph stands for a number of Python's."""
    given = node.meta.get("grapharg")
    return given is not None and given.pass_arg_as_tensor


def _weakly(owner: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of an owner that this does not keep alive; afterwards it does nothing."""
    reference = weakref.ref(owner)

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else method(alive, *args)

    return call


@contextlib.contextmanager
def _validation_kept() -> Iterator[None]:
    """Dynamo turns the checks of `torch.distributions` off for the whole process when it is first used: they stay."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution._validate_args = before


def _reset(code: types.CodeType) -> None:
    torch._C._dynamo.eval_frame.reset_code(code)


def _let_go(code: types.CodeType, backend: int) -> None:
    _reset(code)
    eval_frame.cached_backends.pop(backend, None)


def _in_own_code(function: Callable[..., Any]) -> types.FunctionType:
    def planned(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    names = {"__builtins__": __builtins__, "__name__": __name__}
    return types.FunctionType(planned.__code__.replace(co_name="planned"), names, "planned", (), planned.__closure__)


class _Tracing(threading.local):
    ours = False


_tracing = _Tracing()


def traced_for_plan() -> bool:
    """Whether what runs is being traced by Dynamo on our behalf, rather than for `torch.compile`."""
    return _tracing.ours


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    before, _tracing.ours = _tracing.ours, True
    try:
        yield
    finally:
        _tracing.ours = before


class _Callback:
    """What Dynamo calls to convert a frame: its own way to do so, with our settings and answers.

    What fails is told as ours.
    """

    def __init__(self, convert: Any, floats: Floats, begin: Callable[[Seen], None]) -> None:
        self._convert, self._floats, self._begin = convert, floats, begin
        self._questions = Questions()
        self._torchdynamo_orig_backend = convert._torchdynamo_orig_backend

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        with (
            convert_frame.compile_lock,
            _ours(),
            config.patch(_SETTINGS),
            _disable_current_modes(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # what the model has to say it says when it runs
            again = _ATTEMPTS
            while True:
                self._floats.inputs = set()
                self._questions.begin()
                with answers(frame.f_code, self._floats, self._questions) as seen:
                    self._begin(seen)
                    try:
                        return self._convert(frame, cache_entry, frame_state)
                    except _FAILURES as error:
                        inner = getattr(error, "inner_exception", None)
                        if isinstance(inner, FxckptError):
                            raise inner from None
                        stack = getattr(error, "real_stack", None) or ()
                        if self._floats.give_up() or self._questions.tell(stack):
                            continue
                        if _CHANGED_MEANWHILE in str(error) and again:
                            again -= 1
                            continue
                        raise NotTraced(_reason(error), _line(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._convert, name)


class _Inexact(Exception):  # noqa: N818 - no error
    """A graph would compute something else with floats as its inputs."""


def _reason(error: BaseException) -> str:
    text = str(error).split("\n\n")[0]
    what, _, explanation = text.partition("\n  Explanation: ")
    explanation = explanation.split("\n  Hint: ")[0]
    return " ".join(f"{what} ({explanation.rstrip('. ')})".split() if explanation else what.split())


def _line(error: BaseException) -> str:
    for frame in reversed(list(getattr(error, "real_stack", None) or ())):
        return f"{frame.filename}:{frame.lineno} ({frame.line or frame.name})"
    return ""

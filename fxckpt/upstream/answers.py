"""Answers to what a model asks while Dynamo traces it, so that it takes the way that it takes in eager.

- Whether it is compiled: no, where Dynamo can follow the way that they take in eager; see `questions`.
- Questions about values that follow from one argument of integers, as whether a mask masks anything: from the example,
  and a guard on the argument computes the answer again at each call.
- Questions that only lead to an error, `if bad: raise`: the answer that raises none, checked by an op in the graph.
- Checkpoints of its own: their function is called.
- Draws of `random`: inputs of the graph, drawn at each call; where a draw decides what is computed, it is refused.

Dynamo's tables are changed while one frame is converted, under Dynamo's own lock, so nobody else sees it.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, cast
from unittest import mock

import torch
from torch._dynamo import exc, polyfills
from torch._dynamo import symbolic_convert as convert
from torch._dynamo.source import RandomValueSource
from torch._dynamo.variables import ConstantVariable, TensorVariable, UserFunctionVariable, builder, misc, user_defined
from torch._dynamo.variables import functions as function_variables
from torch._dynamo.variables import torch as torch_variables
from torch._dynamo.variables.tensor import UnspecializedPythonVariable
from torch.distributions import constraints

from fxckpt.upstream.bytecode import PASSED, UNCHANGING, Code, branches
from fxckpt.upstream.floats import Floats
from fxckpt.upstream.kernels import refuse_nested
from fxckpt.upstream.known_values import answer
from fxckpt.upstream.ops.expect import EXPECT
from fxckpt.upstream.patching import seen_here
from fxckpt.upstream.questions import QUESTIONS, Questions
from fxckpt.upstream.strides import right_views
from fxckpt.upstream.versions import floats_as_before, truth_replaced

_TRANSLATORS = (
    convert.InstructionTranslator,
    convert.InliningInstructionTranslator,
    convert.InliningGeneratorInstructionTranslator,
)
_WARNS = ("transformers.modeling_utils", "warn_if_padding_and_no_attention_mask")
"""A method of transformers' models that reads all ids, only to warn."""
_TRACING = ("transformers.utils.import_utils", "is_tracing")
"""How transformers' models ask whether they are traced."""
_INSTALLS = ("transformers.utils.output_capturing", "maybe_install_capturing_hooks")
"""What transformers' models do when they first run, once for all calls, under a lock."""
_OF_SEVERAL = {
    inspect.unwrap(polyfills.builtins.any).__code__: True,
    inspect.unwrap(polyfills.builtins.all).__code__: False,
}
"""Functions that go through several questions, and the answer at which they stop."""
_ENCODER: Any = torch.nn.TransformerEncoder.forward
_ALL_TRUE = {torch._check_tensor_all: 0, torch._check_tensor_all_with: 1}
"""Functions that raise an error if not all elements of an argument are true, and which argument that is."""
_CHECKING = frozenset({torch.nn.functional.gaussian_nll_loss})
"""Functions of torch in which values are checked, in Python."""


class Draws(exc.Unsupported):
    """Forward decides by a random number of Python's what to compute."""


class Seen:
    """What was noticed while a frame was converted.

    Attributes:
        checkpointed: the model checkpoints activations itself.
        loss: name of the node whose value is returned as `loss`.
    """

    def __init__(self) -> None:
        self.checkpointed = False
        self.loss: str | None = None


@contextlib.contextmanager
def answers(code: CodeType, floats: Floats, questions: Questions) -> Iterator[Seen]:
    """Give the answers while the frame of `code` is converted."""
    seen = Seen()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for kind in _TRANSLATORS:
            table = list(kind.dispatch_table)
            for opcode, handler in enumerate(table):
                name = dis.opname[opcode]
                if handler is not None and (branches(name) or name == "UNARY_NOT"):
                    table[opcode] = _answered(handler)
                elif handler is not None and name == "RETURN_VALUE" and kind is convert.InstructionTranslator:
                    table[opcode] = _noting_loss(handler, code, seen)
            enter(mock.patch.object(kind, "dispatch_table", table))
        enter(right_views())
        enter(mock.patch.object(builder.VariableBuilder, "wrap_symfloat", _float(floats)))
        enter(truth_replaced(_truth))
        enter(mock.patch.object(TensorVariable, "method_item", _item(TensorVariable.method_item)))
        enter(mock.patch.object(TensorVariable, "unpack_var_sequence", _unbound(TensorVariable.unpack_var_sequence)))
        enter(_calls(questions))
        enter(mock.patch.object(builder, "build_checkpoint_variable", functools.partial(_checkpoint, seen)))
        enter(mock.patch.object(misc.LoggingLoggerVariable, "call_method", _log))
        enter(mock.patch.object(misc.RandomVariable, "call_method", _random(misc.RandomVariable.call_method)))
        enter(mock.patch.object(torch.fx.node, "_side_effectful_functions", _effects()))
        yield seen


def _effects() -> set[Any]:
    return torch.fx.node._side_effectful_functions | {EXPECT}


# Branches


Handler = Callable[[Any, Any], None]


def _answered(original: Handler) -> Handler:
    def at_branch(tx: Any, instruction: Any) -> None:
        top = tx.stack[-1].realize() if hasattr(tx.stack[-1], "realize") else tx.stack[-1]
        if isinstance(top, UnspecializedPythonVariable):
            _refuse_draw(top)
        elif isinstance(top, TensorVariable):
            known = answer(top)
            if known is None and branches(instruction.opname):
                known = _way_without_error(tx, instruction)
                if known is not None:
                    tx.output.create_proxy("call_function", EXPECT, (top.as_proxy(), known), {})
            if known is not None:
                tx.stack[-1] = ConstantVariable.create(bool(known))
            elif instruction.opname == "UNARY_NOT" and _decides_branch(tx):
                tx.stack[-1] = top.call_method(tx, "logical_not", [], {})
                return
        original(tx, instruction)

    return at_branch


def _refuse_draw(top: Any) -> None:
    node = top.as_proxy().node
    drawn = [n for n in (node, *node.all_input_nodes) if isinstance(_source(n), RandomValueSource)]
    if drawn:
        raise Draws("forward decides by a random number of Python's `random` what to compute")


_DECIDING = frozenset({"getstate", "sample", "shuffle"})
"""Methods of a generator of `random` whose results Dynamo would keep, in versions that trace them."""


def _random(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_method(self: Any, tx: Any, name: str, *args: Any) -> Any:
        if name in _DECIDING and self.source is not None:
            raise Draws(f"forward calls `{name}` of a generator of Python's `random`")
        return original(self, tx, name, *args)

    return call_method


def _source(node: Any) -> Any:
    given = node.meta.get("grapharg")
    return None if given is None else given.source


def _way_without_error(tx: Any, instruction: Any) -> bool | None:
    """Which value at a branch does not end in `raise` where the other does."""
    if tx.f_code in _OF_SEVERAL and tx.parent is not None:  # `any` and `all` answer for the branch of their caller
        shortcut = _OF_SEVERAL[tx.f_code]
        following = (each for each in tx.parent.instructions[tx.parent.instruction_pointer :])
        branch = next((each for each in following if each.opname not in UNCHANGING), None)
        if branch is None or not branches(branch.opname) or _way_without_error(tx.parent, branch) is not (not shortcut):
            return None
        return not shortcut
    code = tx.instructions
    place = {id(each): number for number, each in enumerate(code)}

    def target(at: int) -> int | None:
        return None if code[at].target is None else place[id(code[at].target)]

    return Code([each.opname for each in code], target).way_without_error(place[id(instruction)])


def _decides_branch(tx: Any) -> bool:
    """Whether what the present instruction leaves only decides a branch, here or where it is returned to."""
    following = tx.instructions[tx.instruction_pointer :]
    name = next((each.opname for each in following if each.opname not in PASSED), "")
    return _decides_branch(tx.parent) if name == "RETURN_VALUE" and tx.parent is not None else branches(name)


def _truth(original: Callable[..., Any]) -> Callable[..., Any]:
    """`bool` of a tensor."""

    def bool_impl(self: Any, tx: Any) -> Any:
        known = answer(self)
        if known is not None:
            return ConstantVariable.create(bool(known))
        return self if _decides_branch(tx) else original(self, tx)

    return bool_impl


def _item(original: Callable[..., Any]) -> Callable[..., Any]:
    def item(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        known = answer(self)
        if known is None and self.dtype is torch.bool and _decides_branch(tx):
            return self
        return original(self, tx, *args, **kwargs) if known is None else ConstantVariable.create(known)

    return item


def _unbound(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor that is taken apart along its first dim is taken apart by one op, as eager does."""

    def unpack(self: Any, tx: Any, idxes: Any = None) -> Any:
        rows = self.size[0] if self.valid_size() and len(self.size) else 0
        if (
            type(self) is not TensorVariable
            or not isinstance(rows, int)
            or not rows
            or len(idxes or range(rows)) != rows
        ):
            return original(self, tx, idxes)
        parts = self.call_method(tx, "unbind", [ConstantVariable.create(0)], {})
        return parts.unpack_var_sequence(tx)

    return unpack


# Calls


@contextlib.contextmanager
def _calls(questions: Questions) -> Iterator[None]:
    torch_call = torch_variables.TorchInGraphFunctionVariable.call_function
    python_call = UserFunctionVariable.call_function
    skipped_call = function_variables.SkipFunctionVariable.call_function

    def call_torch(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is torch.nn.modules.activation._is_make_fx_tracing:
            return ConstantVariable.create(False)
        if self.value in _ALL_TRUE:
            return _expect_all(tx, args[_ALL_TRUE[self.value]]) or torch_call(self, tx, args, kwargs)
        if self.value in _CHECKING:
            return UserFunctionVariable(self.value).call_function(tx, args, kwargs)
        known = questions.answer(self.value, tx) if self.value in QUESTIONS else None
        if known is not None:
            return ConstantVariable.create(known)
        return torch_call(self, tx, args, kwargs)

    def call_python(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        seen_function = seen_here(self.fn)
        if seen_function is not self.fn:  # another thread captures just now
            return UserFunctionVariable(seen_function).call_function(tx, args, kwargs)
        if self.fn is _ENCODER:
            UserFunctionVariable(cast(FunctionType, refuse_nested)).call_function(tx, args, kwargs)  # may refuse
        named = self.fn.__module__, self.fn.__name__
        if named == _WARNS:
            return ConstantVariable.create(None)
        if named == _TRACING:
            return ConstantVariable.create(False)
        if named == _INSTALLS and len(args) == 1:
            self.fn(args[0].realize().value)
            return ConstantVariable.create(None)
        return python_call(self, tx, args, kwargs)

    def call_skipped(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if getattr(self.value, "__self__", None) is random._inst and self.value.__name__ == "random" and not args:
            return user_defined.call_random_fn(tx, self.value, args, kwargs)
        if self.value is constraints.is_dependent:
            constraint = getattr(args[0].realize(), "value", None)
            if isinstance(constraint, constraints.Constraint):
                return ConstantVariable.create(constraints.is_dependent(constraint))
        return skipped_call(self, tx, args, kwargs)

    with (
        mock.patch.object(torch_variables.TorchInGraphFunctionVariable, "call_function", call_torch),
        mock.patch.object(UserFunctionVariable, "call_function", call_python),
        mock.patch.object(function_variables.SkipFunctionVariable, "call_function", call_skipped),
    ):
        yield


def _expect_all(tx: Any, condition: Any) -> Any:
    """A check that all elements of a tensor are true; None if there is no tensor."""
    condition = condition.realize()
    if not isinstance(condition, TensorVariable):
        return None
    value = condition.call_method(tx, "all", [], {})
    if answer(value) is not True:
        tx.output.create_proxy("call_function", EXPECT, (value.as_proxy(), True), {})
    return ConstantVariable.create(None)


def _checkpoint(seen: Seen, **options: Any) -> Any:
    seen.checkpointed = True
    return UserFunctionVariable(cast(FunctionType, not_checkpointed), **options)


def not_checkpointed(
    function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **options: Any
) -> Any:
    """`torch.utils.checkpoint.checkpoint` without checkpointing."""
    for name in ("preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"):
        options.pop(name, None)
    if use_reentrant:  # as in eager, nothing inside gets a gradient unless an input requires one
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        with torch.set_grad_enabled(wanted):
            return function(*args)
    return function(*args, **options)


def _log(self: Any, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A logger's method is called when the graph has run."""
    method: Any = getattr(self.value, name)
    if name.startswith(("is", "get")) and not args:
        return ConstantVariable.create(method())
    if name == "isEnabledFor" and args[0].is_python_constant():
        return ConstantVariable.create(method(args[0].as_python_constant()))
    if self.source is not None and not kwargs and misc.DebuggingVariable.can_reorder_logs(method, args, kwargs):
        from torch._dynamo.source import AttrSource

        later = misc.DebuggingVariable(method, source=AttrSource(self.source, name))
        tx.debug_locals.append((later, list(args)))
    return ConstantVariable.create(None)


def _float(floats: Floats) -> Callable[..., Any]:
    original = builder.VariableBuilder.wrap_symfloat

    def wrap(self: Any, value: float) -> Any:
        if floats.is_input(self.name, value):
            with floats_as_before():
                return self.wrap_unspecialized_primitive(value)
        return original(self, value)

    return wrap


# What is returned


def _noting_loss(original: Handler, code: CodeType, seen: Seen) -> Handler:
    def at_return(tx: Any, instruction: Any) -> None:
        if tx.f_code is code and tx.parent is None:
            seen.loss = _loss_of(tx.stack[-1])
        original(tx, instruction)

    return at_return


def _loss_of(value: Any) -> str | None:
    """The node of an object's `loss`, as HuggingFace's models return it when they get labels."""
    value = value.realize() if hasattr(value, "realize") else value
    for held in (value, getattr(value, "_dict_vt", None), getattr(value, "_base_vt", None)):
        items = getattr(held, "items", None)
        if isinstance(items, dict):
            for key, found in items.items():
                name = getattr(key, "vt", key)
                if getattr(name, "value", None) == "loss" and isinstance(found, TensorVariable):
                    return str(found.as_proxy().node.name)
    return None

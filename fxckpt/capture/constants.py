"""Values that are known while nothing is computed: a model that asks for them while it is traced gets them.

Positions made by `arange`, masks made from shapes: no tensor holds numbers while a graph is captured, so models could
not look whether positions have gaps, as transformers do before they choose how to run attention, and would take another
way than in eager. Such values are computed beside the graph, for as long as everything they are made of is known.

Known is also an argument of integers that are all 0 or all 1, as an attention mask is where nothing is padded. Then the
graph is good for calls with this value only: `Constants.asked` says which arguments such answers depend on, given or
not, and whoever calls the graph compares `only_value` of them. Where all that an answer decides is whether an error is
raised, values need not be known (see `checks`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fxckpt.capture.checks import answer_without_error
from fxckpt.upstream import pytree
from fxckpt.upstream.absent_gpu import computed_on
from fxckpt.upstream.dispatch import describes_op, really_computed
from fxckpt.upstream.fakes import traced_tensors_have
from fxckpt.upstream.generators import DrawsRefused, RandomDraw
from fxckpt.upstream.operators import changes_by_name
from fxckpt.upstream.patching import function_replaced

_MADE_OF_NOTHING: frozenset[Any] = frozenset(
    {
        torch.arange,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)
_MADE_OF_A_FORM: frozenset[Any] = frozenset(
    {
        torch.full_like,
        torch.ones_like,
        torch.zeros_like,
        Tensor.new_full,
        Tensor.new_ones,
        Tensor.new_zeros,
    }
)
_READS: frozenset[Any] = frozenset(
    {
        torch.allclose,
        torch.equal,
        torch.is_nonzero,
        Tensor.__bool__,
        Tensor.__contains__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__int__,
        Tensor.allclose,
        Tensor.equal,
        Tensor.is_nonzero,
        Tensor.item,
        Tensor.tolist,
    }
)
_UNKNOWN_PARTS = ("empty", "resize")
_FAILURES = (RuntimeError, IndexError, ValueError, RandomDraw)
_MOST_ELEMENTS = 2**20
_DEVICES = ("meta", "cuda")
_WARNS = "warn_if_padding_and_no_attention_mask"
"""A method of transformers' models that reads all ids, only to warn."""


def only_value(tensor: Tensor) -> int | None:
    """0 or 1 if all elements of a tensor of integers or booleans are that, as those of masks are; else None.

    A single number is none: it may be another at each call, and each would be planned for.
    """
    if type(tensor) is not Tensor or tensor.is_meta or not _may_be_mask(tensor):
        return None
    with torch.no_grad():
        first = int(tensor[(0,) * tensor.dim()])
        return first if first in (0, 1) and bool((tensor == first).all()) else None


def _may_be_mask(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and 1 < tensor.numel() <= _MOST_ELEMENTS


class _Known(NamedTuple):
    """Numbers, and the arguments that they are computed from."""

    value: Tensor
    arguments: frozenset[int]


class Constants(TorchFunctionMode):
    """Computes what is known beside what is traced, and answers questions about it.

    Attributes:
        asked: numbers of the arguments about whose values something was asked that depends on them alone.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        """`arguments` are the real ones, in whose place others are traced."""
        super().__init__()
        self.asked: set[int] = set()
        self._known: Any = WeakIdKeyDictionary()  # traced tensor -> what is known of it
        self._values = [only_value(argument) for argument in arguments]
        self._patches = contextlib.ExitStack()

    def traced(self, arguments: Sequence[Tensor]) -> None:
        """These tensors are traced in the place of the arguments."""
        for number, argument in enumerate(arguments):
            if not _may_be_mask(argument):
                continue
            with really_computed():  # what is not known is computed as zeros, and not told
                number_or_zero, device = self._values[number] or 0, computed_on(argument.device)
                value = torch.full(argument.shape, number_or_zero, dtype=argument.dtype, device=device)
            self._known[argument] = _Known(value, frozenset({number}))

    def __enter__(self) -> Constants:
        reads: dict[str, Callable[[Any], Any]] = {
            "tolist": Tensor.tolist,  # seen by modes, too
            "item": lambda x: Tensor.item(x) if x.dtype is not torch.bool else self._truth(x, sys._getframe(1)),
            "__bool__": lambda x: self._truth(x, sys._getframe(1)),
        }
        self._patches.enter_context(traced_tensors_have(**reads))
        model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        if hasattr(model, _WARNS):
            self._patches.enter_context(function_replaced(getattr(model, _WARNS), _says_nothing))
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if describes_op():
            return func(*args, **kwargs)
        given = pytree.tensors_in((args, kwargs))
        read = given[1:] if func in _MADE_OF_A_FORM else given
        known = all(x in self._known for x in read) and (bool(given) or func in _MADE_OF_NOTHING)
        arguments = frozenset[int]().union(*(self._known[x].arguments for x in read if x in self._known))
        if known and func in _READS:
            self.asked |= arguments
            if all(self._values[number] is not None for number in arguments):
                return self._compute(func, args, kwargs)
        changes = changes_by_name(_name(func), kwargs)
        if changes and known:  # else other views of what is changed would not tell what it depends on now
            known = all(self._known[x].arguments == arguments for x in given)
        known = known and not any(part in _name(func) for part in _UNKNOWN_PARTS)
        result = func(*args, **kwargs)
        if known:
            self._note(func, args, kwargs, result, arguments)
        elif changes and any(x in self._known for x in given):
            self._known.clear()  # what is changed may be seen through other tensors too
        return result

    def _truth(self, tensor: Tensor, frame: FrameType) -> bool:
        """Whether a tensor that `frame` reads is true."""
        if tensor not in self._known or self._known[tensor].arguments:
            answer = answer_without_error(tensor, frame)
            if answer is not None:
                return answer
        return bool(Tensor.item(tensor))

    def _note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        arguments: frozenset[int],
    ) -> None:
        """Compute what was just traced; values of results that are too large, or drawn at random, are not known."""
        made = pytree.tensors_in(result)
        if not made and not changes_by_name(_name(func), kwargs):
            return
        values = None
        if sum(x.numel() for x in made) <= _MOST_ELEMENTS:
            with contextlib.suppress(*_FAILURES):
                values = pytree.tensors_in(self._compute(func, args, kwargs))
        if values is not None and len(values) == len(made):
            for tensor, value in zip(made, values, strict=True):
                self._known[tensor] = _Known(value, arguments)
        elif changes_by_name(_name(func), kwargs):
            self._known.clear()

    def _compute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with really_computed(), DrawsRefused():
            args, kwargs = pytree.tree_map(self._value, (args, kwargs))
            return func(*args, **kwargs)

    def _value(self, given: Any) -> Any:
        if isinstance(given, Tensor) and given in self._known:
            return self._known[given].value
        if isinstance(given, Tensor):  # only its form is asked for
            return torch.empty((), dtype=given.dtype, device=computed_on(given.device)).expand(given.shape)
        return computed_on(given) if isinstance(given, torch.device) or given in _DEVICES else given


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


def _says_nothing(*_: Any, **__: Any) -> None:
    """Stands for a method that only warns."""

"""An op of a captured graph run by itself, on arguments that mean something to it.

Most arguments may be made up: a matrix product takes as long, and as much memory, whatever the numbers. Others may not.
Indices must lie inside of what they index; and kernels such as attention, batch norm or recurrent layers hand notes to
their own backward (logarithms of sums, seeds, buffers in a private format, sometimes on another device than tracing
says), which backward follows as pointers follow an address. So what a graph passes on is made up only where a number is
as good as another: floating-point inputs, and the one floating-point result that an op is called for. All else is had
by running the op that makes it, on arguments of the same kind. What can't be had so is not run.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from fxckpt.capture.nodes import is_collective, is_random, is_selection, tensors, value
from fxckpt.upstream.dispatch import plain_execution
from fxckpt.upstream.operators import changes_arguments, is_operator, returns_nothing
from fxckpt.upstream.pytree import tensors_in, tree_map_only
from fxckpt.upstream.tensors import storage_key

_Result = TypeVar("_Result")
_MOST_PRODUCERS = 256
_WELL_TAGGED = frozenset(("aten", "prims", "fxckpt"))  # operators of others may draw and not say so


class NotRunnable(Exception):  # noqa: N818, since users never see it
    """An op can't be run by itself: it acts on more than its arguments, or refuses those that can be had."""


class NoMemory(Exception):  # noqa: N818, as above
    """There is not enough memory to run an op by itself."""


@dataclass(frozen=True)
class Call:
    """An op with real arguments.

    Attributes:
        target, args, kwargs: what is called, and with what.
        devices: where its arguments and results are.
        draws: whether it may draw random numbers.
    """

    target: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    devices: frozenset[torch.device]
    draws: bool

    def run(self) -> Any:
        """Run the op as emitted graphs do."""
        with plain_execution():
            return self.target(*self.args, **self.kwargs)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is run meanwhile leaves no gradients, and generators as they were.

        That of the CPU is only touched for ops that may draw: another thread may draw from it meanwhile.
        """
        kinds = sorted({device.type for device in self.devices} - {"cpu", "meta"})
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for kind in kinds:
                indices = sorted({device.index or 0 for device in self.devices if device.type == kind})
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
            if self.draws and not kinds:
                stack.enter_context(torch.random.fork_rng([]))
            yield


@dataclass(frozen=True)
class Standalone:
    """Makes calls of a graph's ops.

    Attributes:
        given: what inputs of the graph really are, as far as they are known; of these only what is not floating-point
            is looked at.
    """

    given: Mapping[fx.Node, torch.Tensor] = field(default_factory=dict)

    def call(self, node: fx.Node) -> Call:
        """The call of an op. Ops that make its arguments are run, the op itself is not.

        Raises:
            NotRunnable: it can't be run by itself.
            NoMemory: there is no memory for its arguments.
        """
        return with_memory(lambda: self._call(node, {}))

    def _call(self, node: fx.Node, made: dict[fx.Node, Any]) -> Call:
        target = node.target
        if not is_operator(target) or is_collective(node) or returns_nothing(target):
            raise NotRunnable(f"{target} acts on more than its arguments")
        sources = sorted(node.all_input_nodes, key=lambda source: not has_meaning(source))
        for source in sources:  # those that are run first: their producers' other results are then there, too
            self._make(source, made)
        args, kwargs = tree_map_only(fx.Node, made.__getitem__, (node.args, node.kwargs))
        if changes_arguments(target):
            args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        devices = frozenset(t.device for t in (*tensors(node), *tensors_in((args, kwargs))))
        return Call(target, args, kwargs, devices, is_random(node) or target.namespace not in _WELL_TAGGED)

    def _make(self, node: fx.Node, made: dict[fx.Node, Any]) -> None:
        """Put what a node computes into `made`, with all that had to be run for it."""
        if node in made:
            return
        if len(made) > _MOST_PRODUCERS:
            raise NotRunnable("too many ops would have to be run for its arguments")
        if node.op == "get_attr":
            made[node] = getattr(node.graph.owning_module, str(node.target), None)
        elif node.op != "placeholder" and is_selection(node) and (has_meaning(node) or node.args[0] in made):
            producer = node.all_input_nodes[0]
            self._make_really(producer, made)
            made[node] = made[producer][node.args[1]]
        elif node.op != "placeholder" and has_meaning(node):
            self._make_really(node, made)
        elif node in self.given and not _is_floating(self.given[node]):
            made[node] = self.given[node].detach()
        else:
            with _refused(f"arguments of the form of {node.name} can't be made up"):
                made[node] = tree_map_only(torch.Tensor, _tensor_like, value(node))

    def _make_really(self, node: fx.Node, made: dict[fx.Node, Any]) -> None:
        if node not in made:
            call = self._call(node, made)
            with call.aside():
                made[node] = try_run(call)


def has_meaning(node: fx.Node) -> bool:
    """Whether what a node computes must not be made up of numbers at will.

    So it is with all that is not floating-point, with the results of an op beside its first, and with views of such.
    """
    if node.op != "call_function":
        return False
    if not all(map(_is_floating, tensors(node))):
        return True
    if is_selection(node) and not _is_view(node.all_input_nodes[0]):
        return bool(node.args[1] != 0)
    return _is_view(node) and any(map(has_meaning, node.all_input_nodes))


def try_run(call: Call) -> Any:
    """What a call returns.

    Raises:
        NotRunnable: the op refuses its arguments.
    """
    with _refused(f"{call.target} refuses its arguments"):
        return call.run()


@contextlib.contextmanager
def _refused(why: str) -> Iterator[None]:
    """Errors say that an op can't be run by itself, except for two: after an error of the device all else would fail,
    too; and where memory is short it can be tried again.
    """
    try:
        yield
    except NotRunnable:
        raise
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) or lacks_memory(error):
            raise
        raise NotRunnable(f"{why}: {error}") from error


def with_memory(run: Callable[[], _Result]) -> _Result:
    """What `run` returns; where memory is short it is run again when all that torch keeps in reserve has been freed.

    Raises:
        NoMemory: that was not enough.
    """
    try:
        return run()
    except Exception as error:
        if not lacks_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return run()
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise NoMemory(str(error)) from error


def lacks_memory(error: Exception) -> bool:
    """Whether it says that memory is short: on the CPU torch has no class of its own for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _is_view(node: fx.Node) -> bool:
    """Whether a node looks at memory that others wrote."""
    sources = {storage_key(t) for source in node.all_input_nodes for t in tensors(source)}
    return any(storage_key(t) in sources for t in tensors(node))


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _tensor_like(traced: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same form: small positive numbers, zeros for integers (valid as indices).

    The numbers vary where that is cheap: a GPU is faster where all are the same, since it draws less power.
    """
    size_bytes = traced.untyped_storage().nbytes()
    flat = torch.zeros(size_bytes // max(traced.element_size(), 1), dtype=traced.dtype, device=traced.device)
    if traced.dtype.is_floating_point and traced.element_size() > 1 and traced.device.type == "cuda":
        flat.uniform_(0.25, 0.75, generator=torch.Generator(traced.device).manual_seed(0))
    elif _is_floating(traced):
        flat.fill_(0.5)
    return flat.as_strided(traced.shape, traced.stride(), traced.storage_offset())

"""Capture a model's forward and backward as one fx graph of ATen ops."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.graph import get_gradient_edge

from fxckpt.capture.constants import Constants
from fxckpt.capture.draws import draws_refused
from fxckpt.capture.failure import explain
from fxckpt.capture.functional import FunctionalModel
from fxckpt.capture.leads import exchange, leads
from fxckpt.capture.passes import clean
from fxckpt.capture.provenance import Provenance, of_nodes
from fxckpt.capture.roles import Arrival, Exchanged, Roles, read_roles
from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.errors import CaptureError
from fxckpt.upstream.aot import backward_replaced, exported, said_to_compile
from fxckpt.upstream.checkpointed import checkpointing_bypassed
from fxckpt.upstream.confined import tracing_confined
from fxckpt.upstream.dispatch import unseen_by_function_modes
from fxckpt.upstream.kernels import kernels_on_cuda, own_kernels
from fxckpt.upstream.meta import made_present
from fxckpt.upstream.ops.expect import checks_kept
from fxckpt.upstream.ops.layout import LAID_OUT
from fxckpt.upstream.strides import right_forms_on_cuda, right_strides
from fxckpt.upstream.tensors import device_of

_ONE_AT_A_TIME = threading.RLock()
"""Patches are seen by the capturing thread alone, but what torch numbers and names while it traces is not: others that
capture wait."""


@dataclass(frozen=True)
class JointGraph:
    """A captured training step.

    Attributes:
        module: one flat graph of ATen ops: placeholders, forward, backward, output.
        roles: which node is what: parameters, inputs, tangents, outputs, updates, gradients.
        inputs: structure of the arguments that it was captured with.
        outputs: structure of what the model returns.
        places: module path and source line of each node.
        device: where the model is, meta if it is traced for another.
        asked: numbers of the arguments (tensors, in the order of `inputs`) of which the graph holds for the present
            `only_value` alone.
        lowered: whether ops are those that Inductor takes apart what is called into, rather than what eager runs.
    """

    module: fx.GraphModule
    roles: Roles
    inputs: Structure
    outputs: Structure
    places: dict[fx.Node, tuple[str, str]]
    device: torch.device
    asked: frozenset[int]
    lowered: bool = False


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    tangents: Mapping[int, Arrival] | None = None,
    likely: frozenset[int] | None = None,
    annotates: bool = False,
    capability: tuple[int, int] | None = None,
    lowered: bool = False,
) -> JointGraph:
    """Trace forward and backward of `model` for these inputs. Nothing is computed; the model is left as it was.

    Args:
        model: a module, on any device, "meta" too.
        args, kwargs: arguments of the call; tensors in them may be nested.
        forward: what to trace instead of `model.forward`.
        tangents: for each output that backward starts from (see `Output.tangent_number`) the strides of its tangent,
            or that its gradient is exchanged; None for what is most likely: the loss alone if the model returns an
            object with a scalar `loss`, else all, laid out as the outputs are.
        likely: if `tangents` is None, the numbers of the outputs that backward most likely starts from, if they are
            known.
        annotates: the model tells itself, op by op, where it comes from.
        capability: trace as on a GPU of this compute capability a model that is on the meta device or the CPU.
        lowered: trace what Inductor lowers: ops taken apart by its table, and its patterns replaced.

    Raises:
        CaptureError: the model can't be one graph: it decides on values of tensors, changes its attributes, and the
            like. The message names the source line.
    """
    tensors, inputs = take_apart((tuple(args), kwargs or {}))
    call = forward or functools.partial(type(model).forward, model)
    modules = {id(module): name for name, module in model.named_modules()}
    constants, provenance = Constants(tensors), contextlib.nullcontext() if annotates else Provenance(modules)

    def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with provenance, constants:  # not the tracer itself, which asks tensors for their forms all the time
            return function(*args, **kwargs)

    traced = FunctionalModel(model, functools.partial(watched, call), inputs, [x.is_leaf for x in tensors], constants)
    device = torch.device("meta") if capability else device_of((*model.parameters(), *tensors))
    with (
        _ONE_AT_A_TIME,
        checkpointing_bypassed(),
        draws_refused(),
        tracing_confined(),
        contextlib.ExitStack() as stack,
    ):
        if capability or device.type == "cuda":
            stack.enter_context(right_forms_on_cuda())
        else:
            stack.enter_context(right_strides())
        stack.enter_context(_backward_from(traced, watched, tangents, likely))
        given = stack.enter_context(made_present(traced, tensors, capability))
        module, metadata = _export(stack, traced, given, lowered=lowered)
    outputs = traced.outputs
    if outputs is None:
        raise CaptureError("the model's forward was never called while it was captured")
    if lowered:
        from fxckpt.upstream.inductor.lowered import rewrite_patterns

        rewrite_patterns(module, device)
    clean(module)
    roles, places = read_roles(module.graph, metadata, traced.leads), of_nodes(module.graph)
    return JointGraph(module, roles, inputs, outputs, places, device, frozenset(constants.asked), lowered)


@contextlib.contextmanager
def _backward_from(
    traced: FunctionalModel,
    watched: Callable[..., Any],
    tangents: Mapping[int, Arrival] | None,
    likely: frozenset[int] | None,
) -> Iterator[None]:
    """Let the traced backward start from some outputs only, and run it `watched`.

    AOTAutograd differentiates every output that requires grad, and gives zeros where eager gives None. All it does is
    one call of `torch.autograd.grad`; outputs that are left out of that call get no gradient at all, as in eager.
    """

    def grad(original: Any, outputs: Any, inputs: Any, grad_outputs: Any, **options: Any) -> Any:
        # Among the outputs are leaves that forward changes, which autograd does not see.
        pairs = [(o, t) for o, t in zip(outputs, grad_outputs, strict=True) if id(o) not in traced.leaves]
        outputs, grad_outputs = [o for o, _ in pairs], [t for _, t in pairs]
        with unseen_by_function_modes():
            sources = [traced.sources.get(id(output), output) for output in outputs]
            traced.leads = leads(sources)
            exchange(sources, tangents or {})
        chosen: Collection[int] = tangents if tangents is not None else likely or ()
        if tangents is None and not likely:
            chosen = _likely_differentiated(traced.outputs, outputs)
        outputs = [o for i, o in enumerate(outputs) if i in chosen]
        grad_outputs = [_as_given(t, (tangents or {}).get(i)) for i, t in enumerate(grad_outputs) if i in chosen]
        with unseen_by_function_modes():  # some hundred parameters
            leaves = {_origin(before): leaf for before, leaf in traced.leaves.values()}
            inputs = [leaves.get(get_gradient_edge(x).node, x) for x in inputs]
        return watched(original, outputs, inputs, grad_outputs, **options)

    with backward_replaced(grad):
        yield


def _origin(tensor: torch.Tensor) -> object:
    """The node of autograd's that stands for a tensor; for what AOTAutograd copied, since forward changes it, that of
    the tensor before.
    """
    node = get_gradient_edge(tensor).node
    return node.next_functions[0][0] if node.name() == "CloneBackward0" else node


def _as_given(tangent: torch.Tensor, arrival: Arrival | None) -> torch.Tensor:
    """The tangent in the layout that it will arrive in, and in memory of its own.

    As AOTAutograd makes them up, tangents of views share the memory of what is viewed.
    """
    stride = tangent.stride() if arrival is None or isinstance(arrival, Exchanged) else arrival
    return LAID_OUT(tangent, stride)  # type: ignore[no-any-return]


def _likely_differentiated(structure: Structure | None, outputs: Sequence[torch.Tensor]) -> frozenset[int]:
    scalars = [i for i, output in enumerate(outputs) if output.dim() == 0]
    if structure is not None and len(scalars) == 1 and _has_loss(structure):
        return frozenset(scalars)
    return frozenset(range(len(outputs)))


def _has_loss(structure: Structure) -> bool:
    """Whether the model returns a mapping or object with a `loss`, as HuggingFace models do when they get labels."""
    try:
        value = put_together(structure, itertools.count())
    except Exception:  # an output type that insists on tensors: it has no place for a plain number
        return False
    return "loss" in value if isinstance(value, Mapping) else hasattr(value, "loss")


_TOLD: tuple[Callable[[], contextlib.AbstractContextManager[None]], ...] = (
    contextlib.nullcontext,
    said_to_compile,
    functools.partial(said_to_compile, exporting=True),
)
"""What a model is told that asks whether it is being compiled: first no, so that it computes what it does in eager;
then yes, since models then avoid to read data."""


def _export(
    stack: contextlib.ExitStack, traced: FunctionalModel, tensors: list[torch.Tensor], *, lowered: bool
) -> tuple[fx.GraphModule, Any]:
    """Export the joint graph with the first answers that allow it; also returns AOTAutograd's metadata."""
    stack.enter_context(torch.enable_grad())
    apart = None
    if lowered:
        from fxckpt.upstream.inductor.lowered import decompositions  # which takes a second to import

        apart = decompositions()
    else:
        stack.enter_context(own_kernels())
        stack.enter_context(kernels_on_cuda())
    stack.enter_context(checks_kept())
    failures: list[Exception] = []
    for told in _TOLD:
        try:
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(told())
                graph = attempt.enter_context(exported(traced, tensors, apart))
                stack.push(attempt.pop_all())
                return graph
        except Exception as error:
            failures.append(error)
    raise explain(failures[1]) from failures[1]

"""Which op a wrong result comes from: a step's ops run one by one, and what each computes is compared.

The emitted graphs are compared with the captured graph, node by node. Where these agree, the captured graph is compared
with the plain model: what an op of it computes should occur among the results of the plain model's ops of that kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxckpt.pipeline import Compiled
from fxckpt.rewrite.backends import Backward, Executable
from fxckpt.rewrite.emitted import Emitted, deliver
from fxckpt.runtime.autograd import Program
from fxckpt.upstream import pytree
from fxckpt.upstream.dispatch import TorchDispatchMode, plain_execution
from fxckpt.upstream.generators import draws_undone

Digest = tuple[bytes, ...]
"""Fingerprints of the tensors that an op returns."""


def first_difference(
    compiled: Compiled, plain_step: Callable[[], object], optimized_step: Callable[[Program], object]
) -> str:
    """A sentence that names the first op whose result differs.

    Args:
        compiled: the step that gives another result than the plain one.
        plain_step: runs the plain step.
        optimized_step: runs the step of a program; both start from the same values and random-number state.
    """
    emitted = _Record()
    optimized_step(replace(compiled.program, executable=_Recorded(compiled.program.executable, emitted.note)))
    captured = _Record()
    placeholders = [n for n in compiled.profile.joint.module.graph.nodes if n.op == "placeholder"]
    given = [emitted.given.get(node) for node in placeholders]
    with draws_undone(x.device for x in given if isinstance(x, torch.Tensor)), plain_execution():
        list(_run(compiled.profile.joint.module, given, captured.note))
    results = dict(captured.results)
    for node, digest in emitted.results:
        source = node.meta.get("fxckpt_node")  # none: it only serves the op that follows
        if source is not None and digest != results[source]:
            return (
                f"The first op that differs is {_place(compiled, source, node.name)}: in the emitted graph it gives "
                "another result than in the captured one"
            )
    with _PlainOps() as plain:
        plain_step()
    for node in compiled.profile.nodes:
        if plain.runs(node) and not plain.results.issuperset(results[node][:1]):
            return (
                f"The first op that differs is {_place(compiled, node, node.name)}: the plain model never computes its "
                "result, so the captured graph is not what the model does"
            )
    return "No op differs, so the difference arises where gradients are handed to autograd"


def _place(compiled: Compiled, node: fx.Node, name: str) -> str:
    module, source = compiled.profile.joint.places[node]
    return f"{name} ({', '.join(filter(None, (str(node.target), module, source)))})"


class _Record:
    """What nodes compute, in the order in which they run, and what placeholders are given."""

    def __init__(self) -> None:
        self.results: list[tuple[fx.Node, Digest]] = []
        self.given: dict[fx.Node, Any] = {}  # captured placeholder -> value

    def note(self, node: fx.Node, value: Any) -> None:
        """Called with each node and its value."""
        captured = node.meta.get("fxckpt_node", node)
        if node.op == "placeholder" and captured.op == "placeholder":
            self.given.setdefault(captured, value.clone() if isinstance(value, torch.Tensor) else value)
        elif node.op == "call_function" and node.target is not deliver and _is_defined(captured):
            self.results.append((node, _digest(value)))


def _is_defined(node: fx.Node) -> bool:
    """Whether the node's values are determined: memory that is not yet written holds anything."""
    return not str(node.target).startswith(("aten.empty", "aten.new_empty"))


@dataclass(frozen=True)
class _Recorded:
    """An `Executable` that runs the graphs of another node by node, and notes what each computes."""

    executable: Executable
    note: Callable[[fx.Node, Any], None]
    peak_bytes: int | None = None

    @property
    def emitted(self) -> Emitted:
        return self.executable.emitted

    @property
    def modules(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.executable.modules

    def forward(self, boxed: list[Any], /) -> Any:
        return next(self._steps(self.modules[0], boxed))

    def backward(self, boxed: list[Any], /, *, kept: bool = False) -> Backward:  # noqa: ARG002 (nothing is changed)
        return self._steps(self.modules[1], boxed)

    def _steps(self, module: fx.GraphModule, boxed: list[Any]) -> Generator[Any, Any, None]:
        steps = _run(module, list(boxed), self.note)
        boxed.clear()
        return steps


def _run(
    module: fx.GraphModule, inputs: Iterable[Any], note: Callable[[fx.Node, Any], None]
) -> Generator[Any, Any, None]:
    """Run a graph node by node; yields what is delivered, and what the graph returns."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in module.graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        note(node, values.get(node))
        if node.target is deliver:
            yield values[node]
        elif node.op == "output":
            yield args[0]


class _PlainOps(TorchDispatchMode):
    """Sees every op of the plain step: which there are, and what they compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: set[bytes] = set()
        self._names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._names.add(str(func.overloadpacket).rstrip("_"))
        self.results.update(_digest(result))
        return result

    def runs(self, node: fx.Node) -> bool:
        """Whether the plain step has an op of this kind, or the node stands for one."""
        target: Any = node.target
        packet = str(getattr(target, "overloadpacket", target))
        return _is_defined(node) and (packet in self._names or packet.startswith("fxckpt."))


def _digest(value: Any) -> Digest:
    tensors = (t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.layout is torch.strided)
    return tuple(map(_fingerprint, tensors))


def _fingerprint(tensor: torch.Tensor) -> bytes:
    """Equal for tensors of equal elements and type; zero has one sign."""
    values = tensor.detach().resolve_conj().resolve_neg()
    if values.is_floating_point() or values.is_complex():
        values = values + 0
    flat = values.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(str(values.dtype).encode() + flat.numpy().tobytes()).digest()

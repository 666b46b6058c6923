"""What a user would do instead of fxckpt, applied to a model: each way to save memory that torch itself offers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._functorch import config as functorch_config
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from benchmarks.models.cases import Case
from benchmarks.peers.subjects import GROUP_SIZES, segment_counts
from fxckpt.profile.estimate import count_flops
from fxckpt.steps.comparison import flops_of
from fxckpt.steps.step import TrainingStep

Forward = Callable[..., Any]
Chain = Callable[[list[Forward], Any], Any]
"""Runs functions one after the other, starting from a value."""

_SEED = 7

aten = torch.ops.aten

PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective checkpointing keeps: results of matrix products, convolutions and attention."""


@dataclass(frozen=True)
class Peer:
    """A way to save memory.

    Attributes:
        name: what it is.
        family: peers that differ in one setting only share it.
        apply: changes a model, or wraps it; returns what to call instead of the model.
    """

    name: str
    family: str
    apply: Callable[[nn.Module], Forward]


class Compiled:
    """A model under `torch.compile` with a setting of `activation_memory_budget`, backend "aot_eager".

    It counts its FLOPs from the graphs that run: under a dispatch mode, compiled functions fall back to eager.
    """

    def __init__(self, model: nn.Module, budget: float) -> None:
        torch._dynamo.reset()  # a model of the same class compiled before would count as a recompilation
        backend = functools.partial(aot_eager, fw_compiler=self._count, bw_compiler=self._count)
        self._budget = budget
        self._compiled = torch.compile(model, backend=backend, dynamic=False)
        self.flops = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=self._budget):
            return self._compiled(*args, **kwargs)

    def _count(self, module: fx.GraphModule, inputs: list[Any]) -> Forward:
        flops = sum(count_flops(node) for node in module.graph.nodes if node.op == "call_function")
        run = boxed_nop(module, inputs)

        def counted(boxed: list[Any]) -> Any:
            self.flops += flops
            return run(boxed)

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted


def fused(model: Forward, budget: float) -> Forward:
    """A model under `torch.compile` as users call it, with Inductor, and a setting of `activation_memory_budget`."""
    compiled = torch.compile(model, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return compiled(*args, **kwargs)

    return run


def applied(case: Case, apply: Callable[[nn.Module], Forward]) -> TrainingStep:
    """The step of a case's model, built anew, with a way to save memory applied. Each has the same random numbers."""
    model, args, kwargs = case.build()
    forward = apply(model)
    torch.manual_seed(_SEED)
    return TrainingStep(model, args, kwargs, forward=forward, loss=case.loss)


def run_flops(step: TrainingStep) -> int:
    """FLOPs of the matrix products, convolutions and attention that a step runs; it must be warm."""
    if not isinstance(step.forward, Compiled):
        return flops_of(step)
    before = step.forward.flops
    step.run()
    return step.forward.flops - before


def peers(model: nn.Module, blocks: Sequence[str], is_chain: bool, budgets: Sequence[float]) -> Iterator[Peer]:
    """The peers that apply to a model.

    Args:
        model: an instance of it; it stays as it is.
        blocks: paths of the modules to wrap, as they run.
        is_chain: whether neighbours can be wrapped together.
        budgets: settings of `activation_memory_budget`.
    """
    for size in GROUP_SIZES if is_chain else (1,):
        yield Peer(f"checkpoint every {size}", "checkpoint", functools.partial(_every, blocks, size, _checkpointed))
    for segments in segment_counts(len(blocks)) if is_chain else ():
        run = functools.partial(_sequential, segments)
        apply = functools.partial(_every, blocks, len(blocks), run)
        yield Peer(f"checkpoint_sequential {segments}", "checkpoint_sequential", apply)
    yield Peer("selective", "selective checkpoint", functools.partial(_every, blocks, 1, _selective))
    if hasattr(model, "gradient_checkpointing_enable"):
        yield Peer("gradient_checkpointing_enable", "transformers", _transformers)
    yield Peer("save_on_cpu", "save_on_cpu", _saved_on_cpu)
    for budget in budgets:
        name = f"activation_memory_budget {budget:g}"
        yield Peer(name, "torch.compile", functools.partial(Compiled, budget=budget))


def _every(blocks: Sequence[str], size: int, run: Chain, model: nn.Module) -> Forward:
    """Run each `size` neighbours by `run`: the first of them stands for all."""
    modules = [model.get_submodule(path) for path in blocks]
    for start in range(0, len(modules), size):
        first, *others = modules[start : start + size]
        forwards = [module.forward for module in (first, *others)]
        first.forward = functools.partial(_run_group, run, forwards)
        for module in others:
            module.forward = _pass_through
    return model


def _run_group(run: Chain, forwards: list[Forward], x: Any, *args: Any, **kwargs: Any) -> Any:
    return run([functools.partial(_call, forward, args, kwargs) for forward in forwards], x)


def _call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> Any:
    return forward(x, *args, **kwargs)


def _pass_through(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _in_turn(functions: list[Forward], x: Any) -> Any:
    for function in functions:
        x = function(x)
    return x


def _checkpointed(functions: list[Forward], x: Any) -> Any:
    return checkpoint(functools.partial(_in_turn, functions), x, use_reentrant=False)


def _selective(functions: list[Forward], x: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
    return checkpoint(functools.partial(_in_turn, functions), x, use_reentrant=False, context_fn=contexts)


def _sequential(segments: int, functions: list[Forward], x: Any) -> Any:
    return checkpoint_sequential(functions, segments, x, use_reentrant=False)


def _transformers(model: nn.Module) -> Forward:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model


def _saved_on_cpu(model: nn.Module) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu():
            return model(*args, **kwargs)

    return run

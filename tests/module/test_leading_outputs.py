"""Outputs that other outputs are computed from, as logits are from features: gradients get from one to the other."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.errors import CaptureError, RuntimeContractError

ROW = "gradients as eager gives them"


class Features(nn.Module):
    """Layers whose `compute` returns what others are computed from first, and what is computed from all last."""

    def __init__(self, compute: Callable[[Any, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm, self.drop, self.wide = nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 32)
        self.compute = compute

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.compute(self, x)


def _one_way(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.layers[0](x).relu()
    return features, m.layers[1](features)


def _several_ways(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.drop(m.layers[0](x)).sin()
    return features, m.layers[1](features) * features.exp() + features + features.sum()


def _residual_blocks(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    states = [m.layers[0](x)]
    for layer in m.layers[1:]:
        states.append(states[-1] + layer(m.norm(states[-1])).relu())
    return (*states, m.norm(states[-1]))


def _past_it(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    inner = m.layers[0](x).tanh()
    features = m.layers[1](inner).sigmoid()
    return features, m.layers[2](features) + m.layers[3](inner)


def _shared_weights(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.layers[0](m.layers[0](x).relu())
    return features, m.layers[0](m.layers[0](features).sin())


def _views(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.wide(x).view(-1, 4, 8).transpose(1, 2)
    return features, m.layers[0](features.mean(2)), features.sum(1)


def _a_part_of_one_op(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    left, right = m.wide(x).sin().split(16, dim=1)
    return left, right * left


def _expanded(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.layers[0](x).exp()
    return features, features.sum(1)


def _two_heads(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    trunk = m.layers[0](x).relu()
    left, right = m.layers[1](trunk).sin(), m.layers[2](trunk).cos()
    return trunk, left, right, left.square(), m.layers[3](right)


def _cut_off(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    features = m.layers[0](x).relu()
    return features, m.layers[1](features.detach()), m.layers[2](features)


def _under_autocast(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        features = m.layers[0](x).relu()
        return features, m.layers[1](features) + m.layers[1](features.sin())


MODELS: dict[str, Callable[[Any, Tensor], tuple[Tensor, ...]]] = {
    "one way": _one_way,
    "several ways": _several_ways,
    "residual blocks": _residual_blocks,
    "ways past it": _past_it,
    "shared weights": _shared_weights,
    "views": _views,
    "a part of one op": _a_part_of_one_op,
    "expanded gradients": _expanded,
    "two heads": _two_heads,
    "cut off from some": _cut_off,
    "autocast": _under_autocast,
}

Found = dict[str, Tensor | None]


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    """A loss of all outputs."""
    losses = [(output.float() * (0.5 + number)).cos().sum() for number, output in enumerate(outputs)]
    return torch.stack(losses).sum()


def _hooks_that_look(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    found: Found = {}
    for number, output in enumerate(outputs):
        output.register_hook(lambda gradient, number=number: found.update({f"gradient {number}": gradient.clone()}))
    total(outputs).backward()
    return found


def _a_hook_that_scales(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    outputs[0].register_hook(lambda gradient: gradient * 0.1)
    total(outputs).backward()
    return {}


def _a_hook_of_an_output_that_is_gone(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    first, *others = outputs
    first.register_hook(lambda gradient: gradient.cos())
    del first, outputs
    gc.collect()
    others[-1].float().sin().sum().backward()
    return {}


def _a_hook_with_other_strides(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    outputs[0].register_hook(lambda gradient: gradient.mean(0, keepdim=True).expand_as(gradient))
    outputs[-1].float().sin().sum().backward()
    return {}


def _kept(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    for output in outputs:
        output.retain_grad()
    total(outputs).backward()
    return {f"kept {number}": output.grad for number, output in enumerate(outputs)}


def _the_last_alone(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    for output in outputs:
        output.retain_grad()
    outputs[-1].float().sin().sum().backward()
    return {f"kept {number}": output.grad for number, output in enumerate(outputs)}


def _gradients_asked_for(model: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    asked = [*outputs[:-1], *model.parameters()]
    found = torch.autograd.grad(outputs[-1].float().sin().sum(), asked, allow_unused=True)
    return {f"asked {number}": gradient for number, gradient in enumerate(found)}


def _class_activation(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    (found,) = torch.autograd.grad(outputs[-1].select(-1, 1).sum(), outputs[0])
    return {"activation": found}


def _by_backward(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    outputs[0].retain_grad()
    outputs[-1].float().sin().sum().backward(inputs=[outputs[0]])
    return {"kept": outputs[0].grad}


def _as_an_edge(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    edge = torch.autograd.graph.get_gradient_edge(outputs[0])
    (found,) = torch.autograd.grad(total(outputs), [edge])
    return {"gradient": found}


def _task_after_task(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    """Several losses' gradients with respect to features, then that of the model with their sum."""
    last, features = outputs[-1].float(), outputs[0]
    (first,) = torch.autograd.grad(last.sin().sum(), features, retain_graph=True)
    (second,) = torch.autograd.grad(last.cos().sum(), features, retain_graph=True)
    features.backward(first + 2 * second)
    return {"first": first, "second": second}


def _twice(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    outputs[0].register_hook(lambda gradient: gradient * 2)
    total(outputs).backward(retain_graph=True)
    outputs[-1].float().sum().backward()
    return {}


def _nobody_looks(_: nn.Module, outputs: tuple[Tensor, ...]) -> Found:
    total(outputs).backward()
    return {}


USES: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Found]] = {
    "hooks that look": _hooks_that_look,
    "a hook that scales": _a_hook_that_scales,
    "a hook of an output that is gone": _a_hook_of_an_output_that_is_gone,
    "a hook that gives other strides": _a_hook_with_other_strides,
    "retain_grad": _kept,
    "retain_grad, backward from one": _the_last_alone,
    "autograd.grad, of parameters too": _gradients_asked_for,
    "Grad-CAM": _class_activation,
    "backward(inputs=)": _by_backward,
    "autograd.grad of an edge": _as_an_edge,
    "autograd.grad, task after task": _task_after_task,
    "retain_graph": _twice,
    "nothing": _nobody_looks,
}


def _step(model: nn.Module, use: str, seed: int) -> Found:
    """What a use of a model's outputs finds, and leaves as gradients."""
    torch.manual_seed(seed)
    x = torch.randn(4, 8, requires_grad=True)
    outputs = model(x)
    found = USES[use](model, tuple(outputs))
    return {**found, "x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def check_same(ours: nn.Module, plain: nn.Module, use: str, seed: int, *, accumulate: bool = False) -> None:
    """Both models find and leave the same."""
    for model in (ours, plain):
        if not accumulate:
            model.zero_grad()
    found, expected = _step(ours, use, seed), _step(plain, use, seed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        have = found[name]
        if value is None or have is None:
            assert value is have, f"{name} after {use}"
        else:
            assert_same_bits(have, value, f"{name} after {use}")


def pair(compute: Callable[[Any, Tensor], tuple[Tensor, ...]], **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Features(compute)
    plain = copy.deepcopy(model)
    return fxckpt.optimize(model, "1GB", solver="min_memory", cost_model="estimate", **options), plain


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.works(ROW, *USES)
def test_gradients_get_from_output_to_output(name: str, use: str) -> None:
    ours, plain = pair(MODELS[name])
    for seed in range(3):
        check_same(ours, plain, use, seed)
    check_same(ours, plain, use, 3, accumulate=True)


@pytest.mark.parametrize("name", MODELS)
def test_uses_may_change_from_step_to_step(name: str) -> None:
    ours, plain = pair(MODELS[name])
    draw = random.Random(name)
    for seed in range(16):
        check_same(ours, plain, draw.choice(list(USES)), seed, accumulate=bool(seed % 3))

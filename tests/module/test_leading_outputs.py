"""Outputs that other outputs are computed from, as logits are from features: gradients get from one to the other."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxckpt
from benchmarks.models.cases import Case
from benchmarks.models.training import allocate_gradients, assert_same_bits, clear_gradients, measured_peak_bytes
from fxckpt.errors import RuntimeContractError
from fxckpt.module.stand_in import planner_of
from tests.support.warned import LOSS_OUTSIDE

ROW = "gradients as eager gives them"
SMALL_BYTES = 64
"""The loss, its gradient and the like."""


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


STRIDES = "a hook that gives other strides"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.works(ROW, *(f"outputs that others are computed from: {use}" for use in USES))
def test_gradients_get_from_output_to_output(name: str) -> None:
    ours, plain = pair(MODELS[name])
    for use in USES:
        if use == STRIDES:
            continue
        for seed in range(3):  # first behind a forward that was planned for something else
            check_same(ours, plain, use, seed, accumulate=seed == 1)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_come_in_any_layout(name: str) -> None:
    ours, plain = pair(MODELS[name])
    for seed in range(3):
        check_same(ours, plain, STRIDES, seed)


@pytest.mark.parametrize("name", ["one way", "several ways", "views"])
def test_uses_may_change_from_step_to_step(name: str) -> None:
    ours, plain = pair(MODELS[name])
    draw = random.Random(name)
    for seed in range(16):
        check_same(ours, plain, draw.choice(list(USES)), seed, accumulate=bool(seed % 3))


def test_a_gradient_in_another_form_than_planned_is_right_or_an_error() -> None:
    """What was saved is freed by then, so a backward that was planned otherwise can't start again."""
    ours, plain = pair(_residual_blocks)
    refused = 0
    for seed, use in enumerate(["hooks that look"] * 3 + [STRIDES] * 3):
        try:
            check_same(ours, plain, use, seed)
        except RuntimeContractError as error:
            refused += "Run forward again" in str(error)
    assert refused == 1


@pytest.mark.works("errors", "a gradient of gradients with respect to an output is refused")
def test_gradients_of_gradients_are_refused() -> None:
    ours, _ = pair(_one_way)
    features, last = ours(torch.randn(4, 8))
    with pytest.raises(RuntimeContractError, match="create_graph"):
        torch.autograd.grad(last.sum(), features, create_graph=True)


def test_an_output_that_is_unused_has_no_gradient() -> None:
    for model in pair(_cut_off):
        features, cut_off, _ = model(torch.randn(4, 8))
        features.register_hook(lambda gradient: gradient * 2)
        (found,) = torch.autograd.grad(cut_off.sum(), features, allow_unused=True, retain_graph=True)
        assert found is None
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(cut_off.sum(), features)


def _asked_for_and_gone_on(model: nn.Module, seed: int) -> list[Tensor | None]:
    model.zero_grad()
    torch.manual_seed(seed)
    features, last = model(torch.randn(4, 8))
    (gradient,) = torch.autograd.grad(last.sin().sum(), features)
    features.backward(gradient.cos())
    return [parameter.grad for parameter in model.parameters()]


def test_backward_goes_on_from_where_a_gradient_was_asked_for() -> None:
    ours, plain = pair(_one_way)
    for seed in range(3):
        found, expected = _asked_for_and_gone_on(ours, seed), _asked_for_and_gone_on(plain, seed)
        for number, (have, want) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(have, want, f"gradient {number}")


@pytest.mark.parametrize("name", ["ways past it", "shared weights"])
def test_backward_does_not_go_on_where_there_are_other_ways(name: str) -> None:
    """Planned for it, backward has the other ways' part by then, which nobody asked for."""
    ours, _ = pair(MODELS[name])
    for seed in range(2):
        features, last = ours(torch.randn(4, 8))
        last.sin().sum().backward(inputs=[features], retain_graph=seed == 0)
    with pytest.raises(RuntimeContractError, match="retain_graph=True"):
        features.sum().backward()


def _changed(f: Tensor, _: list[Tensor]) -> None:
    f.mul_(2)


def _hooked(f: Tensor, seen: list[Tensor]) -> None:
    f.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 3)  # type: ignore[func-returns-value]


def _retained(f: Tensor, _: list[Tensor]) -> None:
    f.retain_grad()


@pytest.mark.parametrize(
    "doings",
    [
        (_changed, _hooked),
        (_hooked, _changed),
        (_hooked, _changed, _hooked),
        (_retained, _changed),
        (_changed, _retained),
    ],
    ids=lambda doings: " ".join(x.__name__.strip("_") for x in doings),
)
def test_an_output_is_changed_in_place(doings: tuple[Callable[[Tensor, list[Tensor]], None], ...]) -> None:
    """Hooks are of the value that it has when they are registered."""
    found: list[list[Tensor | None]] = []
    for model in pair(lambda m, x: ((f := m.layers[0](x)), f.sum(), f.clone())):
        seen: list[Any] = []
        for seed in range(2):
            model.zero_grad()
            torch.manual_seed(seed)
            features, total, copied = model(torch.randn(4, 8))
            for do in doings:
                do(features, seen)
            (features.sin().sum() + total.sin() + copied.cos().sum()).backward()
            seen += [features.grad if features.retains_grad else None, *(p.grad for p in model.parameters())]
        found.append(seen)
    for number, (have, expected) in enumerate(zip(*found, strict=True)):
        assert_same_bits(have, expected, f"gradient {number}")


def test_hooks_of_a_module_around_it() -> None:
    found: list[list[Tensor | None]] = []
    for model in pair(_several_ways):
        outer = nn.Sequential(model)
        seen: list[Tensor | None] = []

        def look(_: nn.Module, given: Any, out: Any, seen: list[Tensor | None] = seen) -> None:
            seen.extend((*given, *out))

        def scale(_: nn.Module, out: Any) -> tuple[Tensor, ...]:
            return tuple(gradient * 0.5 for gradient in out)

        outer.register_full_backward_hook(look)
        outer.register_full_backward_pre_hook(scale)
        for seed in range(2):
            outer.zero_grad()
            torch.manual_seed(seed)
            x = torch.randn(4, 8, requires_grad=True)
            features, last = outer(x)
            features.retain_grad()
            (last.sin().sum() + features.cos().sum()).backward()
            seen += [features.grad, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        found.append(seen)
    for number, (have, expected) in enumerate(zip(*found, strict=True)):
        assert_same_bits(have, expected, f"gradient {number}")


def test_several_calls_in_a_step() -> None:
    found: list[list[Tensor | None]] = []
    for model in pair(_several_ways):
        seen: list[Tensor | None] = []
        for seed in range(3):
            model.zero_grad()
            torch.manual_seed(seed)
            first, second = model(torch.randn(4, 8)), model(torch.randn(4, 8))
            for features, _ in (first, second):
                features.retain_grad()
            (first[1].sin() * second[1]).sum().backward()
            seen += [first[0].grad, second[0].grad, *(p.grad for p in model.parameters())]
        found.append(seen)
    for number, (have, expected) in enumerate(zip(*found, strict=True)):
        assert_same_bits(have, expected, f"gradient {number}")


def test_all_is_freed() -> None:
    ours, _ = pair(_residual_blocks)
    for use in ("hooks that look", "Grad-CAM"):
        for seed in range(3):
            _step(ours, use, seed)
    outputs = ours(torch.randn(4, 8))
    (gradient,) = torch.autograd.grad(outputs[-1].sum(), outputs[0])
    reference = weakref.ref(outputs[0])
    del outputs, gradient
    gc.collect()
    assert reference() is None


class Tower(nn.Module):
    """Blocks, of which two are outputs, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = []
        for block in self.blocks:
            x = x + block(self.norm(x))
            states.append(x)
        return states[2], states[4], x.logsumexp(-1).sum()


KEPT: list[Tensor] = []


def _keep(outputs: tuple[Tensor, ...]) -> None:
    for output in outputs[:-1]:
        output.register_hook(KEPT.append)


def _retain(outputs: tuple[Tensor, ...]) -> None:
    for output in outputs[:-1]:
        output.retain_grad()


PEAKS: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {
    "hooks that look": lambda outputs: [x.register_hook(lambda gradient: gradient * 1) for x in outputs[:-1]],
    "hooks that keep": _keep,
    "retain_grad": _retain,
    "nothing": lambda _: None,
}


@pytest.mark.filterwarnings(LOSS_OUTSIDE)
@pytest.mark.parametrize("use", PEAKS)
@pytest.mark.parametrize("gradients", ["fresh", "allocated"])
def test_peaks_are_within_the_budget(gradients: str, use: str) -> None:
    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        PEAKS[use](outputs)
        return outputs[-1]

    torch.manual_seed(0)
    model = fxckpt.optimize(Tower(), 0.6, cost_model="estimate")
    subject = Case("tower", lambda: (model, ((torch.randn(512, 32),), {})), loss)
    _, args, kwargs = subject.build()
    for warm in (True, True, False):  # the first is not planned for what is done with its outputs
        allocate_gradients(model) if gradients == "allocated" else clear_gradients(model)
        KEPT.clear()
        if warm:
            outputs = model(*args, **kwargs)
            loss(outputs).backward()
            del outputs
    gc.collect()
    measured_bytes = measured_peak_bytes(model, subject, args, kwargs)
    KEPT.clear()
    planner = planner_of(model)
    assert planner is not None
    (plan,) = [c.plan for c in planner.compiled() if c.plan.graph.gradients_allocated == (gradients == "allocated")]
    static_bytes = plan.graph.static_bytes
    assert measured_bytes <= plan.peak_bytes - static_bytes + SMALL_BYTES
    assert plan.peak_bytes <= plan.budget_bytes < plan.baseline_timeline.peak_bytes
    if use == "nothing":
        assert measured_bytes >= plan.peak_bytes - static_bytes - SMALL_BYTES

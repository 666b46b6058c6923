"""Models may ask for values that depend on nothing the step is given; all others are refused as before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxckpt
from benchmarks.models.cases import case, project
from benchmarks.models.training import assert_same_step, plain_step, run_step
from fxckpt.capture.constants import only_value
from fxckpt.capture.joint import capture
from fxckpt.errors import CaptureError
from fxckpt.module.stand_in import planner_of

pytestmark = [
    pytest.mark.usefixtures("untraceable"),
    pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning"),
]


class Asks(nn.Module):
    """Computes one thing or another, as a question about values says."""

    def __init__(self, question: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.tanh(y) if self.question(y) else torch.sigmoid(y)


def written_over(_: Tensor) -> bool:
    mask = torch.ones(4)
    mask[1] = 0
    mask[2:].mul_(0)
    torch.add(mask, 1, out=mask)
    return bool((mask == torch.tensor([2.0, 1.0, 1.0, 1.0])).all())


def counted(y: Tensor) -> bool:
    mask = torch.ones_like(y[:, 0], dtype=torch.long)
    return int(mask.cumsum(0)[-1]) == len(y) and mask.sum().item() == mask.tolist().count(1)


KNOWN: dict[str, Callable[[Tensor], bool]] = {
    "positions without gaps": lambda y: bool((torch.diff(torch.arange(len(y))) == 1).all()),
    "changed in place": written_over,
    "counted": counted,
    "compared": lambda y: torch.equal(torch.zeros(3, device=y.device), y.new_zeros(3)),
    "no": lambda y: bool(torch.full((2, 2), len(y)).eq(0).any()),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.works("layers and ops", "branches on values that no input has a part in")
def test_what_is_known_is_told(name: str) -> None:
    torch.manual_seed(0)
    model, x = Asks(KNOWN[name]), torch.randn(5, 6)
    expected = plain_step(model, (x,), {}, project)
    model.zero_grad()
    assert_same_step(run_step(fxckpt.optimize(model, "1GB", solver="min_memory"), (x,), {}, project), expected)


def test_nothing_is_computed_on_the_meta_device() -> None:
    model = Asks(lambda y: bool((torch.arange(len(y), device=y.device) >= 0).all())).to("meta")
    graph = capture(model, (torch.empty(5, 6, device="meta"),)).module.graph
    assert any(node.target is torch.ops.aten.tanh.default for node in graph.nodes)


def changed_by_an_input(y: Tensor) -> bool:
    mask = torch.ones(4)
    part = mask[:1]
    part.mul_(y.detach().sum())
    return bool(mask[0] > 0)


UNKNOWN: dict[str, Callable[[Tensor], bool]] = {
    "an input": lambda y: bool(y.sum() > 0),
    "changed by an input, through a view": changed_by_an_input,
    "drawn": lambda _: bool(torch.bernoulli(torch.full((3,), 0.5)).any()),
    "drawn in place": lambda _: bool(torch.zeros(3).uniform_().any()),
    "never written": lambda _: bool(torch.empty_like(torch.ones(3)).any()),
    "very large": lambda _: bool(torch.ones(2**21).any()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused(name: str) -> None:
    model, x = Asks(UNKNOWN[name]), torch.randn(5, 6)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"test_constants.py:\d+ .* reads the value of a tensor"):
        fxckpt.optimize(model, "1GB", example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), before)


class Masked(nn.Module):
    """Leaves the mask out where it masks nothing, or everything."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        part = mask[:, 1:].to(torch.bool)
        y: Tensor = self.layer(x)
        if part.all():
            return torch.tanh(y)
        return torch.sigmoid(y) if not part.any() else y * mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.works("layers and ops", "branches on whether a mask masks nothing")
def test_an_argument_of_one_value_is_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(5, 6)
    optimized = fxckpt.optimize(copy.deepcopy(model), "1GB", solver="min_memory")
    for value in (1, 0, 1, 0):
        for one in (model, optimized):
            one.zero_grad()
        given = (x, torch.full((5, 6), value, dtype=dtype))
        assert_same_step(run_step(optimized, given, {}, project), plain_step(model, given, {}, project))
    planner = planner_of(optimized)
    assert planner is not None
    assert len(planner.compiled()) == 2
    with pytest.raises(CaptureError, match=r"test_constants.py:\d+ .* reads the value of a tensor"):
        optimized(x, torch.eye(6)[:5].to(dtype))


def test_an_answer_holds_for_what_was_changed_by_an_argument_too() -> None:
    class Changed(Asks):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            y, zeros = self.layer(x), torch.zeros(6)
            part = zeros[:1]
            zeros += mask[0]
            return torch.tanh(y) if self.question(part) else y * mask

    torch.manual_seed(0)
    model, x = Changed(lambda part: bool(part.any())), torch.randn(5, 6)
    optimized = fxckpt.optimize(copy.deepcopy(model), "1GB", solver="min_memory")
    with pytest.raises(CaptureError, match="reads the value of a tensor"):  # not known through all views: not told
        optimized(x, torch.ones(5, 6, dtype=torch.long))


def test_what_an_argument_is_made_into_while_it_is_traced_does_not_change_it() -> None:
    def changes(mask: Tensor) -> bool:
        mask[:, 0] = 0
        return bool(mask.any())

    class Changes(Asks):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            remains = self.question(mask)
            y: Tensor = self.layer(x) * mask
            return y if remains else y + 1

    x, mask = torch.randn(5, 6), torch.ones(5, 6, dtype=torch.long)
    fxckpt.optimize(Changes(changes), "1GB", example_inputs=(x, mask))
    assert mask.all()


def test_the_only_value() -> None:
    assert only_value(torch.ones(3, dtype=torch.bool)) == 1
    assert only_value(torch.zeros(2, 3, dtype=torch.long)) == 0
    for tensor in (torch.arange(3), torch.full((2, 3), 7), torch.tensor(1), torch.ones(0, dtype=torch.long)):
        assert only_value(tensor) is None
    for tensor in (torch.ones(3), torch.ones(3).to(torch.complex64)):
        assert only_value(tensor) is None
    assert only_value(torch.ones(3, dtype=torch.long, device="meta")) is None
    assert only_value(torch.ones(2**21, dtype=torch.uint8)) is None


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.works("fused attention", "transformers with an attention mask that masks nothing, and with one that does")
def test_masks_of_transformers(name: str) -> None:
    chosen = case(name)
    model, args, kwargs = chosen.build()
    everything = torch.ones(4, 32, dtype=torch.long)
    padded = everything.clone()
    padded[0, -5:] = 0
    optimized = fxckpt.optimize(copy.deepcopy(model), "8GB", solver="min_memory", effort="fast")
    for mask in (everything, padded, everything):
        for one in (model, optimized):
            one.zero_grad()
        given = {**kwargs, "attention_mask": mask}
        assert_same_step(run_step(optimized, args, given, chosen.loss), plain_step(model, args, given, chosen.loss))
    planner = planner_of(optimized)
    assert planner is not None
    assert len(planner.compiled()) == 2
    profile = planner.compiled()[0].profile  # of the mask that masks nothing
    assert profile.joint.asked
    assert not any(node.kwargs.get("attn_mask") for node in profile.joint.module.graph.nodes)


@pytest.mark.parametrize("name", ["roberta", "llama"])
@pytest.mark.works("fused attention", "transformers' attention without a mask, as in eager")
def test_attention_of_transformers_is_captured_as_it_runs_in_eager(name: str) -> None:
    model, args, kwargs = case(name).build()
    nodes = capture(model.eval(), args, kwargs).module.graph.nodes  # with dropout attention would be many ops
    attention = [node for node in nodes if "scaled_dot_product" in str(node.target)]
    assert len(attention) == 4  # two layers, forward and backward
    assert not any(node.kwargs.get("attn_mask") for node in attention)

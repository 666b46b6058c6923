"""Ops that write over an input: only where nobody sees it, and with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxckpt.core.schedule import plain
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.errors import VerificationError
from fxckpt.options import Options
from fxckpt.pipeline import profile_step
from fxckpt.profile.build import Profile
from fxckpt.rewrite.backends.python import executable
from fxckpt.rewrite.backends.python.in_place import OVERWRITING, overwritten
from fxckpt.rewrite.split import emit
from fxckpt.rewrite.verify import verify

aten = torch.ops.aten


class Residual(nn.Module):
    """Two ReLUs of which one has a dead input, and a sum whose operands are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.lift(x))
        y: Tensor = self.second(torch.relu(hidden + torch.relu(self.first(hidden)))).square()
        return y


def profile_of(model: nn.Module, *args: Any) -> Profile:
    options = Options(2**62, cost_model="reference", run_ops=False)
    return profile_step(model, args, {}, options, forward=model.forward, gradients_allocated=False)


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def plain_timeline(profile: Profile) -> Timeline:
    return simulate(profile.graph, plain(profile.graph))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OVERWRITING, ids=str)
def test_the_same_bits_come_out(op: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = iter(torch.randn(2, 5, 1037, generator=generator).to(dtype))
    count = sum(isinstance(a.type, torch.TensorType) for a in op._schema.arguments)
    args: list[Any] = [next(tensors) for _ in range(count)]
    if op is aten.threshold_backward.default:
        args.append(0)
    expected = op(*args)
    overload, argument = OVERWRITING[op]
    for position in range(count if argument == "out" else 1):
        given = [a.clone() if isinstance(a, Tensor) else a for a in args]
        result = overload(*given, **({argument: given[position]} if argument else {}))
        assert result.data_ptr() == given[position].data_ptr()
        assert torch.equal(result, expected)


def test_dead_inputs_are_written_over_and_living_ones_are_not() -> None:
    profile = profile_of(Residual(), torch.randn(64, 16))
    emitted = executable(profile, plain_timeline(profile)).emitted
    forward, backward = targets(emitted.forward), targets(emitted.backward)
    assert forward.count(aten.relu_.default) == 3
    assert forward.count(aten.add.out) == 0  # both ReLUs before the sum are read by backward
    assert backward.count(aten.threshold_backward.grad_input) >= 2
    assert backward.count(aten.add.out) == 1  # two gradients of `hidden`


def test_no_output_input_or_tangent_is_written_over() -> None:
    class Shown(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            y = x * w
            return y, torch.relu(y).exp()

    x, w = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    profile = profile_of(Shown(), x, w)
    roles = profile.joint.roles
    tangents = {o.tangent for o in roles.outputs}
    for source in overwritten(profile, plain_timeline(profile)).values():
        assert source.op != "placeholder"
        assert source not in tangents
        assert source not in {o.node for o in roles.outputs}


def test_the_verifier_sees_a_value_overwritten_too_early() -> None:
    profile = profile_of(Residual(), torch.randn(64, 16))
    timeline = plain_timeline(profile)
    step = executable(profile, timeline)
    verify(profile, timeline, step)
    (total,) = (n for n in step.emitted.forward.nodes if n.target is aten.add.Tensor)
    total.target, total.kwargs = aten.add.out, {"out": total.args[0]}  # backward reads it
    with pytest.raises(VerificationError, match="writes over relu"):
        verify(profile, timeline, step)


def test_rewriting_itself_writes_over_nothing() -> None:
    profile = profile_of(Residual(), torch.randn(64, 16))
    emitted = emit(profile, plain(profile.graph))
    assert not {*targets(emitted.forward), *targets(emitted.backward)} & {op for op, _ in OVERWRITING.values()}

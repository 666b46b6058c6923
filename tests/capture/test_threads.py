"""While one thread captures a model, others go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxckpt
from benchmarks.models.cases import project
from benchmarks.models.training import assert_same_bits, assert_same_step, plain_step, run_step
from fxckpt.capture.joint import capture
from fxckpt.upstream import patching

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
WAIT_S = 60.0


class Halt:
    """A place in a model where the thread that captures it waits."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0
        self.reached, self.passed = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.number:
            self.reached.set()
            assert self.passed.wait(WAIT_S), "nobody let the capture go on"


class HaltsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, halt: Halt) -> Tensor:
        ctx.halt = halt
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.halt()
        return gradient * 2, None


class Halting(nn.Module):
    """A model that is captured at its first or second attempt, and halts in forward or backward."""

    def __init__(self, halt: Halt, *, in_backward: bool, asks: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.3)
        self.halt, self.in_backward, self.asks = halt, in_backward, asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.layer(x))
        if self.asks and not torch.compiler.is_compiling() and y.sum() > 10:
            y = y + 1
        if self.in_backward:
            y = HaltsInBackward.apply(y, self.halt)  # type: ignore[no-untyped-call]
        else:
            self.halt()
        return checkpoint(torch.tanh, y, use_reentrant=False)  # type: ignore[no-any-return]


PLACES: dict[str, dict[str, Any]] = {
    "torch looks at outputs": {"number": 1, "in_backward": False, "asks": False},
    "forward is traced": {"number": 2, "in_backward": False, "asks": False},
    "backward is traced": {"number": 1, "in_backward": True, "asks": False},
    "the model is told that it compiles": {"number": 2, "in_backward": False, "asks": True},
}


def halting(place: str) -> Halting:
    options = dict(PLACES[place])
    torch.manual_seed(0)
    return Halting(Halt(options.pop("number")), **options)


def form(graph: fx.Graph) -> list[Any]:
    """All that a graph says, and what torch notes at its nodes."""
    return [
        (str(node.format_node()), sorted(node.meta), shape_of(node.meta.get("val")), node.meta.get("custom"))
        for node in graph.nodes
    ]


def shape_of(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [shape_of(part) for part in value]
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


class Capturing:
    """A capture in another thread that has come to a place in the middle."""

    def __init__(self, place: str) -> None:
        self.model = halting(place)
        self.failures: list[BaseException] = []
        self.found: list[Any] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        assert self.model.halt.reached.wait(WAIT_S)

    def _work(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fxckpt.errors.CheckpointingBypassedWarning)
                self.found = form(capture(self.model, (X,)).module.graph)
        except BaseException as error:
            self.failures.append(error)
            self.model.halt.reached.set()

    def finish(self) -> None:
        """Let it go on, and wait until it has ended."""
        self.model.halt.passed.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        assert not self.failures, self.failures


@pytest.fixture(params=PLACES, scope="module")
def alone(request: pytest.FixtureRequest) -> tuple[str, list[Any]]:
    """A place, and what is captured while no other thread does anything."""
    model = halting(request.param)
    model.halt.number = 0
    with pytest.warns(fxckpt.errors.CheckpointingBypassedWarning):
        return request.param, form(capture(model, (X,)).module.graph)


@pytest.fixture
def middle(alone: tuple[str, list[Any]]) -> Iterator[Capturing]:
    """A capture in another thread is in the middle while a test runs; what it captures is the same as alone."""
    place, expected = alone
    capturing = Capturing(place)
    try:
        yield capturing
    finally:
        capturing.finish()
    assert capturing.found == expected
    assert not patching._SITES


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """The test ends in torch's own functions, and in the warnings that were shown before."""
    call, kind = nn.Module.__call__, type(torch.fx.traceback)
    yield
    assert nn.Module.__call__ is call
    assert type(torch.fx.traceback) is kind
    assert not torch.is_anomaly_enabled()
    assert not torch.fx.traceback.has_preserved_node_meta()
    assert not patching._SITES


def test_random_numbers(middle: Capturing) -> None:
    """Also those that are drawn after the capture has ended."""
    torch.manual_seed(3)
    found = [torch.rand(3)]
    torch.random.manual_seed(4)
    found.append(torch.rand(3))
    middle.finish()
    found.append(torch.rand(3))
    torch.manual_seed(3)
    assert torch.equal(found[0], torch.rand(3))
    torch.manual_seed(4)
    assert torch.equal(torch.cat(found[1:]), torch.cat([torch.rand(3), torch.rand(3)]))


@pytest.mark.usefixtures("middle")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    calls = []
    layer = nn.Linear(16, 16)

    def part(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return F.dropout(torch.tanh(layer(x)), 0.5)

    gradients = []
    for run in (part, lambda x: checkpoint(part, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(x).sum(), [x, *layer.parameters()]) if not reentrant else None)
        torch.manual_seed(5)
        layer.zero_grad()
        run(x).sum().backward()
        assert x.grad is not None
        gradients.append((x.grad, *(p.grad for p in layer.parameters())))  # type: ignore[arg-type]
    runs = 1 if reentrant else 2
    assert len(calls) == 3 * runs
    for ours, theirs in zip(gradients[2:], gradients[:2], strict=True):
        for found, expected in zip(ours or (), theirs or (), strict=True):
            assert_same_bits(found, expected, "gradient")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fused = self.encoder(x[None])
        return fused + self.encoder(x[None])  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 8, 2, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None])[0]  # type: ignore[no-any-return]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.convolution(x[:, None, :].expand(4, 4, 16)[:, None]))).transpose(2, 3)
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        return y.masked_fill_(y > 1, 0.5)


class Differentiates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        (gradient,) = torch.autograd.grad(torch.tanh(y).sum(), y, create_graph=True)
        return F.alpha_dropout(y + gradient, 0.2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Encoder,
    "recurrent": Recurrent,
    "images": Images,
    "gradients": Differentiates,
}


@pytest.fixture(params=MODELS, scope="module")
def step(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """A model, and a step of it while no other thread does anything."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    return model, plain_step(model, (X,), {}, project)


@pytest.mark.usefixtures("middle")
@pytest.mark.works("threads, processes, interrupts", "a step of another thread while one captures")
def test_plain_steps(step: tuple[nn.Module, Any]) -> None:
    model, expected = step
    assert_same_step(plain_step(model, (X,), {}, project), expected)


@pytest.mark.usefixtures("middle")
def test_a_compiled_step() -> None:
    layer = nn.Linear(16, 16)

    def loss(x: Tensor) -> Tensor:
        return F.dropout(F.hardswish(layer(x)), 0.5).sum()

    gradients = []
    torch.compiler.reset()
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        torch.manual_seed(3)
        layer.zero_grad()
        run(X).backward()
        gradients.append([p.grad for p in layer.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert_same_bits(found, expected, "gradient")


@pytest.mark.usefixtures("middle")
def test_what_torch_tells_of_itself() -> None:
    assert torch.compiler.is_compiling() is False
    assert torch.compiler.is_exporting() is False
    assert not torch.fx.traceback.has_preserved_node_meta()
    assert torch.fx.traceback.get_current_meta() == torch.fx.traceback.current_meta == {}
    assert not torch.is_anomaly_enabled()
    with pytest.raises(UserWarning, match="here"):
        warnings.warn("here", UserWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("here", UserWarning, stacklevel=1)
    assert len(caught) == 1


@pytest.mark.usefixtures("middle")
def test_checks_of_values() -> None:
    with pytest.raises(RuntimeError, match="wrong"):
        torch._check_tensor_all(X > 2, lambda: "wrong")


@pytest.mark.works("threads, processes, interrupts", "two threads that capture a model each")
def test_a_model_of_its_own(step: tuple[nn.Module, Any], middle: Capturing) -> None:
    """The second capture waits until the first has ended."""
    model, expected = step

    def optimize() -> nn.Module:
        return fxckpt.optimize(copy.deepcopy(model), "1GB", solver="min_memory", example_inputs=(X.clone(),))

    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(optimize)
        middle.finish()
        optimized = planned.result(WAIT_S)
    assert_same_step(run_step(optimized, (X,), {}, project), expected)


def traced(x: Tensor) -> Tensor:
    """Ops that are described otherwise while models are captured."""
    y = x.reshape(1, 1, 4, 16).expand(1, 2, 4, 16).transpose(2, 3).requires_grad_()
    z = F.interpolate(F.hardswish(F.dropout(y, 0.5)), scale_factor=2, mode="bilinear")
    (gradient,) = torch.autograd.grad(z.sum(), y)
    masked = gradient.clone().masked_fill_(gradient > 0, 1.0)
    padded: Tensor = F.pad(masked, (1, 1, 1, 1), mode="reflect") + nn.Identity()(z).sum()
    return padded


@pytest.fixture(scope="module")
def graphs() -> list[Any]:
    """What other traces give while nothing is captured."""
    return other_graphs()


def other_graphs() -> list[Any]:
    made = [form(make_fx(traced, tracing_mode=mode)(X).graph) for mode in ("real", "fake", "symbolic")]
    with FakeTensorMode() as fake:
        made.append(shape_of(traced(fake.from_tensor(X))))
    with torch.fx.traceback.preserve_node_meta():
        made.append(form(make_fx(traced, tracing_mode="fake")(X).graph))
    return made


@pytest.mark.usefixtures("middle")
def test_other_graphs(graphs: list[Any]) -> None:
    assert other_graphs() == graphs


def test_other_graphs_after_a_capture(graphs: list[Any]) -> None:
    """Torch remembers how results were described: but not what it was told during a capture."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Hardswish(), nn.Dropout(0.5))
    capture(model, (X,))
    assert other_graphs() == graphs


def test_a_graph_that_is_begun_in_the_middle_and_ends_later(alone: tuple[str, list[Any]]) -> None:
    """What either changes for the process is undone in another order than it was made."""
    place, expected = alone
    capturing = Capturing(place)

    def ends_meanwhile(x: Tensor) -> Tensor:
        y = traced(x)
        capturing.finish()
        z: Tensor = y + nn.Identity()(x).sum()
        return z

    found = form(make_fx(ends_meanwhile)(X).graph)
    assert capturing.found == expected
    assert found == form(make_fx(lambda x: traced(x) + nn.Identity()(x).sum())(X).graph)


def test_a_capture_that_fails(middle: Capturing) -> None:
    """Another thread's capture ends with an error, after the first has ended."""
    model = nn.Linear(3, 3)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(capture, model, (X,))
        middle.finish()
        with contextlib.suppress(fxckpt.errors.CaptureError):
            ours.result(WAIT_S)
            pytest.fail("shapes don't fit")

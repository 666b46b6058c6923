"""What people train, one layer at a time: each with inputs, in each type and layout that may call for other kernels.

Everything is made on the default device (`with torch.device(...)`), so that the same case runs on a CPU, a GPU, or as
fake tensors of either.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Inputs = Callable[[], tuple[Any, ...]]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class LayerCase:
    """A layer and what it is called with.

    Attributes:
        name: unique.
        build: makes the layer, in float32 and training mode.
        inputs: makes its inputs; those of floating point get gradients.
        dtype: what layer and inputs are converted to.
        autocast: what matrix products are cast to, or None.
        training: whether the layer is in training mode.
        around: a context in which it is called.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    dtype: torch.dtype = FP32
    autocast: torch.dtype | None = None
    training: bool = True
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def made(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The layer, so that it returns a scalar, and its inputs, on the default device."""
        torch.manual_seed(0)
        model = Squared(self.build().to(self.dtype).train(self.training))
        return model, tuple(_given(x, self.dtype) for x in self.inputs())

    @contextlib.contextmanager
    def called(self, kind: str) -> Iterator[None]:
        """Autocast and the like, for a device of this kind."""
        enabled = self.autocast is not None
        with torch.autocast(kind, self.autocast, enabled=enabled), self.around():
            yield

    def __repr__(self) -> str:
        return self.name


def _given(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype).requires_grad_()


class Squared(nn.Module):
    """The sum of the squares of what a layer returns: its gradient has the layout of the result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *xs: Any) -> Tensor:
        outputs: list[Tensor] = []
        _collect(self.layer(*xs), outputs)
        total = (outputs[0] * outputs[0]).sum()
        for y in outputs[1:]:
            total = total + (y * y).sum()
        return total


def _collect(y: Any, found: list[Tensor]) -> None:
    if isinstance(y, Tensor):
        if y.requires_grad:
            found.append(y)
    elif isinstance(y, (tuple, list)):
        for part in y:
            _collect(part, found)


class Call(nn.Module):
    """A function of tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Any) -> Any:
        return self.function(*xs)


class Packed(nn.Module):
    """A recurrent layer of a packed sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        lengths = torch.tensor([x.shape[1], x.shape[1] // 2], device="cpu")
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data


def _packed(kind: Any) -> nn.Module:
    return Packed(kind(16, 32, batch_first=True))


def normal(*shape: int) -> Inputs:
    return lambda: (torch.randn(shape),)


def laid_out(layout: str, *shape: int) -> Inputs:
    """A tensor in a layout: "contiguous", "channels last", "transposed" (first and last dims), "sliced" (channels)."""

    def make() -> tuple[Tensor]:
        x = torch.randn(shape)
        if layout == "channels last":
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        elif layout == "transposed":
            x = x.transpose(1, -1).contiguous().transpose(1, -1)
        elif layout == "sliced":
            x = torch.cat((x, x), 1)[:, : shape[1]]
        return (x,)

    return make


def typed(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    evaluated: bool = False,
    half: bool = False,
    **more: Any,
) -> Iterator[LayerCase]:
    """In float32, bfloat16 and under autocast; if asked for also in float16, and in eval mode."""
    yield LayerCase(f"{name}/fp32", build, inputs, **more)
    yield LayerCase(f"{name}/bf16", build, inputs, dtype=BF16, **more)
    yield LayerCase(f"{name}/amp", build, inputs, autocast=BF16, **more)
    if half:
        yield LayerCase(f"{name}/fp16", build, inputs, dtype=FP16, **more)
        yield LayerCase(f"{name}/amp16", build, inputs, autocast=FP16, **more)
    if evaluated:
        yield LayerCase(f"{name}/fp32/eval", build, inputs, training=False, **more)
        yield LayerCase(f"{name}/bf16/eval", build, inputs, dtype=BF16, training=False, **more)


def norms() -> Iterator[LayerCase]:
    shapes = {1: (4, 8, 16), 2: (4, 8, 6, 6), 3: (2, 8, 4, 4, 4)}
    for dims, shape in shapes.items():
        for layout in ("contiguous", "transposed" if dims == 1 else "channels last", "sliced"):
            kind: Any = getattr(nn, f"BatchNorm{dims}d")
            given, half = laid_out(layout, *shape), dims == 2
            yield from typed(f"BatchNorm{dims}d/{layout}", functools.partial(kind, 8), given, evaluated=True, half=half)
            kind = getattr(nn, f"InstanceNorm{dims}d")
            yield from typed(f"InstanceNorm{dims}d/{layout}", functools.partial(kind, 8, affine=True), given)
    image = normal(4, 8, 6, 6)
    yield from typed("BatchNorm1d/rows", lambda: nn.BatchNorm1d(8), normal(16, 8), evaluated=True)
    yield from typed("BatchNorm2d/plain", lambda: nn.BatchNorm2d(8, affine=False), image, evaluated=True)
    untracked = lambda: nn.BatchNorm2d(8, track_running_stats=False)  # noqa: E731
    yield from typed("BatchNorm2d/untracked", untracked, image, evaluated=True)
    yield from typed("BatchNorm2d/average", lambda: nn.BatchNorm2d(8, momentum=None), image)
    yield from typed("InstanceNorm2d/plain", lambda: nn.InstanceNorm2d(8), image)
    tracked = lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)  # noqa: E731
    yield from typed("InstanceNorm2d/tracked", tracked, image, evaluated=True)
    frozen = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))  # noqa: E731
    for layout in ("contiguous", "channels last"):
        yield from typed(f"conv-norm-relu/{layout}", frozen, laid_out(layout, 4, 8, 6, 6), evaluated=True)
        yield from typed(f"GroupNorm/{layout}", lambda: nn.GroupNorm(2, 8), laid_out(layout, 4, 8, 6, 6))
    yield from typed("LayerNorm", lambda: nn.LayerNorm(32), normal(4, 16, 32), half=True)
    yield from typed("LayerNorm/transposed", lambda: nn.LayerNorm(32), laid_out("transposed", 4, 16, 32))
    yield from typed("LayerNorm/plain", lambda: nn.LayerNorm(32, elementwise_affine=False), normal(4, 16, 32))
    yield from typed("RMSNorm", lambda: nn.RMSNorm(32), normal(4, 16, 32), half=True)
    yield from typed("RMSNorm/transposed", lambda: nn.RMSNorm(32), laid_out("transposed", 4, 16, 32))
    yield from typed("LocalResponseNorm", lambda: nn.LocalResponseNorm(2), image)
    weighted = lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))  # noqa: E731
    yield from typed("weight_norm", weighted, normal(4, 16))


def recurrent() -> Iterator[LayerCase]:
    menu: list[dict[str, Any]] = [{}, {"num_layers": 2, "dropout": 0.3}, {"bidirectional": True}, {"bias": False}]
    menu.append({"batch_first": True})
    for kind, options in itertools.product((nn.LSTM, nn.GRU, nn.RNN), menu):
        said = ",".join(f"{k}={v}" for k, v in options.items()) or "plain"
        yield from typed(
            f"{kind.__name__}/{said}",
            functools.partial(kind, 16, 32, **options),
            normal(5, 3, 16),
            half=not options,
            evaluated="dropout" in options,
        )
    yield from typed("RNN/relu", lambda: nn.RNN(16, 32, nonlinearity="relu"), normal(5, 3, 16))
    yield from typed("LSTM/projected", lambda: nn.LSTM(16, 32, proj_size=8), normal(5, 3, 16))
    yield from typed("LSTM/unbatched", lambda: nn.LSTM(16, 32), normal(5, 16))
    state = lambda: (torch.randn(5, 3, 16), (torch.randn(1, 3, 32), torch.randn(1, 3, 32)))  # noqa: E731
    yield from typed("LSTM/state", lambda: nn.LSTM(16, 32), state)
    for kind in (nn.LSTM, nn.GRU):
        packed = functools.partial(_packed, kind)
        yield from typed(f"{kind.__name__}/packed", packed, normal(2, 6, 16))
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        yield from typed(kind.__name__, functools.partial(kind, 16, 32), normal(3, 16))


class Attend(nn.Module):
    """torch's attention with its options."""

    def __init__(self, dropout: float, causal: bool, grouped: bool, scale: float | None) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"is_causal": causal, "enable_gqa": grouped, "scale": scale}
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, **self.options)


def _attend(
    name: str,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    heads: tuple[int, int] = (4, 4),
    lengths: tuple[int, int] = (32, 32),
    dim: int = 64,
    value_dim: int | None = None,
    mask: Callable[[], Tensor] | None = None,
    layout: str = "heads first",
    scale: float | None = None,
    **more: Any,
) -> Iterator[LayerCase]:
    def of(count: int, length: int, width: int) -> Tensor:
        if layout == "heads first":
            return torch.randn(2, count, length, width)
        return torch.randn(2, length, count, width).transpose(1, 2)

    def make() -> tuple[Any, ...]:
        q, k = of(heads[0], lengths[0], dim), of(heads[1], lengths[1], dim)
        v = of(heads[1], lengths[1], value_dim or dim)
        return (q, k, v) if mask is None else (q, k, v, mask())

    build = lambda: Attend(dropout, causal, heads[0] != heads[1], scale)  # noqa: E731
    yield from typed(f"attention/{name}", build, make, half=True, **more)


def attention() -> Iterator[LayerCase]:
    yield from _attend("plain", evaluated=True)
    yield from _attend("transposed", layout="transposed")
    yield from _attend("causal", causal=True, layout="transposed")
    yield from _attend("dropout", dropout=0.2, layout="transposed", evaluated=True)
    yield from _attend("causal dropout", dropout=0.2, causal=True)
    boolean = lambda: torch.ones(32, 32, dtype=torch.bool).tril()  # noqa: E731
    yield from _attend("boolean mask", mask=boolean)
    yield from _attend("boolean mask dropout", mask=boolean, dropout=0.2)
    yield from _attend("padding mask", mask=lambda: (torch.arange(32) < 20).expand(2, 1, 32, 32))
    yield from _attend("bias", mask=lambda: torch.randn(32, 32))
    yield from _attend("bias of heads", mask=lambda: torch.randn(2, 4, 32, 32), dropout=0.1)
    yield from _attend("grouped", heads=(4, 2), layout="transposed")
    yield from _attend("grouped causal", heads=(4, 2), causal=True)
    yield from _attend("grouped masked", heads=(4, 2), mask=boolean)
    yield from _attend("cross", lengths=(32, 48))
    yield from _attend("causal cross", lengths=(32, 48), causal=True)
    yield from _attend("one query", lengths=(1, 48))
    yield from _attend("odd lengths", lengths=(33, 47))
    yield from _attend("scaled", scale=0.3)
    yield from _attend("values of another width", value_dim=32)
    for dim in (8, 20, 33, 80, 128, 192, 256, 320):
        yield from _attend(f"width {dim}", dim=dim)
        yield from _attend(f"width {dim} masked dropout", dim=dim, mask=boolean, dropout=0.2)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        around = lambda b=backend: sdpa_kernel(b)  # noqa: E731
        yield from _attend(f"only {backend.name.lower()}", around=around, dropout=0.2)
    three = lambda: tuple(torch.randn(2, 16, 32) for _ in range(3))  # noqa: E731
    yield from typed("attention/three dims", lambda: Attend(0.0, False, False, None), three)
    for options in ({}, {"dropout": 0.2}, {"batch_first": True, "dropout": 0.2}):
        said = ",".join(options) or "plain"
        for weights in (True, False):
            build = functools.partial(SelfAttention, weights, **options)
            yield from typed(f"MultiheadAttention/{said}/{weights}", build, normal(6, 4, 32), evaluated=True)
    for first in (True, False):
        layer = lambda f=first: nn.TransformerEncoderLayer(32, 2, 64, 0.1, batch_first=True, norm_first=f)  # noqa: E731
        yield from typed(f"TransformerEncoderLayer/{first}", layer, normal(4, 6, 32), evaluated=True)
    decoder = lambda: nn.TransformerDecoderLayer(32, 2, 64, 0.1, batch_first=True)  # noqa: E731
    yield from typed("TransformerDecoderLayer", decoder, lambda: (torch.randn(4, 6, 32), torch.randn(4, 5, 32)))


class SelfAttention(nn.Module):
    """torch's own module, with the sequence as query, key and value."""

    def __init__(self, weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(32, 2, **options), weights

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=self.weights)

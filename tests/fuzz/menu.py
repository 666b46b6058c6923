"""What the fuzzer's models are made of: layers by name, with the forms of tensors that they read and write.

Rows are (batch, width), sequences (batch, length, width), images (batch, channels, side, side), ids (batch, length).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.fuzz.described import Described
from tests.fuzz.layers import (
    Across,
    Attention,
    Call,
    GroupNorm,
    OutsideAutocast,
    Recurrent,
    Running,
    SelfAttention,
    TransformerLayer,
    Twice,
    Weighted,
)
from tests.fuzz.state import STATE, Stateful

ROWS, SEQUENCE, IMAGE, IDS = "rows", "sequence", "image", "ids"
VOCABULARY = 11


@dataclass(frozen=True, repr=False)
class Sizes(Described):
    """What the forms of tensors are made of."""

    batch: int = 16
    length: int = 8
    width: int = 16
    channels: int = 4
    side: int = 8

    def shape(self, form: str) -> tuple[int, ...]:
        return {
            ROWS: (self.batch, self.width),
            SEQUENCE: (self.batch, self.length, self.width),
            IMAGE: (self.batch, self.channels, self.side, self.side),
            IDS: (self.batch, self.length),
        }[form]


@dataclass(frozen=True)
class Layer:
    """A kind of layer: how it is made, and the forms of what it reads and writes.

    `full` layers have no kernels for types of half precision.
    """

    reads: tuple[str, ...]
    writes: str
    make: Callable[[Sizes], nn.Module]
    full: bool = False


def _function(form: str, function: Callable[..., Tensor], *, count: int = 1, full: bool = False) -> Layer:
    return Layer((form,) * count, form, lambda _: Call(function), full)


def _layer(form: str, make: Callable[[Sizes], nn.Module], *, count: int = 1, full: bool = False) -> Layer:
    return Layer((form,) * count, form, make, full)


def _set_first(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = y[:, 0] * 2
    return x


def _change_view(x: Tensor) -> Tensor:
    y = x * 2
    y.transpose(0, 1)[0].add_(1)
    y[..., 1:].mul_(0.5)
    return y


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
    return x * y


def _pick(x: Tensor) -> Tensor:
    values, places = x.topk(2, 1)
    return x.scatter_add(1, places, values * values)


def _multinomial(x: Tensor) -> Tensor:
    drawn = torch.multinomial(x.detach().float().softmax(1), 2)
    return x + x.gather(1, drawn).sum(1, keepdim=True)


def _checked(x: Tensor) -> Tensor:
    size = x.detach().nan_to_num().abs().clamp(max=9)
    if (size > 9).any() or not torch.isfinite(size).all():
        raise ArithmeticError
    assert size.min() >= 0
    return x * size


def _sampled(x: Tensor) -> Tensor:
    normal = torch.distributions.Normal(x.nan_to_num(), F.softplus(x.flip(0)).nan_to_num() + 0.1)
    drawn: Tensor = normal.rsample()
    return drawn


def _solved(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x.nan_to_num().clamp(-1, 1).to(torch.float32 if x.dtype != torch.float64 else x.dtype)
        matrix = y.T @ y + torch.eye(y.shape[1], dtype=y.dtype)
        solution: Tensor = torch.linalg.solve(torch.linalg.cholesky(matrix), y.T)
        return solution.T.to(x.dtype)


def _by_complex(x: Tensor) -> Tensor:
    y = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(y.exp() * y.conj()).flatten(-2)


ANY: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky relu": F.leaky_relu,
    "exp": lambda x: torch.exp(-x.abs()),
    "square root": lambda x: (x.square() + 1).sqrt(),
    "power": lambda x: x.pow(3),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(1),
    "norm": lambda x: F.normalize(x, dim=-1),
    "cumulative sum": lambda x: x.cumsum(1),
    "reduction": lambda x: x - x.amax(-1, keepdim=True) + x.mean(1, keepdim=True),
    "variance": lambda x: x / (x.var(-1, keepdim=True, unbiased=False) + 1).sqrt(),
    "log of sums": lambda x: x - x.logsumexp(-1, keepdim=True),
    "sort": lambda x: x.sort(-1).values,
    "pick": _pick,
    "where": lambda x: torch.where(x > 0, x.exp().clamp(max=3), x),
    "masked fill": lambda x: x.masked_fill(x > 1, 0.5),
    "clamp": lambda x: x.clamp(-1, 1),
    "roll": lambda x: x.roll(1, 0) + x.flip(-1),
    "chunks": lambda x: torch.cat([torch.tanh(part) for part in x.chunk(2, -1)][::-1], -1),
    "split": lambda x: torch.cat([part * i for i, part in enumerate(x.split(1, 0))]),
    "views": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flat view": lambda x: x.reshape(-1).sin().view(x.shape),
    "strided view": lambda x: F.pad(x[..., ::2], (0, x.shape[-1] - x[..., ::2].shape[-1])) + x,
    "expand": lambda x: x[:1].expand_as(x) * x,
    "empty part": lambda x: torch.cat((x, x[:0].exp())),
    "scalar": lambda x: x * x.mean().exp(),
    "loss": lambda x: x * (1 - F.mse_loss(x, x.flip(0))),
    "smooth loss": lambda x: x + F.smooth_l1_loss(x, x.roll(1, 1)),
    "losses": lambda x: x + F.huber_loss(x, x.flip(-1), reduction="none"),
    "binary loss": lambda x: x * F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "divergence": lambda x: x + F.kl_div(x.log_softmax(-1), x.flip(0).softmax(-1), reduction="batchmean"),
    "likelihood": lambda x: x * F.cross_entropy(x, x.argmax(1)),
    "checks": _checked,
    "distribution": _sampled,
    "index": lambda x: x[torch.arange(len(x)).flip(0)],
    "index put": lambda x: x.index_put((torch.zeros(2, dtype=torch.long),), x[:1] * 2, accumulate=True),
    "custom function": Twice.of,
    "stopped gradient": lambda x: torch.tanh(x) * x.sin().detach(),
    "part without gradients": _without_gradients,
    "uniform noise": lambda x: x * torch.rand_like(x),
    "normal noise": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "bernoulli": lambda x: x.exp().clamp(max=3) * torch.bernoulli(torch.full_like(x, 0.6)),
    "random ints": lambda x: x * torch.randint(0, 3, x.shape),
    "noise in place": lambda x: x + torch.empty_like(x).normal_(),
    "random permutation": lambda x: x[torch.randperm(len(x))],
    "dropout function": lambda x: F.dropout(x, 0.3),
    "changed view": _change_view,
    "relu in place": lambda x: x.relu_(),
    "multiply in place": lambda x: x.mul_(0.5),
    "tanh in place": lambda x: x.tanh_(),
    "as it is": lambda x: x,
}
"""Functions of a tensor of any form but ids."""

PAIRS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "subtract scaled": lambda x, y: torch.sub(x, y, alpha=2),
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "divide": lambda x, y: x / (y.abs() + 1),
    "choose": lambda x, y: torch.where(x > y, x, y * 2),
    "interpolate": lambda x, y: torch.lerp(x, y, 0.3),
    "multiply and add": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "concatenate": lambda x, y: torch.cat((x, y), 0).tanh().chunk(2)[0],
    "stack": lambda x, y: torch.stack((x, y)).logsumexp(0),
    "add in place": lambda x, y: x.add_(y),
    "set a part": _set_first,
}
"""Functions of two tensors of the same form."""

OF_ROWS: dict[str, Layer] = {
    "linear": _layer(ROWS, lambda s: nn.Linear(s.width, s.width)),
    "linear without bias": _layer(ROWS, lambda s: nn.Linear(s.width, s.width, bias=False)),
    "mlp": _layer(ROWS, lambda s: nn.Sequential(nn.Linear(s.width, 64), nn.GELU(), nn.Linear(64, s.width))),
    "gated linear": _layer(ROWS, lambda s: nn.Sequential(nn.Linear(s.width, 2 * s.width), nn.GLU())),
    "bilinear": _layer(ROWS, lambda s: OutsideAutocast(nn.Bilinear(s.width, s.width, s.width)), count=2),
    "solved": _function(ROWS, _solved),
    "batch norm": _layer(ROWS, lambda s: nn.BatchNorm1d(s.width)),
    "layer norm": _layer(ROWS, lambda s: nn.LayerNorm(s.width)),
    "rms norm": _layer(ROWS, lambda s: nn.RMSNorm(s.width)),
    "group norm of rows": _layer(ROWS, lambda s: nn.GroupNorm(2, s.width)),
    "dropout": _layer(ROWS, lambda _: nn.Dropout(0.2)),
    "dropout in place": _layer(ROWS, lambda _: nn.Dropout(0.3, inplace=True)),
    "alpha dropout": _layer(ROWS, lambda _: nn.AlphaDropout(0.15)),
    "feature alpha dropout": _layer(ROWS, lambda _: nn.FeatureAlphaDropout(0.3)),
    # In eager its result is contiguous whatever it is given, which torch's functional form of the op does not know.
    "randomized relu": _layer(ROWS, lambda _: Call(lambda x: F.rrelu(x.contiguous(), training=True)), full=True),
    "parametric relu": _layer(ROWS, lambda s: nn.PReLU(s.width)),
    "weight norm": _layer(ROWS, lambda s: parametrizations.weight_norm(nn.Linear(s.width, s.width)), full=True),
    "spectral norm": _layer(ROWS, lambda s: parametrizations.spectral_norm(nn.Linear(s.width, s.width)), full=True),
    "running mean": _layer(ROWS, lambda s: Running(s.width)),
    "einsum": _layer(ROWS, lambda s: Weighted(lambda w, x: torch.einsum("bi,ij,bj->bi", x, w, x), s.width, s.width)),
    "weight from above": _layer(ROWS, lambda s: Weighted(lambda w, x: x @ w.triu(), s.width, s.width)),
    "similarities": _function(ROWS, lambda x, y: (x @ y.T).softmax(-1) @ y, count=2),
    "fft": _function(ROWS, lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j), x.shape[-1]), full=True),
    "complex": _function(ROWS, _by_complex, full=True),
    "multinomial": _function(ROWS, _multinomial, full=True),
    "inverse": _function(ROWS, lambda x: x @ torch.linalg.inv_ex(x.T @ x + torch.eye(x.shape[1]).to(x))[0], full=True),
    "one row for all": _function(ROWS, lambda x: x + x.select(0, 0).outer(x[0]).diagonal()),
}

OF_SEQUENCES: dict[str, Layer] = {
    "linear of sequence": _layer(SEQUENCE, lambda s: nn.Linear(s.width, s.width)),
    "LSTM": _layer(SEQUENCE, lambda s: Recurrent(nn.LSTM, s.width), full=True),
    "two-way LSTM": _layer(
        SEQUENCE,
        lambda s: Recurrent(nn.LSTM, s.width, num_layers=2, dropout=0.1, bidirectional=True),
        full=True,
    ),
    "GRU": _layer(SEQUENCE, lambda s: Recurrent(nn.GRU, s.width), full=True),
    "RNN": _layer(SEQUENCE, lambda s: Recurrent(nn.RNN, s.width), full=True),
    "conv1d": _layer(SEQUENCE, lambda s: Across(nn.Conv1d(s.width, s.width, 3, padding=1))),
    "transposed conv1d": _layer(SEQUENCE, lambda s: Across(nn.ConvTranspose1d(s.width, s.width, 3, padding=1))),
    "batch norm of sequence": _layer(SEQUENCE, lambda s: Across(nn.BatchNorm1d(s.width))),
    "instance norm of sequence": _layer(SEQUENCE, lambda s: Across(nn.InstanceNorm1d(s.width, affine=True))),
    "layer norm of sequence": _layer(SEQUENCE, lambda s: nn.LayerNorm(s.width, bias=False)),
    "dropout1d": _layer(SEQUENCE, lambda _: nn.Dropout1d(0.3)),
    "attention": _layer(SEQUENCE, lambda s: Attention(s.width)),
    "causal attention": _layer(SEQUENCE, lambda s: Attention(s.width, causal=True)),
    "attention with dropout": _layer(SEQUENCE, lambda s: Attention(s.width, dropout=0.2)),
    "cross attention": _layer(SEQUENCE, lambda s: Attention(s.width), count=2),
    "multi-head attention": _layer(SEQUENCE, lambda s: SelfAttention(s.width, dropout=0.1)),
    "transformer layer": _layer(SEQUENCE, lambda s: TransformerLayer(s.width)),
    "max of sequence": Layer((SEQUENCE,), ROWS, lambda _: Call(lambda x: x.max(1).values)),
    "mean of sequence": Layer((SEQUENCE,), ROWS, lambda _: Call(lambda x: x.mean(1))),
    "last of sequence": Layer((SEQUENCE,), ROWS, lambda _: Call(lambda x: x[:, -1])),
    "sequence of rows": Layer((ROWS,), SEQUENCE, lambda s: Call(lambda x: x.unsqueeze(1).expand(-1, s.length, -1))),
    "embedding": Layer((IDS,), SEQUENCE, lambda s: nn.Embedding(VOCABULARY, s.width)),
    "embedding with padding": Layer((IDS,), SEQUENCE, lambda s: nn.Embedding(VOCABULARY, s.width, padding_idx=0)),
    "embedding bag": Layer((IDS,), ROWS, lambda s: nn.EmbeddingBag(VOCABULARY, s.width, mode="mean"), full=True),
}

OF_IMAGES: dict[str, Layer] = {
    "conv2d": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, s.channels, 3, padding=1)),
    "conv2d without bias": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, s.channels, 1, bias=False)),
    "grouped conv2d": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, s.channels, 3, padding="same", groups=2)),
    "depthwise conv2d": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, s.channels, 3, padding=1, groups=s.channels)),
    "dilated conv2d": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, s.channels, 3, padding=2, dilation=2)),
    "circular conv2d": _layer(IMAGE, lambda s: nn.Conv2d(s.channels, 4, 3, padding=1, padding_mode="circular")),
    "transposed conv2d": _layer(IMAGE, lambda s: nn.ConvTranspose2d(s.channels, s.channels, 3, padding=1)),
    "down and up": _layer(
        IMAGE,
        lambda s: nn.Sequential(
            nn.Conv2d(s.channels, 8, 2, 2), nn.ReLU(inplace=True), nn.ConvTranspose2d(8, s.channels, 2, 2)
        ),
    ),
    "batch norm 2d": _layer(IMAGE, lambda s: nn.BatchNorm2d(s.channels)),
    "group norm": _layer(IMAGE, lambda s: GroupNorm(2, s.channels)),
    "instance norm": _layer(IMAGE, lambda s: nn.InstanceNorm2d(s.channels, affine=True)),
    "running instance norm": _layer(IMAGE, lambda s: nn.InstanceNorm2d(s.channels, track_running_stats=True)),
    "local response norm": _layer(IMAGE, lambda _: nn.LocalResponseNorm(2)),
    "dropout2d": _layer(IMAGE, lambda _: nn.Dropout2d(0.3)),
    "max pool": _function(IMAGE, lambda x: F.max_pool2d(x, 3, 1, 1)),
    "average pool": _function(IMAGE, lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "adaptive pool": _function(IMAGE, lambda x: x * F.adaptive_avg_pool2d(x, 1)),
    "pool and interpolate": _function(
        IMAGE, lambda x: F.interpolate(F.max_pool2d(x, 2), x.shape[2:], mode="bilinear", align_corners=False)
    ),
    "nearest": _function(IMAGE, lambda x: F.interpolate(x[..., ::2, ::2], x.shape[2:])),
    "shuffled pixels": _function(IMAGE, lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2).sin()),
    "reflected": _function(IMAGE, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")[..., 2:, 2:]),
    "channels last": _function(IMAGE, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "rows of image": Layer((IMAGE,), ROWS, lambda s: nn.Sequential(nn.Flatten(), nn.Linear(_pixels(s), s.width))),
    "image of rows": Layer(
        (ROWS,),
        IMAGE,
        lambda s: nn.Sequential(nn.Linear(s.width, _pixels(s)), nn.Unflatten(1, (s.channels, s.side, s.side))),
    ),
}


def _pixels(sizes: Sizes) -> int:
    return sizes.channels * sizes.side**2


def _on_all(functions: dict[str, Callable[..., Tensor]], count: int) -> dict[str, Layer]:
    return {
        f"{name} ({form})": _function(form, function, count=count)
        for form in (ROWS, SEQUENCE, IMAGE)
        for name, function in functions.items()
    }


OF_PYTHON = {
    f"{name} ({form})": Layer((form,), form, lambda _, parts=parts: Stateful(*parts))  # type: ignore[misc]
    for form in (ROWS, SEQUENCE, IMAGE)
    for name, parts in STATE.items()
}

MENU: dict[str, Layer] = {
    **OF_ROWS,
    **OF_SEQUENCES,
    **OF_IMAGES,
    **_on_all(ANY, 1),
    **_on_all(PAIRS, 2),
    **OF_PYTHON,
}
"""All layers by name."""

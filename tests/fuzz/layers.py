"""Modules that the fuzzer's menu is made of and torch does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Call(nn.Module):
    """A function of tensors."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


class Weighted(nn.Module):
    """A function of a weight and tensors."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(self.weight, *xs)


class OutsideAutocast(nn.Module):
    """A layer that is computed in the type of its weights.

    Inside of some kernels (the one of `nn.Bilinear`) eager torch casts for autocast; a captured kernel is run as it is.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *xs: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.layer(*(x.to(dtype) for x in xs))
        return y


class GroupNorm(nn.GroupNorm):
    """Group norm, but for a case where torch's own backward crashes: channels last, and no gradient for the input."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad or x.is_contiguous()):
            raise NotImplementedError("torch crashes in backward")
        return super().forward(x)


class TransformerLayer(nn.TransformerEncoderLayer):
    """torch's own, but for a case where its kernel casts inside."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2, 32, 0.15, batch_first=True)

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_cast(self, src)
        return super().forward(src, *args, **kwargs)


def _check_cast(layer: nn.Module, x: Tensor) -> None:
    """Refuse what eager torch computes by a kernel that casts inside: attention under autocast, without gradients."""
    is_trained = layer.training or any(t.requires_grad for t in (x, *layer.parameters()))
    if torch.is_autocast_enabled("cpu") and not is_trained:
        raise NotImplementedError("a captured kernel does not cast inside")


class Across(nn.Module):
    """A layer that wants channels in another place: dimensions 1 and 2 change places before and after it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.transpose(1, 2))
        return y.transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent layer and a projection back to the width.

    Wide enough that kernels vectorize rows of it: in eager GRU's gates are changed in place, as parts of one tensor. A
    captured graph has them apart, and where a row is shorter than a vector torch rounds its sigmoid differently.
    """

    def __init__(self, kind: type[nn.Module], width: int, **options: Any) -> None:
        super().__init__()
        self.cell = kind(width, 64, batch_first=True, **options)
        self.back = nn.Linear(64 * (1 + options.get("bidirectional", False)), width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.cell(x)[0])
        return y


class SelfAttention(nn.Module):
    """torch's own module, with the sequence as query, key and value; returns weights too if asked to."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        _check_cast(self, x)
        y, weights = self.attention(x, x, x)
        out: Tensor = y + weights.mean()
        return out


class Attention(nn.Module):
    """Fused attention of one sequence over another (or itself)."""

    def __init__(self, width: int, *, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.query, self.both = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.dropout, self.causal = dropout, causal

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        query = _heads(self.query(x))
        key, value = map(_heads, self.both(x if other is None else other).chunk(2, -1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 2, -1).transpose(1, 2)


class Running(nn.Module):
    """Buffers that forward reads, changes and reads again."""

    mean: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x + self.mean)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.count += 1
        return torch.sin(y * self.mean)


class Twice(torch.autograd.Function):
    """Has a backward of its own, on purpose not the derivative: it shows whose backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = gradients[0] * x * 2
        return gradient

    @staticmethod
    def of(x: Tensor) -> Tensor:
        y: Tensor = Twice.apply(x)  # type: ignore[no-untyped-call]
        return y


class Loss(torch.autograd.Function):
    """A number whose gradient is a fixed random tensor, which nobody else holds; takes no memory in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.form = (x.shape, x.dtype)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        shape, dtype = ctx.form
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))

    @staticmethod
    def of(x: Tensor) -> Tensor:
        y: Tensor = Loss.apply(x)  # type: ignore[no-untyped-call]
        return y

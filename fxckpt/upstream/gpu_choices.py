"""What torch's composite functions choose on a GPU that is not there.

They ask the GPU and its libraries. Here are the rules that they follow, as torch's source has them, for CUDA 13 and
cuDNN 9.19, with which torch is built for it: `select_sdp_backend` in `native/transformers/cuda/sdp_utils.cpp`,
`scaled_dot_product_attention` in `native/transformers/attention.cpp`, `_select_batch_norm_backend` in
`native/Normalization.cpp`, `cudnn_conv_suggest_memory_format` in `native/ConvUtils.h`, and cells in `native/RNN.cpp`.
Where there is a GPU of the kind that is asked for, torch is asked itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from fxckpt.upstream.operators import OpOverload, python_kernels

aten = torch.ops.aten

_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
_HALF = (torch.float16, torch.bfloat16)

_CAPABILITIES = {
    "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "A800": (8, 0), "A30": (8, 0), "A10": (8, 6), "A40": (8, 6),
    "A6000": (8, 6), "3090": (8, 6), "4090": (8, 9), "L4": (8, 9), "L40": (8, 9), "6000 Ada": (8, 9), "H100": (9, 0),
    "H200": (9, 0), "H800": (9, 0), "GH200": (9, 0), "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3),
    "5090": (12, 0),
}  # fmt: skip


def capability_of(name: str) -> tuple[int, int] | None:
    """The compute capability of a GPU whose name contains one of those known here, else None."""
    known = [part for part in _CAPABILITIES if part in name]
    return _CAPABILITIES[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Attention:
    """A call of attention.

    Attributes:
        query, key, value, mask: shape (batch, heads, length, width); `mask` may be None.
        dropout: what portion of weights is dropped.
        causal: whether queries see what is before them alone.
        grouped: whether several heads of queries may share one of keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    grouped: bool

    @property
    def three(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


def attention_kernel(call: Attention, capability: tuple[int, int]) -> str:
    """Which kernel torch calls: "cudnn", "flash", "efficient" or "math"."""
    prefers_cudnn = capability[0] in (9, 10)
    order = ("cudnn", "flash", "efficient") if prefers_cudnn else ("flash", "efficient", "cudnn")
    if not _fits_all(call, capability):
        return "math"
    return next((name for name in order if _FITS[name](call, capability)), "math")


def _fits_all(call: Attention, capability: tuple[int, int]) -> bool:
    """What all fused kernels ask for."""
    if any(x.dim() != 4 for x in call.three) or capability < (5, 0):
        return False
    query, key, value = call.three
    if len({x.shape[0] for x in call.three}) > 1 or 0 in (query.shape[-2], key.shape[-2]):
        return False
    heads = query.shape[1], key.shape[1], value.shape[1]
    same = len(set(heads)) == 1
    return same or (call.grouped and heads[1] == heads[2] and heads[0] % heads[1] == 0)


def _last_dims_in_a_row(call: Attention, *, of_one_too: bool) -> bool:
    given = (*call.three, *(() if call.mask is None else (call.mask,)))
    return all(x.stride(-1) == 1 or (not of_one_too and x.shape[-1] == 1) for x in given)


def _is_half(call: Attention, capability: tuple[int, int]) -> bool:
    types = _HALF if capability >= (8, 0) else (torch.float16,)
    return len({x.dtype for x in call.three}) == 1 and call.query.dtype in types


def _fits_cudnn(call: Attention, capability: tuple[int, int]) -> bool:
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not torch._C._get_cudnn_sdp_enabled() or strict or capability < (8, 0) or not _is_half(call, capability):
        return False
    of_queries, of_values = call.query.shape[-1], call.value.shape[-1]
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    most = 192 if capability[0] in (9, 10) and (of_queries, of_values) == (192, 128) else 128
    return (
        max(of_queries, of_values) <= most
        and of_queries % 8 == of_values % 8 == 0
        and keys > 1
        and not (call.dropout and queries == 1)
        and _is_cudnn_mask(call)
        and _last_dims_in_a_row(call, of_one_too=False)
    )


def _is_cudnn_mask(call: Attention) -> bool:
    if call.mask is None:
        return True
    wanted = (*call.query.shape[:3], call.key.shape[2])
    fits = all(own in (1, size) for own, size in zip(call.mask.shape[::-1], wanted[::-1], strict=False))
    return not call.mask.requires_grad and call.mask.dim() in (2, 4) and fits


def _fits_flash(call: Attention, capability: tuple[int, int]) -> bool:
    widths = {x.shape[-1] for x in call.three}
    width = max(widths)
    of_games = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    too_wide = of_games and any(x.requires_grad for x in call.three) and width > 192
    return (
        bool(torch._C._get_flash_sdp_enabled())
        and call.mask is None
        and len(widths) == 1
        and width <= 256
        and capability >= (8, 0)
        and not (too_wide and (width <= 224 or call.dropout > 0))
        and not (call.causal and call.query.shape[-2] != call.key.shape[-2])
        and _is_half(call, capability)
        and _last_dims_in_a_row(call, of_one_too=False)
    )


def _fits_efficient(call: Attention, capability: tuple[int, int]) -> bool:
    types = (torch.float32, *(_HALF if capability >= (8, 0) else (torch.float16,)))
    if not torch._C._get_mem_efficient_sdp_enabled() or call.query.dtype not in types:
        return False
    half = call.query.dtype in _HALF
    alignment = (8 if half else 4) if capability >= (8, 0) else (8 if half and capability >= (7, 0) else 1)
    widths = call.query.shape[-1], call.key.shape[-1], call.value.shape[-1]
    return (
        len({x.dtype for x in call.three}) == 1
        and widths[0] == widths[1]
        and all(width > 0 and width % alignment == 0 for width in widths)
        and len({x.shape[1] for x in call.three}) == 1
        and _last_dims_in_a_row(call, of_one_too=True)
    )


_FITS: dict[str, Callable[[Attention, tuple[int, int]], bool]] = {
    "cudnn": _fits_cudnn,
    "flash": _fits_flash,
    "efficient": _fits_efficient,
}


def _attend(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, as its C++ has it."""
    call = Attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    kernel = attention_kernel(call, capability)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in call.three)
    mask = _as_bias(attn_mask, query)
    if kernel == "cudnn":
        options = {"scale": scale}
        return aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
            query, key, value, mask, trained, dropout_p, is_causal, False, **options
        )[0]
    if kernel == "flash":
        width = query.shape[-1]
        scale = width**-0.5 if scale is None else scale
        padded = [F.pad(x, (0, -width % 8)) if width % 8 else x for x in call.three]
        y: Tensor = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return y[..., :width] if width % 8 else y
    if kernel == "efficient":
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, mask, trained, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=query.dtype, device=mask.device))


def _aligned(bias: Tensor) -> Tensor:
    """With rows that begin at multiples of eight elements."""
    if bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1]):
        return bias
    length = bias.shape[-1]
    return F.pad(bias, (0, 8 - length % 8))[..., :length]


def conv_format(x: Tensor, weight: Tensor, _: Any) -> torch.memory_format:
    """The memory format that a convolution computes in, as `cudnn_conv_suggest_memory_format` has it."""
    given = [suggest_memory_format(y) for y in (x, weight)]
    if torch.float64 in (x.dtype, weight.dtype) or not torch._C._get_cudnn_enabled():
        return torch.contiguous_format
    return next((form for form in given if form is not torch.contiguous_format), torch.contiguous_format)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """`batch_norm`, as its C++ has it."""
    types = (x.dtype, None if weight is None else weight.dtype)
    fits = (
        cudnn_enabled
        and torch._C._get_cudnn_enabled()
        and weight is not None
        and bias is not None
        and torch.bfloat16 not in types
        and (x.dtype is not torch.float16 or weight.dtype is torch.float32)
        and (mean is None) == (var is None)
        and (mean is not None or training)
        and x.dim() >= 3
        and x.shape[0] <= (880_801 if training else 65_535)
        and x.numel() < 2**31 - 1
    )
    if not fits:
        return aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]  # type: ignore[no-any-return]
    x = x.contiguous(memory_format=suggest_memory_format(x))
    given = [None if y is None else y.contiguous() for y in (weight, bias, mean, var)]
    return aten.cudnn_batch_norm(x, *given, training, momentum, eps)[0]  # type: ignore[no-any-return]


def _lstm_cell(x: Tensor, hx: list[Tensor], w_ih: Tensor, w_hh: Tensor, *biases: Any) -> tuple[Tensor, Tensor]:
    gates, biases = (x @ w_ih.t(), hx[0] @ w_hh.t()), biases or (None, None)
    return aten._thnn_fused_lstm_cell(*gates, hx[1], *biases)[:2]  # type: ignore[no-any-return]


def _gru_cell(x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Any) -> Tensor:
    gates, biases = (x @ w_ih.t(), hx @ w_hh.t()), biases or (None, None)
    return aten._thnn_fused_gru_cell(*gates, hx, *biases)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def chosen_for(capability: tuple[int, int], on_gpu: Callable[[Tensor], bool]) -> Iterator[None]:
    """Composite functions choose as they do on a GPU of this compute capability, for tensors that are `on_gpu`."""

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _attend(capability, query, *args, **kwargs)

    choices: dict[OpOverload, Callable[..., Any]] = {
        aten.scaled_dot_product_attention.default: attend,
        aten.batch_norm.default: _normalize,
        aten.lstm_cell.default: _lstm_cell,
        aten.gru_cell.default: _gru_cell,
    }
    with contextlib.ExitStack() as stack:
        for op, choice in choices.items():
            kernels = op.py_kernels | dict.fromkeys(_KEYS, _for_those(on_gpu, op, choice))
            stack.enter_context(python_kernels(op, kernels))
        yield


def _for_those(on_gpu: Callable[[Tensor], bool], op: OpOverload, choice: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if on_gpu(x):
            return choice(x, *args, **kwargs)
        return op._op_dk(DispatchKey.CompositeImplicitAutograd, x, *args, **kwargs)

    return call

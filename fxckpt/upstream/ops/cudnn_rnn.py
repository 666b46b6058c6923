"""Recurrent layers by cuDNN: an op that runs a whole layer as eager torch does, and its backward.

Torch's layers look for the one piece of memory that all their weights lie in, and for the state of dropout that they
keep for the process, by addresses, which traced tensors don't have. So the kernel alone is traced, without either, and
these ops stand for it where it runs: they call the layer, and take what it gives to the kernel and gets from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxckpt.upstream.dispatch import TorchDispatchMode, backward_keeps_graph
from fxckpt.upstream.operators import argument_names
from fxckpt.upstream.ops.library import LIBRARY

aten = torch.ops.aten

KERNEL, KERNEL_BACKWARD = aten._cudnn_rnn.default, aten._cudnn_rnn_backward.default

LIBRARY.define(
    str(KERNEL._schema).removeprefix("aten::_"),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
LIBRARY.define(str(KERNEL_BACKWARD._schema).removeprefix("aten::_"), tags=(torch.Tag.pt2_compliant_tag,))

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""What cuDNN calls the kinds of layers."""

_LAYERS: dict[int, Callable[..., Any]] = {mode: getattr(aten, name).input for name, mode in MODES.items()}
_STATE_PLACE = argument_names(KERNEL).index("dropout_state")
_PLACES = {name: place for place, name in enumerate(argument_names(KERNEL_BACKWARD))}
_STATES: dict[torch.device, Tensor] = {}
"""The last state of dropout that torch gave to the kernel, by device: backward takes it, and does not read it."""


class _Watched(TorchDispatchMode):
    """Notes what the kernel returns, and the state of dropout that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: Any = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is KERNEL:
            self.results = results
            if args[_STATE_PLACE] is not None:
                _STATES[args[0].device] = args[_STATE_PLACE]
        return results


def _run(
    x: Tensor,
    weight: list[Tensor],
    per_layer: int,
    _: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    __: int,
    projected: int,
    layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *___: Any,
) -> tuple[Tensor, ...]:
    has_biases = per_layer - (projected > 0) == 4
    with _Watched() as watched:
        hidden = hx if cx is None else [hx, cx]
        _LAYERS[mode](x, hidden, weight, has_biases, layers, dropout, train, bidirectional, batch_first)
    return watched.results  # type: ignore[no-any-return]


def _run_backward(*args: Any) -> Any:
    """The kernel writes over what its forward reserved, which another backward may want."""
    given = list(args)
    given[_PLACES["dropout_state"]] = _STATES.get(args[0].device)
    if backward_keeps_graph():
        given[_PLACES["reserve"]] = given[_PLACES["reserve"]].clone()
    return KERNEL_BACKWARD(*given)


def describe(x: Tensor, weight: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """What the kernel returns. How large the fourth result is, which backward reads, shows in a run only.

    The last are the weights in one piece: as a rule they lie in one already.
    """
    _, _, hx, cx, _, hidden, projected, layers, batch_first, _, _, bidirectional, *_ = args
    directions = 2 if bidirectional else 1
    wide = (projected or hidden) * directions
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    output = x.new_empty(steps, batch, wide)
    if batch_first:
        output = output.transpose(0, 1)
    hy = hx.new_empty(layers * directions, batch, projected or hidden)
    cy = x.new_empty(0) if cx is None else cx.new_empty(layers * directions, batch, hidden)
    return output, hy, cy, x.new_empty(0, dtype=torch.uint8), _in_one_piece(weight)


def describe_backward(x: Tensor, weight: list[Tensor], *args: Any) -> tuple[Any, ...]:
    """What its backward returns. Gradients of weights are parts of one piece."""
    hx, cx, mask = args[2], args[3], args[-1]
    piece = weight[0].new_empty(sum(w.numel() for w in weight))
    parts = [part.view(w.shape) for part, w in zip(piece.split([w.numel() for w in weight]), weight, strict=True)]
    of_input = x.new_empty(x.shape) if mask[0] else None
    if of_input is not None and args[_PLACES["batch_first"] - 2]:
        of_input = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    of_hidden = hx.new_empty(hx.shape) if mask[1] else None
    of_cells = cx.new_empty(cx.shape) if mask[2] and cx is not None else None
    return of_input, of_hidden, of_cells, parts if mask[3] else []


def _in_one_piece(weight: Sequence[Tensor]) -> Tensor:
    elements = sum(w.numel() for w in weight)
    first = weight[0]
    if len({w.untyped_storage()._cdata for w in weight}) == 1:
        return first.as_strided((elements,), (1,))
    return first.new_empty(elements)


LIBRARY.impl("cudnn_rnn", _run, "CUDA")
LIBRARY.impl("cudnn_rnn", describe, "Meta")
LIBRARY.impl("cudnn_rnn_backward", _run_backward, "CUDA")
LIBRARY.impl("cudnn_rnn_backward", describe_backward, "Meta")

CUDNN_RNN = torch.ops.fxckpt.cudnn_rnn.default
CUDNN_RNN_BACKWARD = torch.ops.fxckpt.cudnn_rnn_backward.default


def layer(kind: str, x: Tensor, hidden: Any, weight: list[Tensor], *options: Any) -> tuple[Tensor, ...]:
    """What to trace for a layer: the kernel.

    Raises:
        NotImplementedError: under autocast, where torch moves the weights, too.
    """
    has_biases, layers, dropout, train, bidirectional, batch_first = options
    if torch.is_autocast_enabled("cuda") and x.dtype is not torch.float64:
        raise NotImplementedError(
            f"nn.{kind.partition('_')[0].upper()} under autocast on CUDA can't be captured: torch casts and moves its "
            "weights in one piece, by addresses. Call it within torch.autocast('cuda', enabled=False), or give it "
            "weights and inputs of the lower precision"
        )
    hx, cx = hidden if kind == "lstm" else (hidden, None)
    size = (hx if cx is None else cx).shape[-1]
    projected = hx.shape[-1] if hx.shape[-1] != size else 0
    per_layer = (4 if has_biases else 2) + (projected > 0)
    output, hy, cy, *_ = KERNEL(
        x, weight, per_layer, None, hx, cx, MODES[kind], size, projected, layers, batch_first, dropout, train,
        bidirectional, [], None,
    )  # fmt: skip
    return (output, hy, cy) if kind == "lstm" else (output, hy)

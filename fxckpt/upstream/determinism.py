"""Which ops draw random numbers, and which give other results when they run again.

Torch tags the first, also where they draw nothing. Of the second it has a list in the documentation of
`torch.use_deterministic_algorithms`: on CUDA they add up in the order in which threads happen to arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxckpt.upstream.operators import OpOverload, argument_names

aten = torch.ops.aten

_DROPOUTS = ("dropout_p", "dropout")
"""Arguments that say how much is dropped: where nothing is, nothing is drawn."""


def draws_random_numbers(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws from the random-number generator.

    Backwards of attention don't, though some are tagged: they are given the seed that their forward drew.
    """
    if torch.Tag.nondeterministic_seeded not in op.tags or op._opname.endswith("_backward"):
        return False
    for argument in op._schema.arguments:
        if argument.name in _DROPOUTS:
            return bool(argument_of(op, args, kwargs, argument.name))
    return True


def argument_of(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """What an op is given as the argument of this name, or its default."""
    place = argument_names(op).index(name)
    if place < len(args):
        return args[place]
    return kwargs.get(name, op._schema.arguments[place].default_value)


def may_differ_when_repeated(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], device: str) -> bool:
    """Whether a call, on a device of this kind, may give another result when it runs again on the same values."""
    if torch.Tag.nondeterministic_bitwise in op.tags:
        return True
    if op._opname == "cudnn_rnn":  # the state of its dropout is one for the process, and moves on
        return draws_random_numbers(op, args, kwargs)
    if device != "cuda":
        return False
    strict = torch.are_deterministic_algorithms_enabled()
    if strict and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False  # eager raises an error where there is no other way
    if op.overloadpacket in _NEVER_THE_SAME:
        return True
    condition = _THE_SAME_IF_ASKED.get(op.overloadpacket)
    return not strict and condition is not None and condition(op, args, kwargs)


def _always(*_: Any) -> bool:
    return True


def _is_transposed(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Its forward is a convolution's backward, for which cuDNN has kernels that add up in any order."""
    return not torch.backends.cudnn.deterministic and bool(argument_of(op, args, kwargs, "transposed"))


def _by_cudnn(*_: Any) -> bool:
    return not torch.backends.cudnn.deterministic


_THE_SAME_IF_ASKED: dict[Any, Callable[..., bool]] = {
    aten.convolution: _is_transposed,
    aten.convolution_backward: _by_cudnn,
    **dict.fromkeys(
        (
            aten.index_add, aten.index_copy, aten.index_put, aten._unsafe_index_put, aten.put, aten.scatter,
            aten.scatter_add, aten.scatter_reduce, aten.cumsum, aten.embedding_dense_backward,
        ),
        _always,
    ),
}  # fmt: skip
"""Ops with atomic additions, or writes in any order, that have another way where deterministic algorithms are on."""

_NEVER_THE_SAME = frozenset(
    {
        aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward, aten._ctc_loss_backward,
        aten._cudnn_ctc_loss, aten._embedding_bag_backward, aten._embedding_bag_dense_backward,
        aten._scaled_dot_product_cudnn_attention_backward, aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_flash_attention_backward, aten._upsample_bicubic2d_aa_backward,
        aten._upsample_bilinear2d_aa_backward, aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward,
        aten.avg_pool3d_backward, aten.bincount, aten.fractional_max_pool2d_backward,
        aten.fractional_max_pool3d_backward, aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward, aten.histc,
        aten.index_reduce, aten.kthvalue, aten.max_pool2d_with_indices_backward,
        aten.max_pool3d_with_indices_backward, aten.max_unpool2d, aten.max_unpool3d, aten.median, aten.nanmedian,
        aten.nll_loss2d_forward, aten.reflection_pad1d_backward, aten.reflection_pad2d_backward,
        aten.reflection_pad3d_backward, aten.replication_pad1d_backward, aten.replication_pad2d_backward,
        aten.replication_pad3d_backward, aten.upsample_bicubic2d_backward, aten.upsample_bilinear2d_backward,
        aten.upsample_linear1d_backward, aten.upsample_trilinear3d_backward,
    }
)  # fmt: skip
"""Ops that have no other way; where deterministic algorithms are on, they raise an error or, if asked to, warn."""

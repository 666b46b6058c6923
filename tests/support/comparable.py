"""Captured ops and those of eager torch, made comparable.

Left out are copies, views and memory without values, which captures have fewer of, and sizes of buffers in private
formats, which show in a run only. What captures split or say in other words is no difference; nor is the order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.support.dispatched import Called

_NO_VALUES = {
    "ones_like", "detach", "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "copy", "clone",
    "slice_scatter", "select_scatter", "as_strided_scatter", "lift_fresh", "contiguous", "resize", "set", "as_strided",
}  # fmt: skip
"""Copies and memory without values; and ones, which backward starts from in eager and is given otherwise."""

_ALSO_CALLED = {
    "_native_batch_norm_legit": "native_batch_norm",
    "_native_batch_norm_legit_functional": "native_batch_norm",
    "_native_batch_norm_legit_no_training": "native_batch_norm",
    "rrelu_with_noise_functional": "rrelu_with_noise",
    "_cudnn_rnn": "cudnn_rnn",
    "_cudnn_rnn_backward": "cudnn_rnn_backward",
}
_FIRST_RESULTS = {"native_batch_norm": 3, "cudnn_batch_norm": 3, "rrelu_with_noise": 1, "cudnn_rnn": 3}
"""Ops of which a capture has further results: what eager changes in place."""
_BY_RESULT = {"convolution_backward"}
"""Ops that captures call once for each of their results."""
_PARTS = {"dropout": ("bernoulli", "div", "mul"), "dropout_backward": ("mul",)}
"""What our own ops stand for."""
_LOSSES = {"mse_loss", "smooth_l1_loss", "soft_margin_loss", "binary_cross_entropy"}
"""Ops whose terms captures compute apart from their mean."""


OTHERWISE: dict[str, str] = {
    r"(LSTM|GRU|RNN).*": "sigmoid|tanh|add|mul|transpose"  # gates are changed in place, as parts of one tensor
    "|random|_local_scalar_dense|_cudnn_init_dropout_state",  # our op draws the first state of its dropout
    r".*one_hot.*": "aminmax|_local_scalar_dense|zeros|scatter|ge|all|expect",  # looks at values
    r".*gaussian_nll.*": "_local_scalar_dense|expect|any|lt",  # looks at values
    r"(attention|MultiheadAttention|Transformer).*": "_to_copy",  # weights of attention that nobody asked for
    r"index/.*(reduce|amax).*": "mul|div|eq|where|sum|masked_fill|index_select|gather",  # gradients nobody asked for
    r"activation/.*(29|30).*": "bernoulli|mul|add",  # draws in the order of memory
    r".*setitem.*": "lift_fresh_copy|index_put|fill|scalar_tensor",
}
"""Where captures differ from eager on purpose, and in which ops."""


def differences(ours: Sequence[Called], eager: Sequence[Called]) -> list[str]:
    """What is captured and not called in eager ("+"), or the other way round ("-"); nothing if all is the same."""
    found, expected = Counter(_comparable(ours)), Counter(_comparable(eager))
    for name in _LOSSES:
        split = min(found[f"{name} apart"], expected[name])
        found[f"{name} apart"] -= split
        expected[name] -= split
        _take_scalars(found, split)
    return [f"- {call}" for call in (expected - found).elements()] + [f"+ {c}" for c in (found - expected).elements()]


def _take_scalars(calls: Counter[str], count: int) -> None:
    """The means or sums of terms, which are part of a loss in eager."""
    for call in list(calls):
        if call.startswith(("mean ", "sum ")) and call.endswith("[]()"):
            taken = min(count, calls[call])
            calls[call] -= taken
            count -= taken


def _comparable(calls: Sequence[Called]) -> Iterator[str]:
    for call in calls:
        namespace, name, _ = call.op.split(".")
        name = name.removesuffix("_")
        name = _ALSO_CALLED.get(name, name)
        if call.note or name in _NO_VALUES:
            continue
        results = [form for form in call.results.split(" ") if not form.startswith("u8[")]
        results = results[: _FIRST_RESULTS.get(name)]
        if name == "cudnn_rnn_backward":  # those of hidden states are computed, wanted or not
            results = [results[0], *results[3:]]
        if namespace == "fxckpt" and name in _PARTS:
            yield from (f"{part} {results[0]}" for part in _PARTS[name])
        elif name in _LOSSES:
            yield f"{name} apart" if results[0].partition("[")[2][0] != "]" else name
        elif name in _BY_RESULT:
            yield from (f"{name} {number} {form}" for number, form in enumerate(results) if form != "-")
        else:
            yield " ".join((name, *results))


def unexpected(name: str, found: list[str]) -> list[str]:
    """The differences but for those that are known."""
    known = "|".join(ops for pattern, ops in OTHERWISE.items() if re.fullmatch(pattern, name))
    return [line for line in found if not (known and re.fullmatch(known, line.split(" ")[1]))]

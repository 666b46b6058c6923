"""Recurrent layers as one op on CUDA, as far as it can be seen without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxckpt.upstream.dispatch import TorchDispatchMode, plain_execution
from fxckpt.upstream.ops.cudnn_rnn import MODES, run_layer

KINDS = {"rnn_relu": nn.RNN, "rnn_tanh": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Seen(TorchDispatchMode):
    """Notes the names of ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODES)
def test_kernels_of_a_layer_are_seen_where_emitted_graphs_run(name: str) -> None:
    options = {"nonlinearity": name.removeprefix("rnn_")} if name.startswith("rnn_") else {}
    layer = KINDS[name](4, 4, **options)
    x, zeros = torch.randn(3, 2, 4), torch.zeros(1, 2, 4)
    hidden = [zeros, zeros] if name == "lstm" else zeros
    weights = [p.detach() for p in layer.parameters()]
    with torch.no_grad(), plain_execution(), Seen() as seen:
        output, *_ = run_layer(MODES[name], x, hidden, weights, True, 1, 0.0, True, False, False)
    with torch.no_grad():
        expected, *_ = layer(x)
    assert torch.equal(output, expected)
    assert not {f"aten::{name}.input"} & set(seen.names)
    assert len(seen.names) > 1  # on CUDA the kernel is among them

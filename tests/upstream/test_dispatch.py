"""What backward's engine tells, also in threads of its own."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fxckpt.upstream.dispatch import asked_gradients_of


def seen_by_another_thread(y: Tensor, **asked: Any) -> tuple[Any, ...]:
    """What a thread without a caller, as that of a device is, sees of a backward while it runs."""
    seen: list[tuple[Any, ...]] = []

    def look(_: Tensor) -> None:
        thread = threading.Thread(target=lambda: seen.append(asked_gradients_of()))
        thread.start()
        thread.join()

    y.register_hook(look)
    y.sum().backward(**asked)
    assert len(seen) == 1
    return seen[0]


def test_what_a_backward_was_asked_for_is_seen_from_every_thread() -> None:
    x, z = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    (found,) = seen_by_another_thread(x * z, inputs=[z])
    assert found is z
    edge = get_gradient_edge(x)
    assert seen_by_another_thread(x * z, inputs=[z, edge])[1] == edge
    assert seen_by_another_thread(x * z) == ()
    assert asked_gradients_of() == ()

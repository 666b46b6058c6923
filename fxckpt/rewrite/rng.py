"""Random ops, drawn once and drawn again the same: functions that emitted graphs call."""

from __future__ import annotations

from typing import Any

import torch

from fxckpt.errors import RuntimeContractError


def rng_state(device: str) -> torch.Tensor:
    """State of the device's default random-number generator, to repeat the op that draws next."""
    kind = torch.device(device)
    if kind.type == "cpu":
        return torch.get_rng_state()
    if kind.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeContractError(
                "recomputed random ops can't be captured in a CUDA graph; keep their outputs instead"
            )
        return torch.cuda.get_rng_state(kind)
    return torch.get_device_module(kind.type).get_rng_state(kind)  # type: ignore[no-any-return]


def run_with_rng_state(state: torch.Tensor, device: str, op: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a random op from a saved generator state; the generator itself is left as it was."""
    current = rng_state(device)
    set_rng_state(state, device)
    try:
        return op(*args, **kwargs)
    finally:
        set_rng_state(current, device)


def set_rng_state(state: torch.Tensor, device: str) -> None:
    """Set the state of the device's default random-number generator."""
    kind = torch.device(device)
    if kind.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(kind.type).set_rng_state(state, kind)

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
    current = KeptState(device)
    set_rng_state(state, device)
    try:
        return op(*args, **kwargs)
    finally:
        current.put_back()


class KeptState:
    """State of a device's default random-number generator, to be put back: not a tensor, which plans would count."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._state = bytearray(rng_state(device).numpy())

    def put_back(self) -> None:
        """Set the generator's state."""
        set_rng_state(torch.frombuffer(self._state, dtype=torch.uint8), self._device)


def set_rng_state(state: torch.Tensor, device: str) -> None:
    """Set the state of the device's default random-number generator."""
    kind = torch.device(device)
    if kind.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(kind.type).set_rng_state(state, kind)

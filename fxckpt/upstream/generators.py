"""Random-number generators belong to the process: what one thread does to them is undone without undoing others' draws.

So their state is not put back at the end of something, but only if this thread has moved them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import preserve_rng_state

from fxckpt.upstream.determinism import draws_random_numbers
from fxckpt.upstream.dispatch import TorchDispatchMode
from fxckpt.upstream.ops.rng import rng_state, set_rng_state
from fxckpt.upstream.patching import function_replaced, just_yield

_MOVE: tuple[Callable[..., Any], ...] = (
    torch.seed,
    torch.set_rng_state,
    torch.cuda.manual_seed,
    torch.cuda.manual_seed_all,
    torch.cuda.seed,
    torch.cuda.seed_all,
    torch.cuda.set_rng_state,
)
"""What moves a default generator, beside draws."""


@contextlib.contextmanager
def generators_kept(seeding: Callable[..., Any]) -> Iterator[None]:
    """What this thread's Python code does to the default generators is undone at the end; `torch.manual_seed` calls
    `seeding` instead.

    While a model is traced nothing draws: traced tensors hold no numbers.
    """
    before: list[list[torch.Tensor]] = []

    def noting(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not before:
            before.append(_states())
        return original(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(function_replaced(torch.manual_seed, lambda _, *args: seeding(*args)))
        stack.callback(lambda: _put_back(before[0]) if before else None)
        for function in _MOVE:
            stack.enter_context(function_replaced(function, noting))
        yield


@contextlib.contextmanager
def never_put_back() -> Iterator[None]:
    """Torch's own tracing does not put the states of generators back as they were when it began."""
    with function_replaced(preserve_rng_state, just_yield):
        yield


def random_states(devices: Iterable[torch.device]) -> dict[str, torch.Tensor]:
    """States of the default generators of the CPU and of some devices, by name."""
    names = sorted({str(device) for device in devices if device.type not in ("cpu", "meta")})
    return {name: rng_state(name) for name in ("cpu", *names)}


@contextlib.contextmanager
def draws_undone(devices: Iterable[torch.device]) -> Iterator[None]:
    """The default generators of the CPU and of some devices are afterwards as they were.

    Others are left alone: `torch.random.fork_rng` without devices touches those of all GPUs.
    """
    states = random_states(devices)
    try:
        yield
    finally:
        for name, state in states.items():
            set_rng_state(state, name)


def _states() -> list[torch.Tensor]:
    """Of the CPU's generator, and of those on CUDA."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _put_back(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class RandomDraw(Exception):  # noqa: N818 - it says what happened
    """Something would have drawn random numbers."""


class DrawsRefused(TorchDispatchMode):
    """Raises `RandomDraw` before an op draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws_random_numbers(func, args, kwargs or {}):
            raise RandomDraw(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))

"""What the device at hand can do, measured once: the rates of matrix products, copies and launches.

Data sheets give peaks, which a device reaches in no program and whose proportion differs from board to board, and they
know the devices of their day. Times are kept as those of ops are (see `known`), so a device is measured once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxckpt.errors import MeasuringWarning
from fxckpt.profile.clock import Clock, clock_of
from fxckpt.profile.devices import DEVICES, DeviceProfile, of_driver
from fxckpt.profile.known import KNOWN, kept_on
from fxckpt.profile.settings import settings, tf32_in_products
from fxckpt.profile.standalone import with_memory

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_EXPECTED_US = 500.0  # of all but launches: two of each are run in a row


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        side: rows and columns of the matrices; a fourth of it for float64, which some devices are slow at.
        copied_bytes: size of a copy within the device's memory; larger than its caches [B].
        host_bytes: size of a copy from the host's memory [B].
    """

    side: int = 4096
    copied_bytes: int = 2**28
    host_bytes: int = 2**26

    def side_of(self, dtype: torch.dtype) -> int:
        """Rows and columns of matrices of this type."""
        return self.side // 4 if dtype is torch.float64 else self.side


def profile_of(device: torch.device, file: Path | None, *, default: bool = False) -> DeviceProfile:
    """The profile of a CUDA device that is there, measured if that was not done before.

    Where there is not enough memory for that it is that of the data sheet, or an A100's for devices without one.

    Args:
        device: the device.
        file: where measured costs are kept, if anywhere.
        default: whether that is the file that nobody asked for.

    Raises:
        CostCacheError: the file that was named is damaged, or can't be read or written.
    """
    called = torch.cuda.get_device_name(device)
    known = of_driver(called)
    try:
        found_us = times_us(device, file, default=default)
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        instead = known or DEVICES["A100"]
        warnings.warn(
            f"the rates of {called} could not be measured ({error}): times are estimated with the data sheet of "
            f"{instead.name}",
            MeasuringWarning,
            stacklevel=2,
        )
        return instead
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return profile_from(called, found_us, Sizes(), memory_bytes, known)


def profile_from(
    name: str, times_us: dict[str, float], sizes: Sizes, memory_bytes: int, sheet: DeviceProfile | None
) -> DeviceProfile:
    """The profile that follows from times by the names that `work` gives [µs].

    What can't be measured on one device is that of its data sheet, if there is one. The rate of TF32 is that measured
    of float32 where TF32 is allowed, else half of bfloat16's, as it is in hardware.
    """
    flops_per_s = {
        str(dtype).removeprefix("torch."): 2 * sizes.side_of(dtype) ** 3 / (times_us[f"product in {dtype}"] * 1e-6)
        for dtype in _TYPES
    }
    flops_per_s["tf32"] = flops_per_s["float32"] if tf32_in_products() else flops_per_s["bfloat16"] / 2
    return DeviceProfile(
        name,
        flops_per_s,
        2 * sizes.copied_bytes / (times_us["copy"] * 1e-6),
        times_us["launch"],
        DEVICES["A100"].allocation_bytes,
        memory_bytes,
        sizes.host_bytes / (times_us["copy from the host"] * 1e-6),
        sheet.link_bytes_per_s if sheet else 0.0,
        source="measured here",
        blas_bytes=sheet.blas_bytes if sheet else 0,
    )


def times_us(device: torch.device, file: Path | None, *, default: bool = False) -> dict[str, float]:
    """How long each piece of `work` takes on a device, timed if that is not known yet [µs]."""
    keys = {f"rate: {name}": (f"rate: {name} on {device}", settings()) for name, _ in work(device, Sizes())}
    with kept_on(file, device, keys, default=default):
        if not all(key in KNOWN.times_us for key in keys.values()):
            found = with_memory(lambda: timed(device, Sizes(), clock_of(device)))
            KNOWN.times_us.update({keys[f"rate: {name}"]: found_us for name, found_us in found.items()})
    return {name.removeprefix("rate: "): KNOWN.times_us[key] for name, key in keys.items()}


def timed(device: torch.device, sizes: Sizes, clock: Clock) -> dict[str, float]:
    """How long each piece of `work` takes [µs]."""
    with torch.no_grad():
        for name, prepare in work(device, sizes):
            clock.time(name, prepare(), 1.0 if name == "launch" else _EXPECTED_US)
        return clock.finish()


def work(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """What is timed: by name, what makes it ready and gives what is to be run."""
    for dtype in _TYPES:
        yield f"product in {dtype}", lambda dtype=dtype: _product(device, dtype, sizes.side_of(dtype))  # type: ignore[misc]
    yield "copy", lambda: _copy(torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device), device)
    pinned = device.type == "cuda"
    yield (
        "copy from the host",
        lambda: _copy(torch.zeros(sizes.host_bytes, dtype=torch.uint8, pin_memory=pinned), device),
    )
    yield "launch", lambda: torch.zeros(1, device=device).neg_


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], Any]:
    """All numbers are not the same: a GPU is faster with such."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.empty(side, side, dtype=dtype, device=device).uniform_(-1, 1, generator=generator) for _ in range(2))
    result = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=result)


def _copy(source: torch.Tensor, device: torch.device) -> Callable[[], Any]:
    result = torch.empty(source.shape, dtype=source.dtype, device=device)
    return lambda: result.copy_(source, non_blocking=True)

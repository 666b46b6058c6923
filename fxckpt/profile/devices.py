"""What devices can do, as their vendors' data sheets say, and by which names they are asked for.

Rates are peaks, dense (without sparsity), so estimated times are lower bounds; what counts for a plan
is their proportion. Matrix products of float32 have the rate "tf32" only where the user has torch compute them so.
Links are counted in one direction, as data sheets don't always do. What takes a launch is in no data sheet: it is what
such devices are commonly seen to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxckpt.units import CUDA_BLOCK_BYTES


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do.

    Attributes:
        name: how it is called.
        flops_per_s: arithmetic by type of number; "float32" is the fall-back, "tf32" that of float32 where TF32 is
            allowed [1/s].
        bytes_per_s: memory traffic [B/s].
        launch_us: time that any op takes at least [µs].
        allocation_bytes: the allocator rounds sizes up to multiples of this [B].
        memory_bytes: its memory; 0 if that is not known [B].
        host_bytes_per_s: copies to or from the host's memory, in one direction; 0 if that is not known [B/s].
        link_bytes_per_s: copies to or from other devices, all links together, in one direction; 0 if there are no links
            of their own, or if that is not known [B/s].
        blas_bytes: what torch gives the library of matrix products to work in, for each thread, if it is not told
            otherwise [B].
        aliases: other names, and parts of names by which drivers call it.
        source: where the figures are from.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_us: float
    allocation_bytes: int = 1
    memory_bytes: int = 0
    host_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    aliases: tuple[str, ...] = ()
    source: str = ""
    blas_bytes: int = 0

    def is_called(self, name: str) -> bool:
        """Whether this is one of its names, however it is written."""
        return _plain(name) in map(_plain, (self.name, *self.aliases))


_PCIE_4, _PCIE_5 = 31.5e9, 63.0e9
"""Sixteen lanes of 16 or 32 GT/s at 128b/130b, in one direction [B/s]."""
_LAUNCH_US, _BLOCK_BYTES = 4.0, CUDA_BLOCK_BYTES
_BLAS = {"usual": 8 * 2**20 + 2**17, "Hopper, Blackwell": 2**25, "MI300": 2**27}  # torch's CublasHandlePool.cpp


def _tera(float32: float, tf32: float, half: float, float64: float, float8: float = 0.0) -> dict[str, float]:
    """Rates by type [1/s], given in TFLOP/s; `half` is for float16 and bfloat16."""
    rates = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half, "float64": float64}
    eights = {"float8_e4m3fn": float8, "float8_e5m2": float8} if float8 else {}
    return {name: 1e12 * rate for name, rate in (rates | eights).items()}


REFERENCE = DeviceProfile("reference", {"float32": 60e9}, 20e9, 2.0, source="made up: it asks no clock")

_PROFILES = (
    REFERENCE,
    DeviceProfile(
        "cpu",
        {"float32": 60e9, "bfloat16": 30e9, "float16": 20e9, "float64": 30e9},
        20e9,
        2.0,
        source='two cores of a common server; cost_model="measure" knows the real machine',
    ),
    DeviceProfile(
        "A100",
        _tera(19.5, 156, 312, 19.5),
        2.039e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        80 * 10**9,
        _PCIE_4,
        300e9,
        ("A100 80GB", "A100-SXM4-80GB", "A100 SXM"),
        "NVIDIA A100 Tensor Core GPU data sheet (A100 80GB SXM)",
        _BLAS["usual"],
    ),
    DeviceProfile(
        "H100",
        _tera(67, 494.7, 989.4, 67, 1978.9),
        3.35e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        80 * 10**9,
        _PCIE_5,
        450e9,
        ("H100 SXM", "H100 80GB HBM3", "H100 80GB"),
        "NVIDIA H100 Tensor Core GPU data sheet (H100 SXM)",
        _BLAS["Hopper, Blackwell"],
    ),
    DeviceProfile(
        "H200",
        _tera(67, 494.7, 989.4, 67, 1978.9),
        4.8e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        141 * 10**9,
        _PCIE_5,
        450e9,
        ("H200 SXM", "H200 141GB"),
        "NVIDIA H200 Tensor Core GPU data sheet (H200 SXM)",
        _BLAS["Hopper, Blackwell"],
    ),
    DeviceProfile(
        "B200",
        _tera(80, 1100, 2250, 40, 4500),
        8.0e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        180 * 10**9,
        _PCIE_5,
        900e9,
        ("B200 SXM", "HGX B200", "DGX B200"),
        "NVIDIA Blackwell Architecture Technical Brief (HGX B200), NVIDIA DGX B200 data sheet (memory)",
        _BLAS["Hopper, Blackwell"],
    ),
    DeviceProfile(
        "L40S",
        _tera(91.6, 183, 362.05, 1.43, 733),
        864e9,
        _LAUNCH_US,
        _BLOCK_BYTES,
        48 * 10**9,
        _PCIE_4,
        0.0,
        (),
        "NVIDIA L40S data sheet; float64 by the ratio of 1:64 of the NVIDIA Ada GPU Architecture white paper",
        _BLAS["usual"],
    ),
    DeviceProfile(
        "RTX 4090",
        _tera(82.6, 82.6, 165.2, 1.29, 330.3),
        1.008e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        24 * 10**9,
        _PCIE_4,
        0.0,
        ("GeForce RTX 4090", "4090"),
        "NVIDIA Ada GPU Architecture white paper, appendix A (sums kept in float32)",
        _BLAS["usual"],
    ),
    DeviceProfile(
        "RTX 5090",
        _tera(104.8, 104.8, 209.5, 1.64, 419),
        1.792e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        32 * 10**9,
        _PCIE_5,
        0.0,
        ("GeForce RTX 5090", "5090"),
        "NVIDIA RTX Blackwell GPU Architecture white paper, appendix A (sums kept in float32)",
        _BLAS["Hopper, Blackwell"],
    ),
    DeviceProfile(
        "MI300X",
        _tera(163.4, 653.7, 1307.4, 163.4, 2614.9),
        5.3e12,
        _LAUNCH_US,
        _BLOCK_BYTES,
        192 * 10**9,
        _PCIE_5,
        448e9,
        ("AMD Instinct MI300X", "Instinct MI300X"),
        "AMD Instinct MI300X Accelerator data sheet",
        _BLAS["MI300"],
    ),
)

DEVICES: dict[str, DeviceProfile] = {profile.name: profile for profile in _PROFILES}


def named(name: str) -> DeviceProfile | None:
    """The profile of a name or an alias, however it is written: "RTX 4090", "rtx4090"; None if there is none."""
    return next((profile for profile in _PROFILES if profile.is_called(name)), None)


def of_driver(name: str) -> DeviceProfile | None:
    """The profile of a device that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None for others.

    Variants of a device with another memory or link, such as "NVIDIA H100 PCIe", have the profile of the one listed.
    """
    words = name.replace("-", " ").split()
    return next((profile for profile in _PROFILES if _is_in(profile.name.split(), words)), None)


def _is_in(some: list[str], words: list[str]) -> bool:
    return any(words[i : i + len(some)] == some for i in range(len(words) - len(some) + 1))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().removeprefix("nvidia") if c.isalnum())

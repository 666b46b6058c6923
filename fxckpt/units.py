"""Bytes and microseconds, read and written the way people write them."""

from __future__ import annotations

import math
import re

from fxckpt.errors import BudgetError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
CUDA_BLOCK_BYTES = 512
"""What torch's allocator hands out on CUDA are multiples of this [B]."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes [B] of a size such as ``"8GB"`` (10⁹), ``"8GiB"`` (2³⁰) or ``"500 MB"``; fractions round down.

    >>> parse_bytes("1.5KiB")
    1536

    Raises:
        BudgetError: the text is not a positive number with a unit of bytes.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise BudgetError(
            f"can't read {text!r} as a size: write a number and one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, "
            'such as "8GB" or "500MiB"'
            + ("; for a fraction of the plain peak a float, such as 0.4" if "%" in text else "")
        )
    whole, _, fraction = match[1].partition(".")
    size_bytes = int(whole + fraction or "0") * factor // int(10 ** len(fraction))
    if size_bytes <= 0:
        raise BudgetError(f"a size must be at least one byte, but {text!r} is {size_bytes}")
    return size_bytes


def within(budget: str | int | float, peak_bytes: int, kept_bytes: int = 0) -> int:
    """Bytes [B] that a memory budget means: a size, a number of bytes, or a fraction of a peak.

    >>> within("2KB", 1000), within(700, 1000), within(0.5, 1000)
    (2000, 700, 500)

    Args:
        budget: what a user gave.
        peak_bytes: the peak [B].
        kept_bytes: a part of it that is always there, of which fractions are not taken: what libraries keep [B].

    Raises:
        BudgetError: it is not a size, not positive, or a fraction outside (0, 1].
    """
    if isinstance(budget, str):
        return parse_bytes(budget)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise BudgetError(f'a memory budget is a size such as "8GB", bytes, or a fraction, not {budget!r}')
    if isinstance(budget, int):
        if budget <= 0:
            raise BudgetError(f"a memory budget must be positive, not {budget} bytes")
        return budget
    if not 0 < budget <= 1:
        raise BudgetError(
            f"a memory budget of {budget!r}, a float, is a fraction of the plain model's peak and must be in (0, 1]; "
            'write bytes as an int or a text such as "8GB"'
        )
    return kept_bytes + int(budget * (peak_bytes - kept_bytes))


def block_bytes_on(kind: str, otherwise_bytes: int = 1) -> int:
    """The blocks that memory of a kind of device comes in: those of CUDA's allocator, elsewhere others [B].

    >>> block_bytes_on("cuda"), block_bytes_on("cpu")
    (512, 1)
    """
    return CUDA_BLOCK_BYTES if kind == "cuda" else otherwise_bytes


def whole_blocks(size_bytes: int, block_bytes: int) -> int:
    """A size rounded up to whole blocks [B]; nothing takes nothing.

    >>> whole_blocks(513, CUDA_BLOCK_BYTES), whole_blocks(0, CUDA_BLOCK_BYTES)
    (1024, 0)
    """
    return -(-size_bytes // block_bytes) * block_bytes


def format_bytes(size_bytes: int) -> str:
    """A size with a binary unit and three or four digits.

    >>> format_bytes(1536), format_bytes(73_400_320)
    ('1.50 KiB', '70.0 MiB')
    """
    sign = "-" if size_bytes < 0 else ""
    value = abs(float(size_bytes))
    if value < 1024:
        return f"{size_bytes} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.5 or unit == "TiB":
            break
    digits = max(0, 2 - int(math.log10(max(value, 1))))
    return f"{sign}{value:.{digits}f} {unit}"


def format_us(time_us: float) -> str:
    """A time with three or four digits.

    >>> format_us(950.0), format_us(12_340.0), format_us(2.5e6)
    ('950 µs', '12.3 ms', '2.50 s')
    """
    value, unit = time_us, "µs"
    if abs(time_us) >= 1e6:
        value, unit = time_us / 1e6, "s"
    elif abs(time_us) >= 1e3:
        value, unit = time_us / 1e3, "ms"
    digits = max(0, 2 - int(math.log10(max(abs(value), 1))))
    return f"{value:.{digits}f} {unit}"

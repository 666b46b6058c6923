import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxckpt import units
from fxckpt.errors import BudgetError
from fxckpt.units import format_bytes, format_us, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("512B", 512),
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("500 MB", 500 * 10**6),
        (" 1.5kib ", 1536),
        (".5TB", 5 * 10**11),
        ("2.TiB", 2 * 2**40),
        ("0.0015KB", 1),
        ("10.7", 10),
    ],
)
def test_sizes_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", " ", "GB", "-1GB", "0", "0.4B", "1 GiBB", "8G", "1e9", "1,5GB", "1.2.3MB", "nan", "inf", "8\nGB GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_bytes(text)


def test_the_message_names_the_text_and_the_remedy() -> None:
    with pytest.raises(BudgetError, match=r"'eight gigs'.*such as \"8GB\""):
        parse_bytes("eight gigs")


@given(st.integers(1, 10**18))
def test_a_number_of_bytes_reads_as_itself(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == parse_bytes(f"{size_bytes} B") == size_bytes


@given(st.integers(1, 10**9), st.integers(0, 999))
def test_fractions_are_exact(whole: int, thousandths: int) -> None:
    assert parse_bytes(f"{whole}.{thousandths:03}GB") == whole * 10**9 + thousandths * 10**6


@given(st.integers(-(2**50), 2**50))
def test_what_is_printed_is_within_half_a_percent(size_bytes: int) -> None:
    text = format_bytes(size_bytes)
    number, unit = text.split(" ")
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert math.isclose(float(number) * factor, size_bytes, rel_tol=0.005)
    assert len(number.lstrip("-").replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (-5, "-5 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (-1536, "-1.50 KiB"), (2**20 - 1, "1.00 MiB")],
)
def test_byte_formats(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("time_us", "text"),
    [(0.0, "0.00 µs"), (1.25, "1.25 µs"), (-2.0, "-2.00 µs"), (59.9e6, "59.9 s"), (1234.0, "1.23 ms")],
)
def test_time_formats(time_us: float, text: str) -> None:
    assert format_us(time_us) == text


@given(st.floats(-1e15, 1e15))
def test_times_print_within_half_a_percent(time_us: float) -> None:
    number, unit = format_us(time_us).split(" ")
    assert math.isclose(float(number) * {"µs": 1, "ms": 1e3, "s": 1e6}[unit], time_us, rel_tol=0.005, abs_tol=0.005)


def test_examples_in_the_documentation() -> None:
    result = doctest.testmod(units)
    assert result.attempted >= 3
    assert result.failed == 0

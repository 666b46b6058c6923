"""Records as columns of plain values, and back; what a file has in them is checked by the annotations of the fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

_MOST_BYTES = 2**46
"""A larger size is a damaged file; sums over all storages and ops of a file that can be read fit 64 bits."""


def columns(kind: type[Record], records: Iterable[Record]) -> dict[str, list[Any]]:
    """For each field of a class of records what they have in it."""
    rows = tuple(records)
    return {field.name: [getattr(record, field.name) for record in rows] for field in fields(kind)}


def records(kind: type[Record], data: Mapping[str, Any]) -> tuple[Record, ...]:
    """The records that such columns describe.

    Raises:
        KeyError: a column is missing.
        ValueError: columns are of unequal length, or a value is none that its field can have.
    """
    names = [field.name for field in fields(kind)]
    rows = zip(*(data[name] for name in names), strict=True)
    return tuple(kind(**valid(kind, dict(zip(names, row, strict=True)))) for row in rows)


def valid(kind: type[Record], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields, lists made tuples.

    Raises:
        ValueError: a value is none that its field can have.
    """
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    tests = _tests(kind)
    for name, value in frozen.items():
        if not tests[name](value):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}")
    return frozen


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_BYTES


_TESTS: dict[Any, Callable[[Any], bool]] = {
    int: _is_count,
    float: lambda value: type(value) in (int, float) and 0 <= value <= 1e18,
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    tuple[int, ...]: lambda value: type(value) is tuple and all(map(_is_count, value)),
}
"""By annotation: whether a value may become a field."""


@cache
def _tests(kind: type[Record]) -> dict[str, Callable[[Any], bool]]:
    """For each field that may come from a file whether a value fits it."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    plain = {name: _TESTS[hints[name]] for name in names if hints[name] in _TESTS}
    return plain | {name: _one_of(get_args(hints[name])) for name in names if get_origin(hints[name]) is Literal}


def _one_of(values: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and value in values

"""Dataclasses that print themselves as short as they can be written."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any


class Described:
    """Base of dataclasses whose representation leaves out what has its default value."""

    def __repr__(self) -> str:
        own: tuple[Field[Any], ...] = fields(self)  # type: ignore[arg-type]
        given = [(f, getattr(self, f.name)) for f in own]
        required = [repr(value) for f, value in given if f.default is MISSING]
        changed = [f"{f.name}={value!r}" for f, value in given if f.default is not MISSING and value != f.default]
        return f"{type(self).__name__}({', '.join((*required, *changed))})"

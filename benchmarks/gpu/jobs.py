"""What is measured, in the order of its importance: each job runs in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.models.cases import CASES, FULL

KINDS = ("correctness", "frontier", "limit", "host", "planning")

TYPES = ("float32", "bf16")


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        kind: which function of `benchmarks/gpu/worker.py` makes it.
        settings: its arguments.
        is_alone: whether nothing else may run meanwhile, since it takes times.
        timeout_s: how long it may take [s].
        is_reported: whether its figures are a row; else it only prepares for others.
    """

    kind: str
    settings: dict[str, Any] = field(hash=False)
    is_alone: bool
    timeout_s: float
    is_reported: bool = True

    @property
    def name(self) -> str:
        """What it is, the same in every run."""
        return f"{self.kind} {json.dumps(self.settings, sort_keys=True)}"

    def __str__(self) -> str:
        return " ".join((self.kind, *(f"{value}" for value in self.settings.values())))


def jobs(*, quick: bool = False) -> Iterator[Job]:
    """All jobs, the most important first."""
    yield from correctness([case.name for case in CASES], (0.6,) if quick else (0.8, 0.6))
    if not quick:
        yield from correctness([case.name for case in FULL], (0.6,))


def correctness(cases: list[str], budgets: tuple[float, ...]) -> Iterator[Job]:
    """Bits and peaks: some at once, since no times are taken. The first budget is tried with deterministic kernels."""
    for budget in budgets:
        for case in cases:
            for types in TYPES:
                settings = {"case": case, "types": types, "budget": budget, "deterministic": budget == budgets[0]}
                yield Job("correctness", settings, is_alone=False, timeout_s=150)

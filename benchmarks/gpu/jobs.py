"""What is measured, in the order of its importance: each job runs in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.models.cases import CASES, FULL, Case
from fxckpt.options import OptimizeOptions

CUDA_GRAPHS = "cuda_graphs"
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
    """

    kind: str
    settings: dict[str, Any] = field(hash=False)
    is_alone: bool
    timeout_s: float

    @property
    def name(self) -> str:
        """What it is, the same in every run."""
        return f"{self.kind} {json.dumps(self.settings, sort_keys=True)}"

    def __str__(self) -> str:
        return " ".join((self.kind, *(f"{value}" for value in self.settings.values() if value is not None)))


Way = tuple[str, float | str | None]
"""A way to save memory, and its budget: see `benchmarks/gpu/timing.py`."""

GPT_WAYS: tuple[Way, ...] = (
    ("eager", None),
    ("fxckpt", 1.0),
    ("checkpoint", None),
    ("compile", 1.0),
    ("compiled checkpoint", None),
    ("fxckpt", "floor"),
    ("fxckpt", 0.8),
    ("selective", None),
    ("compile", 0.5),
    ("fxckpt", 0.6),
    ("fxckpt", 0.4),
    ("compile", 0.7),
    ("compile", 0.3),
)
QUICK_WAYS = 7
OTHER_WAYS: tuple[Way, ...] = (
    ("fxckpt", "floor"),
    ("checkpoint", None),
    ("fxckpt", 0.8),
    ("compile", 1.0),
    ("compiled checkpoint", None),
    ("fxckpt", 1.0),
    ("fxckpt", 0.6),
    ("selective", None),
    ("compile", 0.5),
)
HOST_MODELS = ("gpt", "gpt12", "resnet50", "llama6")


def jobs(*, quick: bool = False) -> Iterator[Job]:
    """All jobs, the most important first. Quick: fewer of each kind."""
    compiled = [way for way in GPT_WAYS[: QUICK_WAYS if quick else None] if "compile" in way[0]]
    yield from correctness(CASES, 0.6, deterministic=True)
    yield from (_prepare("gpt", *way) for way in compiled)
    yield from frontier("gpt", GPT_WAYS[: QUICK_WAYS if quick else None])
    yield _alone("limit", {"subject": "gpt", "fraction": 0.8})
    yield from planning("llama")
    yield from (_alone("host", {"model": model, "budget": None}) for model in HOST_MODELS)
    if quick:
        return
    yield from planning("resnet50")
    yield from correctness(CASES, 0.8, deterministic=False)
    yield from frontier("llama", OTHER_WAYS)
    yield _alone("limit", {"subject": "llama", "fraction": 0.8})
    yield from frontier("resnet50", OTHER_WAYS)
    yield _alone("limit", {"subject": "resnet50", "fraction": 0.8})
    yield _alone("host", {"model": "gpt", "budget": 0.8})
    yield from correctness(FULL, 0.6, deterministic=True)


def correctness(cases: Iterable[Case], budget: float, *, deterministic: bool) -> Iterator[Job]:
    """Bits and peaks: some at once, since no times are taken."""
    for case in cases:
        for types in TYPES:
            settings = {"case": case.name, "types": types, "budget": budget, "deterministic": deterministic}
            yield Job("correctness", settings, is_alone=False, timeout_s=150)


def frontier(subject: str, ways: Iterable[Way]) -> Iterator[Job]:
    """Peak and time of each way; those of fxckpt with CUDA graphs, too, if it has that option."""
    for way, budget in ways:
        settings = {"subject": subject, "way": way, "budget": budget}
        yield _alone("frontier", settings)
        if way == "fxckpt" and CUDA_GRAPHS in OptimizeOptions.__annotations__:
            yield _alone("frontier", {**settings, "options": {CUDA_GRAPHS: True}})


def planning(subject: str) -> Iterator[Job]:
    """The first call, twice: the second finds what the first one measured."""
    for cache in ("cold", "warm"):
        yield _alone("planning", {"subject": subject, "budget": 0.8, "cache": cache})


def _alone(kind: str, settings: dict[str, Any]) -> Job:
    return Job(kind, settings, is_alone=True, timeout_s=120)


def _prepare(subject: str, way: str, budget: float | str | None) -> Job:
    settings = {"subject": subject, "way": way, "budget": budget}
    return Job("prepare", settings, is_alone=False, timeout_s=200)

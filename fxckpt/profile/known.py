"""What has been measured: for the life of the process, and longer in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from fxckpt.capture.nodes import device
from fxckpt.profile import cost_cache
from fxckpt.profile.build import op_form
from fxckpt.profile.private import Sizes
from fxckpt.profile.settings import settings

Key = tuple[str, str]
"""The form of an op, and the settings that its cost depends on."""


@dataclass(frozen=True)
class Known:
    """What has been measured.

    Attributes:
        times_us: how long ops take [µs].
        workspace_bytes: what they allocate inside [B].
        private_sizes: sizes of what they return, where it is traced as empty.
        refused: ops that can't be run by themselves.
        files: what files hold for machines, with the time of their last change [ns].
    """

    times_us: dict[Key, float] = field(default_factory=dict)
    workspace_bytes: dict[Key, int] = field(default_factory=dict)
    private_sizes: dict[Key, Sizes] = field(default_factory=dict)
    refused: set[Key] = field(default_factory=set)
    files: dict[tuple[Path, str], tuple[int, cost_cache.Costs]] = field(default_factory=dict)

    def forget(self) -> None:
        """As if nothing had been measured yet."""
        for table in vars(self).values():
            table.clear()

    def of(self, key: Key) -> dict[str, float]:
        """The cost of an op, as files have it."""
        tables = (("time_us", self.times_us), ("workspace_bytes", self.workspace_bytes))
        return {name: table[key] for name, table in tables if key in table}


KNOWN = Known()
"""What this process has measured, and read."""


def key_of(node: fx.Node) -> Key:
    """What the cost of an op is known by."""
    return op_form(node), settings()


@contextlib.contextmanager
def kept(file: Path | None, nodes: Sequence[fx.Node], *, default: bool = False) -> Iterator[None]:
    """Costs are known that a file holds; what is measured meanwhile for `nodes` is added to it.

    Args:
        file: the file, if there is one.
        nodes: the ops of a step.
        default: whether it is the file that nobody asked for, see `cost_cache`.

    Raises:
        CostCacheError: the file is damaged, or can't be read or written.
    """
    places: dict[torch.device, dict[str, Key]] = {}
    for node in nodes if file is not None else ():
        key = key_of(node)
        places.setdefault(device(node), {})[cost_cache.without_index(key[0])] = key
    with contextlib.ExitStack() as stack:
        for place, keys in places.items():
            stack.enter_context(kept_on(file, place, keys, default=default))
        yield


@contextlib.contextmanager
def kept_on(file: Path | None, place: torch.device, keys: dict[str, Key], *, default: bool) -> Iterator[None]:
    """The same for what is measured on one device, by the names under which the file has it."""
    if file is None:
        yield
        return
    machine = cost_cache.machine_name(place)
    held = _read(file, machine, keys, default=default)
    before = {key: KNOWN.of(key) for key in keys.values()}
    yield
    costs = {form: KNOWN.of(key) for form, key in keys.items()}
    fresh = {f: cost for f, cost in costs.items() if cost != before[keys[f]] or cost.keys() - held.get(f, {}).keys()}
    if fresh:
        cost_cache.write(file, machine, fresh, default=default)


def _read(file: Path, machine: str, keys: dict[str, Key], *, default: bool) -> cost_cache.Costs:
    """Learn what a file holds of some ops. What this process has measured itself stays.

    Returns:
        All that the file holds.
    """
    changed_ns = file.stat().st_mtime_ns if file.exists() else 0
    seen_ns, costs = KNOWN.files.get((file, machine), (0, {}))
    if changed_ns == 0 or changed_ns != seen_ns:
        costs = cost_cache.read(file, machine, default=default)
        KNOWN.files[file, machine] = changed_ns, costs
    for form, key in keys.items():
        cost = costs.get(form, {})
        if "time_us" in cost:
            KNOWN.times_us.setdefault(key, float(cost["time_us"]))
        if "workspace_bytes" in cost:
            KNOWN.workspace_bytes.setdefault(key, int(cost["workspace_bytes"]))
    return costs

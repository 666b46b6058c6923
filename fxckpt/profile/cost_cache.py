"""Measured costs in a JSON file, from one process to the next: by machine, torch version, threads, and op signature.

A file is read as a whole and checked number by number; what was measured on another machine is kept in it but not used.
It is written beside its place and then moved there, so a reader never sees half of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fxckpt.errors import CostCacheError

_FORMAT = 1

Costs = dict[str, dict[str, float]]
"""By op signature: "time_us" [µs] and "workspace_bytes" [B], as far as measured."""


def machine_name(device: torch.device) -> str:
    """What measured costs depend on beside the op: the device, the version of torch, the number of threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def read(file: Path, machine: str) -> Costs:
    """The costs that a file holds for a machine; none if there is no such file.

    Raises:
        CostCacheError: the file can't be read, or is not what `write` writes.
    """
    return _read(file).get(machine, {})


def write(file: Path, machine: str, costs: Mapping[str, Mapping[str, float]]) -> None:
    """Add costs to a file; what it holds about other ops and machines stays.

    Raises:
        CostCacheError: the file there is damaged, or can't be written.
    """
    machines = _read(file)
    known = machines.setdefault(machine, {})
    for signature, cost in costs.items():
        known[signature] = {**known.get(signature, {}), **cost}
    text = json.dumps({"fxckpt_costs": _FORMAT, "machines": machines}, indent=1, sort_keys=True, allow_nan=False)
    try:
        with _replacing(file) as part:
            part.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CostCacheError(f"can't write the cost cache {file}: {error.strerror}") from error


def _read(file: Path) -> dict[str, Costs]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CostCacheError(f"can't read the cost cache {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "it is not JSON") from error
    if not isinstance(data, dict) or data.get("fxckpt_costs") != _FORMAT:
        raise _damaged(file, f"it does not say that it holds costs (format {_FORMAT})")
    machines = data.get("machines")
    if not isinstance(machines, dict) or not all(isinstance(costs, dict) for costs in machines.values()):
        raise _damaged(file, "it has no table of machines")
    for machine, costs in machines.items():
        wrong = next((signature for signature, cost in costs.items() if not _is_cost(cost)), None)
        if wrong is not None:
            raise _damaged(file, f"the cost of {wrong} on {machine} is {costs[wrong]!r}")
    return machines


def _is_cost(cost: Any) -> bool:
    if not isinstance(cost, dict) or not cost.keys() <= {"time_us", "workspace_bytes"}:
        return False
    time_us, workspace_bytes = cost.get("time_us", 0.0), cost.get("workspace_bytes", 0)
    return (
        type(time_us) in (int, float)
        and math.isfinite(time_us)
        and time_us >= 0
        and type(workspace_bytes) is int
        and workspace_bytes >= 0
    )


def _damaged(file: Path, why: str) -> CostCacheError:
    return CostCacheError(f"{file} is not a cost cache, or damaged: {why}. Delete it, or name another file")


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A new file that takes the place of `file` in one move when it is complete."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _processor() -> str:
    """The processor's model, as Linux names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

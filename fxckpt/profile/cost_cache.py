"""Measured costs in a JSON file, from one process to the next: by machine, torch version, settings, and op.

A file is read as a whole and checked number by number; what was measured on another machine is kept in it but not used.
It is written beside its place and then moved there, so a reader never sees half of it, and processes that write at the
same time wait for each other. By default it lies in the user's folder for such files, and then it is a convenience that
must not stand in anyone's way: a damaged one is replaced, and where none can be written nothing is kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fxckpt.errors import CostCacheError, MeasuringWarning
from fxckpt.profile.settings import settings

_FORMAT = 1
_MOST_KEPT = 20_000  # ops for each machine; those that were measured first go first
FOLDER_VARIABLE = "FXCKPT_CACHE_DIR"
"""The environment variable that names the folder of the default file; set to nothing, no file is used by default."""

Costs = dict[str, dict[str, float]]
"""By op: "time_us" [µs] and "workspace_bytes" [B], as far as measured."""


def default_file() -> Path | None:
    """Where costs are kept if nobody says where: in the user's folder for what can be had again; None for nowhere."""
    if (named := os.environ.get(FOLDER_VARIABLE)) is not None:
        return Path(named) / "costs.json" if named else None
    try:
        if sys.platform == "win32":
            folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home
        return None
    return folder / "fxckpt" / "costs.json"


def machine_name(device: torch.device) -> str:
    """What measured costs depend on beside the op: the device, the version of torch, settings such as threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, torch {torch.__version__}, {settings()}"


def without_index(form: str) -> str:
    """The form of an op on any of several devices of a kind: each process of a job has another.

    >>> without_index("aten.t.default((f32[2, 3][3, 1]@cuda:1,), {'device': device(type='cuda', index=1)})")
    "aten.t.default((f32[2, 3][3, 1]@cuda,), {'device': device(type='cuda')})"
    """
    return re.sub(r"(@\w+):\d+|(device\(type='\w+'), index=\d+\)", lambda m: m[1] or f"{m[2]})", form)


def read(file: Path, machine: str, *, default: bool = False) -> Costs:
    """The costs that a file holds for a machine; none if there is no such file.

    Args:
        file: the file.
        machine: as `machine_name` says.
        default: whether it is the file that nobody asked for: then it is at worst of no use.

    Raises:
        CostCacheError: the file can't be read, or is not what `write` writes.
    """
    return _read(file, default=default).get(machine, {})


def write(file: Path, machine: str, costs: Mapping[str, Mapping[str, float]], *, default: bool = False) -> None:
    """Add costs to a file; what it holds about other ops and machines stays.

    Raises:
        CostCacheError: the file there is damaged, or can't be written.
    """
    try:
        if default:
            file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.parent), _replacing(file) as part:
            part.write_text(_added(_read(file, default=default), machine, costs), encoding="utf-8")
    except OSError as error:
        if not default:
            raise CostCacheError(f"can't write the cost cache {file}: {error.strerror}") from error


def _added(machines: dict[str, Costs], machine: str, costs: Mapping[str, Mapping[str, float]]) -> str:
    known = machines.setdefault(machine, {})
    for op, cost in costs.items():
        known[op] = {**known.pop(op, {}), **cost}
    machines[machine] = dict(list(known.items())[-_MOST_KEPT:])
    return json.dumps({"fxckpt_costs": _FORMAT, "machines": machines}, allow_nan=False) + "\n"


def _read(file: Path, *, default: bool) -> dict[str, Costs]:
    try:
        return _checked(file)
    except OSError as error:
        if default:
            return {}
        raise CostCacheError(f"can't read the cost cache {file}: {error.strerror}") from error
    except _DamagedError as error:
        said = f"{file} is not a cost cache, or damaged: {error}"
        if not default:
            raise CostCacheError(f"{said}. Delete it, or name another file") from error
        warnings.warn(f"{said}. Ops are measured again, and it is written anew", MeasuringWarning, stacklevel=2)
        return {}


class _DamagedError(Exception):
    """What is wrong with a file."""


def _checked(file: Path) -> dict[str, Costs]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise _DamagedError("it is not JSON") from error
    if not isinstance(data, dict) or data.get("fxckpt_costs") != _FORMAT:
        raise _DamagedError(f"it does not say that it holds costs (format {_FORMAT})")
    machines = data.get("machines")
    if not isinstance(machines, dict) or not all(isinstance(costs, dict) for costs in machines.values()):
        raise _DamagedError("it has no table of machines")
    for machine, costs in machines.items():
        wrong = next((op for op, cost in costs.items() if not _is_cost(cost)), None)
        if wrong is not None:
            raise _DamagedError(f"the cost of {wrong} on {machine} is {costs[wrong]!r}")
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


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes to a folder meanwhile, where the system has locks; without them the last one wins."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)  # which also gives the lock back
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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

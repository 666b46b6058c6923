"""One measurement in this process: read as a line of JSON, its figures are written to the file that it names.

The process is started ahead, imports all that is needed, and waits. It never touches a GPU before it has its job.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import fxckpt.api  # noqa: F401 (ahead of its first use)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.limits import limit, planning
from benchmarks.gpu.timing import frontier, host, prepare


def machine(bench: Bench) -> dict[str, Any]:
    """What figures are taken with."""
    found = {
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU ({platform.machine()})",
        "size": "tiny" if bench.tiny else "full",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if bench.device == "cuda":
        found["device memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"
    return found


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": machine,
    "correctness": correctness,
    "frontier": frontier,
    "prepare": prepare,
    "host": host,
    "limit": limit,
    "planning": planning,
}


def measured(kind: str, settings: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The figures of a measurement, or the error that it raised and where."""
    try:
        return {"status": "done", **MEASUREMENTS[kind](bench, **settings)}
    except Exception as error:
        trace = "".join(traceback.format_exception(error)[-6:])
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600], "trace": trace[-3000:]}


def write(path: Path, text: str) -> None:
    """Write a file as a whole: a reader sees the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    line = sys.stdin.readline()
    if not line:  # it was not needed
        return
    task = json.loads(line)
    folder = None if task["folder"] is None else Path(task["folder"])
    bench = Bench(task["device"], task["tiny"], folder)
    write(Path(task["result"]), json.dumps(measured(task["kind"], task["settings"], bench)))


if __name__ == "__main__":
    main()

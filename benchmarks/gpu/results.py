"""Results in a folder: `results.json`, rewritten as a whole after each job, and `results.md` made of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.report import page
from benchmarks.gpu.worker import write

ROOT = Path(__file__).parents[2]
RESULTS = "results.json"


class Results:
    """The rows of all jobs so far, earlier runs on the same machine included: a job that ran again has its new row."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS
        self.data = read(self._path)
        self._source = source()

    def told(self, machine: dict[str, Any]) -> None:
        """Note the machine. Rows of another one are dropped."""
        if self.data["machine"] != machine:
            self.data = {"machine": machine, "rows": []}
        self._write()

    def add(self, job: Job, row: dict[str, Any]) -> None:
        """Note what came of a job. What was measured is not replaced by something that was not run."""
        rows = self.data["rows"]
        index = next((i for i, known in enumerate(rows) if known["job"] == job.name), len(rows))
        if row["status"] == "not run" and index < len(rows):
            return
        named = {"job": job.name, "kind": job.kind, "settings": job.settings, "source": self._source, **row}
        rows[index : index + 1] = [named]
        self._write()

    def _write(self) -> None:
        write(self._path, json.dumps(self.data, indent=1) + "\n")
        write(self._path.with_suffix(".md"), page(self.data))


def read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none."""
    if not path.exists():
        return {"machine": {}, "rows": []}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def source() -> str:
    """A name for the code that was measured: the start of a hash of fxckpt's modules."""
    files = sorted((ROOT / "fxckpt").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]

"""Jobs in processes of their own, until all are done or the time is up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.jobs import Job

_POLL_S = 0.02
_GRACE_S = 1.0
_TAIL = 1500
"""So many characters of a failed process's output are kept."""

Row = dict[str, Any]


@dataclass
class _Worker:
    """A process that waits for a job, or works on one; `printed` is the end of what it printed, once it has ended."""

    process: subprocess.Popen[str]
    log: IO[bytes]
    result: Path
    job: Job | None = None
    started_s: float = 0.0
    ends_s: float = 0.0
    printed: str = ""

    def stop(self) -> None:
        """End it with all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # a compiler that it runs removes what is half written
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # it leads a group of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_S)
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

        if not self.log.closed:
            self.log.seek(0)
            self.printed = self.log.read().decode(errors="replace")[-_TAIL:]
            self.log.close()


@dataclass
class Scheduler:
    """Runs jobs in their order: several at once, but those that are to be alone by themselves.

    Attributes:
        command: starts a worker, which reads a job from its input and writes figures to a file (see `worker`).
        task: what every worker is told beside its job.
        parallel: how many run at once.
        report: called with the row of each job as soon as it is there.
    """

    command: Sequence[str]
    task: dict[str, Any]
    parallel: int
    report: Callable[[Job, Row], None]
    _spare: deque[_Worker] = field(default_factory=deque)
    _busy: list[_Worker] = field(default_factory=list)

    def run(self, jobs: Iterable[Job], seconds: float) -> None:
        """Run jobs for so long at most [s]; those that were not reached are reported as "not run"."""
        end_s = time.monotonic() + seconds
        queue = deque(jobs)
        with tempfile.TemporaryDirectory() as folder:
            try:
                while (queue or self._busy) and time.monotonic() < end_s:
                    self._collect()
                    while queue and self._has_room(queue[0]):
                        self._start(queue.popleft(), Path(folder))
                    self._prepare(queue, Path(folder))
                    time.sleep(_POLL_S)
                self._collect()
            finally:
                for worker in (*self._busy, *self._spare):
                    worker.stop()
            for worker in self._busy:
                assert worker.job is not None
                self.report(worker.job, _row(worker, "not run", error="the time was up while it ran"))
            for job in queue:
                self.report(job, {"status": "not run", "error": "no time was left"})

    def _has_room(self, job: Job) -> bool:
        alone = job.is_alone or any(worker.job is not None and worker.job.is_alone for worker in self._busy)
        return len(self._busy) < (1 if alone else self.parallel)

    def _prepare(self, queue: deque[Job], folder: Path) -> None:
        """Keep a process ready for the next job, two where several run at once."""
        wanted = min(len(queue), 1 if queue and queue[0].is_alone else 2)
        while len(self._spare) < wanted:
            self._spare.append(self._worker(folder))

    def _worker(self, folder: Path) -> _Worker:
        log = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the worker)
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        return _Worker(process, log, folder / f"{process.pid}.json")

    def _start(self, job: Job, folder: Path) -> None:
        worker = self._spare.popleft() if self._spare else self._worker(folder)
        worker.job, worker.started_s = job, time.monotonic()
        worker.ends_s = worker.started_s + job.timeout_s
        task = {**self.task, "kind": job.kind, "settings": job.settings, "result": str(worker.result)}
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(task) + "\n")
            worker.process.stdin.close()
        except BrokenPipeError:  # it died while it waited: told when it is collected
            pass
        self._busy.append(worker)

    def _collect(self) -> None:
        """Report what is done, and stop what takes too long."""
        for worker in tuple(self._busy):
            assert worker.job is not None
            is_running = worker.process.poll() is None
            if is_running and time.monotonic() < worker.ends_s:
                continue
            worker.stop()
            self._busy.remove(worker)
            if worker.result.exists():
                row = json.loads(worker.result.read_text(encoding="utf-8"))
                self.report(worker.job, _row(worker, **row))
            elif is_running:
                error = f"not done after {time.monotonic() - worker.started_s:.0f} s"
                self.report(worker.job, _row(worker, "timed out", error=error, trace=worker.printed))
            else:
                code = worker.process.returncode
                name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                self.report(worker.job, _row(worker, "crashed", error=name, trace=worker.printed))


def _row(worker: _Worker, status: str, **figures: Any) -> Row:
    return {"status": status, "seconds": round(time.monotonic() - worker.started_s, 2), **figures}

"""What fxckpt does on a real GPU, within a given time: bits, peaks, times, and training where eager can't.

    python -m benchmarks.gpu [--minutes 8] [--quick] [--only KIND …] [--out benchmarks/results/gpu]
    python -m benchmarks.gpu --device cpu --tiny --out FOLDER
    python -m benchmarks.gpu --readme

Each measurement runs in a process of its own, the most important first; what crashes or takes too long is a row that
says so, and what was not reached when the time is up, too. `results.json` and `results.md` in the folder are complete
after each of them: nothing is lost if this is killed. Rows of earlier runs on the same machine stay. Needs torch,
transformers, numpy, networkx and tqdm. `--device cpu --tiny` tries the script itself. `--readme` measures nothing:
it puts the results that are there into the README, between two marks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.jobs import KINDS, Job, jobs
from benchmarks.gpu.report import readme
from benchmarks.gpu.results import RESULTS, ROOT, Results, read
from benchmarks.gpu.scheduler import Row, Scheduler
from benchmarks.marked import placed

BEGIN = "<!-- begin: python -m benchmarks.gpu --readme -->"
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="how long it may take (default: 8)")
    parser.add_argument("--quick", action="store_true", help="the most important half")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--match", default="", help="only jobs with this in their names")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--parallel", type=int, default=4, help="how many jobs run at once where none is timed")
    parser.add_argument("--readme", action="store_true", help="measure nothing; write results into the README")
    options = parser.parse_args()
    if options.readme:
        write_readme(options.out)
    else:
        measure(options)


def write_readme(folder: Path) -> None:
    """Put what a folder holds into the README."""
    path = ROOT / "README.md"
    text = readme(read(folder / RESULTS))
    path.write_text(placed(path.read_text(encoding="utf-8"), BEGIN, text), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Run the jobs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is stopped
    start = time.monotonic()
    results = Results(options.out)
    chosen = [
        job
        for job in jobs(quick=options.quick)
        if ("frontier" if job.kind == "prepare" else job.kind) in options.only and options.match in str(job)
    ]
    counted = iter(range(1, len(chosen) + 1))

    def report(job: Job, row: Row) -> None:
        if job.kind == "machine":
            if row["status"] != "done":
                print(f"{row.get('error')}\n{row.get('trace', '')}")
                raise SystemExit(1)
            del row["status"], row["seconds"]
            results.told(row)
            return
        results.add(job, row)
        if row["status"] != "not run":
            what = f"{row['status']} {row.get('error', '')}".strip().splitlines()[0][:150]
            place = f"{next(counted)}/{len(chosen)}"
            print(f"{time.monotonic() - start:5.0f} s  {place}  {row['seconds']:.1f} s  {job}: {what}", flush=True)

    threads = max(1, (os.cpu_count() or 1) // options.parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")  # so that nothing is compiled already
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        task = {"device": options.device, "tiny": options.tiny, "folder": folder}
        scheduler = Scheduler(WORKER, task, options.parallel, report)
        machine = Job("machine", {}, is_alone=True, timeout_s=120)
        scheduler.run([machine, *chosen], options.minutes * 60 - (time.monotonic() - start))
    print(f"{options.out / 'results.md'}", flush=True)


if __name__ == "__main__":
    main()

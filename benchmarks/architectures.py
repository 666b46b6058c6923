"""Train a step of each architecture of transformers at half of its plain peak, and compare it with the plain step.

    python -m benchmarks.architectures [name …]

Loss, gradients, buffers and the state of the random-number generator must be equal in every bit, and the outputs of
the model's own type. Writes `benchmarks/results/architectures.json` and `.md`; with names, only their rows are new.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

import fxckpt
from benchmarks.models.architectures import ARCHITECTURES, step_at
from fxckpt.api import plan_of
from fxckpt.errors import FxckptError, InfeasibleBudgetError

RESULTS = Path(__file__).parent / "results"
RATIO = 0.5


@dataclass(frozen=True)
class Row:
    """What became of one architecture; figures are None where it did not run."""

    name: str
    kind: str
    model: str
    same_bits: bool
    remark: str = ""
    ops: int | None = None
    plain_peak_bytes: int | None = None
    peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    overhead_ratio: float | None = None


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def examine(name: str) -> Row:
    """A step at half of the plain peak, or at the floor where that is higher."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    remark = ""
    labels = architecture.name, architecture.kind, architecture.model
    try:
        try:
            optimized, inputs = step_at(architecture, RATIO)
        except InfeasibleBudgetError as error:
            remark = f"the floor is {RATIO * error.floor_bytes / error.budget_bytes:.0%} of the plain peak"
            optimized, inputs = step_at(architecture, error.floor_bytes)
    except (FxckptError, AssertionError) as error:
        return Row(*labels, same_bits=False, remark=_short(str(error)))
    plan = plan_of(optimized)
    measured = fxckpt.measure(optimized, **inputs)
    return Row(
        *labels,
        same_bits=True,
        remark=remark,
        ops=len(plan.graph.ops),
        plain_peak_bytes=plan.baseline.peak_bytes,
        peak_bytes=plan.predicted.peak_bytes,
        measured_peak_bytes=measured.peak_bytes,
        overhead_ratio=plan.predicted.recompute_us / plan.baseline.step_us,
    )


def _short(message: str) -> str:
    """The first sentence, paths cut to file names."""
    words = [os.path.basename(word) if word.startswith("/") else word for word in message.split("\n")[0].split(" ")]
    return " ".join(words)[:300]


def table(rows: list[Row]) -> str:
    """The rows as markdown."""
    body = [
        [row.name, row.kind, f"`{row.model}`", "yes" if row.same_bits else "**no**", *_figures(row), row.remark]
        for row in rows
    ]
    headers = [
        "architecture",
        "kind",
        "class",
        "same bits",
        "ops",
        "peak, % of plain",
        "measured / predicted",
        "remark",
    ]
    return tabulate(body, headers, tablefmt="github")


def _figures(row: Row) -> list[str]:
    if row.peak_bytes is None or row.plain_peak_bytes is None or row.measured_peak_bytes is None:
        return ["–", "–", "–"]
    ratio, measured = row.peak_bytes / row.plain_peak_bytes, row.measured_peak_bytes / row.peak_bytes
    return [f"{row.ops:,}", f"{ratio:.1%}", f"{measured:.3f}"]


def _with_rows_kept(rows: list[Row]) -> list[Row]:
    """The new rows, and for all other architectures those that were written before."""
    path = RESULTS / "architectures.json"
    before = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    known = {row.name: row for row in (*before, *rows)}
    return [known[a.name] for a in ARCHITECTURES if a.name in known]


def main(names: list[str]) -> None:
    chosen = [a.name for a in ARCHITECTURES if not names or a.name in names]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=quiet) as pool:
        rows = list(tqdm(pool.map(examine, chosen), total=len(chosen)))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, CPU"
    rows = _with_rows_kept(rows)
    text = f"{sum(r.same_bits for r in rows)} of {len(rows)} architectures, {versions}.\n\n{table(rows)}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "architectures.md").write_text(
        "# Architectures of transformers\n\nA training step at 50 % of the plain peak, compared bit by bit with the "
        f"plain model's; written by `python -m benchmarks.architectures`.\n\n{text}"
    )
    (RESULTS / "architectures.json").write_text(
        json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

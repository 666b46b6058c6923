"""The README's picture: memory over a training step of a GPT of 12 layers, planned in 40 % of the plain model's peak.

    python -m benchmarks.picture [--output benchmarks/results]

Times are those of the cost model "reference", which asks no clock: every run writes the same `timeline.svg`, and the
figures in it to `timeline.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl

import fxckpt
from benchmarks.models.cases import case

MODEL, BUDGET = "gpt12", 0.4
SAME_EVERY_TIME = {"svg.hashsalt": "fxckpt", "svg.fonttype": "path"}


def plan() -> fxckpt.Plan:
    model, args, kwargs = case(MODEL).build()
    return fxckpt.plan(model, BUDGET, example_inputs=args, example_kwargs=kwargs, cost_model="reference")


def figures(plan: fxckpt.Plan) -> dict[str, object]:
    return {
        "model": MODEL,
        "budget_bytes": plan.budget_bytes,
        "baseline": asdict(plan.baseline),
        "predicted": asdict(plan.predicted),
    }


def draw(plan: fxckpt.Plan, path: Path) -> None:
    with mpl.rc_context(SAME_EVERY_TIME):
        fig, ax = plan.plot_timeline()
        ax.set_title(f"One training step of GPT, 12 layers, in {BUDGET:.0%} of its memory")
        fig.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    found = plan()
    draw(found, folder / "timeline.svg")
    (folder / "timeline.json").write_text(json.dumps(figures(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

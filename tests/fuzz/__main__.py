"""Run the fuzzer for long: `python -m tests.fuzz --examples 10000 --seed 1`.

Prints each failure with the line that runs it again, and goes on; adds what was run to the file that `--out` names,
also when it is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from tqdm import tqdm

from tests.fuzz import Refused, Trial, check, trials

_AT_ONCE = settings(
    max_examples=10,  # later ones would be variants of those before
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""How trials are made."""


class Run:
    """Trials that have been run, none twice, and what became of them."""

    def __init__(self, examples: int) -> None:
        self.counts: Counter[str] = Counter(examples=0, failures=0, refused=0)
        self.reasons: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._examples, self._progress = examples, tqdm(total=examples)

    def some(self, seed: int) -> None:
        """Run as many random trials as are wanted."""
        while self.counts["examples"] < self._examples:
            gc.collect()
            gc.freeze()  # torch keeps what it learns of each op: measuring collects garbage, and would look through it
            hypothesis.seed(seed)(_AT_ONCE(given(trials())(self._add)))()
            seed += 1

    def _add(self, trial: Trial) -> None:
        if repr(trial) in self._seen:
            return
        self._seen.add(repr(trial))
        try:
            check(trial)
        except Refused as refusal:
            self.counts["refused"] += 1
            self.reasons[str(refusal)[:80]] += 1
            return
        except Exception as error:
            self.counts["failures"] += 1
            tqdm.write("".join(traceback.format_exception(error, limit=-4)), file=sys.stdout)
            sys.stdout.flush()
        self.counts["examples"] += 1
        self._progress.update()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=1000, help="how many trials to run to their end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file, to which the counts are added")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(chosen.examples)
    with contextlib.suppress(KeyboardInterrupt):
        run.some(1_000_000 * chosen.seed)
    versions = {"torch": torch.__version__, "hypothesis": hypothesis.__version__}
    record = {**run.counts, "seed": chosen.seed, "versions": versions}
    print(json.dumps(record), *(f"{count:6} {reason}" for reason, count in run.reasons.most_common(20)), sep="\n")
    if chosen.out is not None:
        before = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else []
        chosen.out.write_text(json.dumps([*before, record], indent=1) + "\n", encoding="utf-8")
    return int(run.counts["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())

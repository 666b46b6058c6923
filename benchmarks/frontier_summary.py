"""All results of `benchmarks.frontier` in one page: fxckpt's time at the measured peak of each other tool.

    python -m benchmarks.frontier_summary [--results benchmarks/results] [--readme README.md]

Reads every `frontier_MODEL.json` of the folder, writes `frontier.md` beside them, and puts its first part between the
two marks in the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.frontier_report import Point, Result, Rival, machine_text, read
from benchmarks.marked import placed

BEGIN = "<!-- begin: python -m benchmarks.frontier_summary -->"
TOLERANCE = 1.03
"""A ratio of times up to this is noise."""
LISTED = 3
"""How many of the peers that are faster are named in a row."""

NAMES = {
    "gpt12": "GPT, 12 layers",
    "gpt12_dropout": "GPT with dropout",
    "bert6": "BERT, 6 layers",
    "resnet50": "ResNet-50",
    "unet4": "U-Net, 4 levels",
    "vit6": "ViT, 6 layers",
    "llama12": "Llama-like, 12 layers",
    "mlp32": "MLP, 32 layers",
    "resmlp1000": "residual MLP, 1,000 layers",
}
INTRODUCTION = """Measured: what torch and transformers offer, and fxckpt with the measured peak of each as its budget.
Times are those of a step over the plain model's, from steps that ran in turn."""
EVERY_BLOCK = "checkpoint every 1"
"""The peer that everybody knows."""

OVERVIEW = (
    "model",
    "plain peak, MiB",
    "`checkpoint` every block, MiB",
    "its time",
    "fxckpt's in as much",
    "peers",
    "fxckpt over peer, median",
    "worst",
    f"above {TOLERANCE}",
)
DETAILS = (
    "",
    "peak, MiB",
    "time",
    "fxckpt in as much: MiB",
    "time",
    "over peer's",
    "budget kept",
    "same gradients",
)


def timed(rivals: Sequence[Rival]) -> list[tuple[float, Rival]]:
    """The rivals that were timed, with fxckpt's time over theirs, the worst for fxckpt first."""
    found = [(rival.time.median, rival) for rival in rivals if rival.time is not None]
    return sorted(found, key=lambda pair: -pair[0])


def overview(results: Sequence[Result], machine: str) -> str:
    """What there is to know at a glance: the sum of it, and a row a model."""
    headline = "\n".join(f"- {sentence}" for sentence in sentences(results))
    rows = tabulate(map(_row, results), OVERVIEW, tablefmt="github", disable_numparse=True)
    return f"{INTRODUCTION}\n\n{headline}\n\n{rows}\n\n{machine} Each tool by itself: `benchmarks/results/frontier.md`."


def sentences(results: Sequence[Result]) -> Iterator[str]:
    """What holds over all results, and what doesn't."""
    rivals = [rival for result in results for rival in result.rivals]
    ratios = [ratio for ratio, _ in timed(rivals)]
    slower = sum(ratio > TOLERANCE for ratio in ratios)
    if ratios:
        yield (
            f"In the measured peak of each other tool ({len(ratios)} comparisons on {len(results)} models) fxckpt's "
            f"step takes {statistics.median(ratios):.3f} of the other's time in the median, {ratios[0]:.3f} in the "
            f"worst case; in {slower} of them it is more than {TOLERANCE - 1:.0%} slower."
        )
    absent = sum(rival.fxckpt is None for rival in rivals)
    if absent:
        yield f"fxckpt can't reach the other's peak in {absent} of the comparisons."
    ours = [p for r in results for p in (*r.fxckpt, *(rival.fxckpt for rival in r.rivals)) if p is not None]
    broken, different = sum(not p.is_kept for p in ours), sum(p.gradient_difference != 0 for p in ours)
    yield (
        f"Of its {len(ours)} steps, {len(ours) - broken} kept their budget and {len(ours) - different} gave the plain "
        "model's gradients without any difference."
    )
    wrong = [rival.peer for rival in rivals if rival.peer.gradient_difference]
    if wrong:
        names = ", ".join(dict.fromkeys(f"`{peer.family}`" for peer in wrong))
        yield f"Other gradients than the plain model's come from {len(wrong)} of the others' steps ({names})."


def _row(result: Result) -> list[str]:
    known = next((rival for rival in result.rivals if rival.peer.name == EVERY_BLOCK), None)
    cells = ["–"] * 3 if known is None else [_mib(known.peer.peak_bytes), _times(known.peer), _times(known.fxckpt)]
    ratios = timed(result.rivals)
    above = [f"{rival.peer.name}: {ratio:.3f}" for ratio, rival in ratios if ratio > TOLERANCE]
    above[LISTED:] = [f"{len(above) - LISTED} more"] if len(above) > LISTED else []
    worst = f"{ratios[0][0]:.3f}" if ratios else "–"
    median = f"{statistics.median(ratio for ratio, _ in ratios):.3f}" if ratios else "–"
    named = ", ".join(above) or ("nothing" if ratios else "–")
    name = NAMES.get(result.model, result.model)
    plain_peak = _mib(result.plain.peak_bytes)
    return [name, plain_peak, *cells, str(len(result.rivals)), median, worst, named]


def details(result: Result) -> str:
    """Every peer of a model."""
    rows = []
    for peer, ours, time in ((rival.peer, rival.fxckpt, rival.time) for rival in result.rivals):
        ratio = "–" if time is None else str(time)
        if time is not None and time.median > TOLERANCE:
            ratio = f"**{ratio}**"
        row = [peer.name, _mib(peer.peak_bytes), _times(peer)]
        if ours is None:
            row += ["**can't be reached**", "–", "–", "–", "–"]
        else:
            same = "yes" if ours.gradient_difference == 0 else f"**off by {ours.gradient_difference:.1g}**"
            row += [_mib(ours.peak_bytes), _times(ours), ratio, "yes" if ours.is_kept else "**no**", same]
        rows.append(row)
    table = tabulate(rows, DETAILS, tablefmt="github", disable_numparse=True)
    return f"## {NAMES.get(result.model, result.model)}\n\nPlain peak {_mib(result.plain.peak_bytes)} MiB.\n\n{table}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"


def _times(point: Point | None) -> str:
    return "–" if point is None or point.time is None else f"{point.time.median:.3f}"


def page(results: Sequence[Result], machine: str) -> str:
    """The whole page."""
    title = "# Time at the peak of other tools"
    return "\n\n".join((title, overview(results, machine), *map(details, results))) + "\n"


def found_in(folder: Path) -> tuple[list[Result], str]:
    """The results in a folder, in the order of `NAMES`, and what they were taken with."""
    order = list(NAMES)
    paths = sorted(folder.glob("frontier_*.json"))
    results = [read(path) for path in paths]
    results.sort(key=lambda result: order.index(result.model) if result.model in order else len(order))
    machines = dict.fromkeys(machine_text(json.loads(path.read_text(encoding="utf-8"))["machine"]) for path in paths)
    return results, " ".join(machines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the two marks")
    options = parser.parse_args()
    results, machine = found_in(options.results)
    if not results:
        raise SystemExit(f"there are no results in {options.results}: run python -m benchmarks.frontier --output there")
    (options.results / "frontier.md").write_text(page(results, machine), encoding="utf-8")
    readme = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(placed(readme, BEGIN, overview(results, machine)), encoding="utf-8")


if __name__ == "__main__":
    main()

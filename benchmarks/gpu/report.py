"""Results as Markdown. No package is needed for it beside Python's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.subjects import TRAINED

Row = Mapping[str, Any]

README_SUBJECT = "gpt"
"""The model whose table is in the README."""

WAYS = {
    "eager": "eager",
    "checkpoint": "`checkpoint` every block",
    "selective": "selective checkpointing of every block",
    "compiled checkpoint": "`torch.compile` of `checkpoint` every block",
}


def page(data: Mapping[str, Any]) -> str:
    """All that was measured."""
    rows = data["rows"]
    parts = ["# On a GPU", machine_text(data)]
    for kind, section in SECTIONS.items():
        found = [row for row in rows if row["kind"] == kind]
        if any(row["status"] == "done" for row in found):
            parts += list(section([row for row in found if row["status"] == "done"]))
    rest = [row for row in rows if row["status"] != "done"]
    if rest:
        parts += ["## Without a result", table(("", "", "why"), map(_failure, rest))]
    return "\n\n".join(parts) + "\n"


def machine_text(data: Mapping[str, Any]) -> str:
    """What the figures were taken with."""
    sources = sorted({row["source"] for row in data["rows"]})
    named = [f"{name} {value}" for name, value in data["machine"].items()]
    return f"Measured with {', '.join([*named, *(f'fxckpt of source {source}' for source in sources)])}."


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, others are figures."""
    lines = [headers, ["---", *("---:" for _ in headers[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _failure(row: Row) -> tuple[str, str, str]:
    first_line = (str(row.get("error", "")).splitlines() or [""])[0]
    return " ".join((row["kind"], *map(str, row["settings"].values()))), row["status"], first_line[:200]


def correctness_summary(rows: Sequence[Row]) -> Iterator[str]:
    """What holds over all rows."""
    same = sum(not row["differing"] for row in rows)
    unsteady = sum(bool(row["eager_differing"]) for row in rows)
    kept = sum(_is_kept(row) for row in rows)
    worst = max(abs(row["peak_bytes"] / row["predicted_bytes"] - 1) for row in rows)
    yield (
        f"{same} of {len(rows)} planned steps left the bits of eager's (loss, gradients, buffers, states of random "
        f"numbers), wherever eager agrees with itself; in {unsteady} eager differs from itself somewhere."
    )
    yield f"{kept} of {len(rows)} kept their budget; measured peaks are within {worst:.2%} of the predicted ones."


def _correctness(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Bits and peaks"
    yield "\n".join(f"- {sentence}" for sentence in correctness_summary(rows))
    headers = (
        "",
        "types",
        "budget",
        "kernels",
        "other bits",
        "eager's own",
        "repeats",
        "predicted",
        "peak",
        "of it",
        "kept",
        "planned, s",
    )
    yield table(headers, map(_correctness_cells, rows))


def _correctness_cells(row: Row) -> list[str]:
    asked, differing = row["settings"], row["differing"]
    named = ", ".join(differing[:2]) + (", …" if len(differing) > 2 else "")
    return [
        asked["case"],
        asked["types"],
        f"{asked['budget']:g}" if row["floor_bytes"] is None else "floor",
        "deterministic" if row["deterministic"] else "any",
        f"**{len(differing)}**: {named}" if differing else "0",
        str(len(row["eager_differing"])),
        str(row["repeats"]),
        mib(row["predicted_bytes"]),
        mib(row["peak_bytes"]),
        f"{row['peak_bytes'] / row['predicted_bytes']:.4f}",
        "yes" if _is_kept(row) else f"**{row['peak_bytes'] - row['budget_bytes']} B over**",
        f"{row['planning_s']:.1f}",
    ]


def _is_kept(row: Row) -> bool:
    return bool(row["peak_bytes"] <= row["budget_bytes"])


def mib(size_bytes: float) -> str:
    """MiB: whole ones where there are many."""
    size = size_bytes / 2**20
    return f"{size:,.0f}" if size >= 1000 else f"{size:.2f}"


def _frontier(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Peak and time"
    for subject in dict.fromkeys(row["settings"]["subject"] for row in rows):
        found = [row for row in rows if row["settings"]["subject"] == subject]
        yield f"### {TRAINED[subject].title}"
        yield frontier_table(found)


def frontier_table(rows: Sequence[Row]) -> str:
    """The ways to run one model, by their peaks. Times are over eager's in the same process."""
    samples = TRAINED[rows[0]["settings"]["subject"]].samples
    headers = (
        "",
        "peak, MiB",
        "of eager's",
        "time over eager's",
        "ms",
        f"{samples}/s",
        "gradients off by",
        "budget kept",
    )
    reached = sorted((row for row in rows if "peak_bytes" in row), key=lambda row: -row["peak_bytes"])
    below = [row for row in rows if "peak_bytes" not in row]
    return table(headers, [*map(_frontier_cells, reached), *map(_below, below)])


def way_text(row: Row) -> str:
    """What was done to save memory."""
    asked = row["settings"]
    way, budget = asked["way"], asked["budget"]
    if way == "fxckpt":
        told = "at its floor" if budget == "floor" else f"in {budget:g} of eager's peak"
        return " ".join((f"**fxckpt** {told}", *(name.replace("_", " ") for name in asked.get("options", ()))))
    if way == "compile":
        return "`torch.compile`" if budget == 1 else f"`torch.compile`, `activation_memory_budget` {budget:g}"
    return WAYS[way]


def _frontier_cells(row: Row) -> list[str]:
    kept = "–"
    if "budget_bytes" in row:
        over_bytes = row["peak_bytes"] - row["budget_bytes"]
        kept = "yes" if over_bytes <= 0 else f"**{over_bytes / row['budget_bytes']:.2%} over**"
    difference = row["gradient_difference"]
    return [
        way_text(row),
        mib(row["peak_bytes"]),
        f"{row['peak_bytes'] / row['plain_bytes']:.3f}",
        time_text(row["time"]),
        f"{row['step_us'] / 1000:.1f}",
        f"{row['samples_per_s']:,.0f}",
        f"{difference:.1g}" if difference else "0",
        kept,
    ]


def _below(row: Row) -> list[str]:
    floor = f"below the floor of {mib(row['floor_bytes'])}"
    return [way_text(row), floor, f"{row['floor_bytes'] / row['plain_bytes']:.3f}", *("–" for _ in range(5))]


def time_text(time: Mapping[str, float]) -> str:
    """A ratio with its quartiles."""
    return f"{time['median']:.3f} ({time['low']:.3f}–{time['high']:.3f})"


def _limit(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Out of memory, and what trains"
    yield (
        "The process may not hold more than the limit (`torch.cuda.set_per_process_memory_fraction`), in which it also "
        "plans."
    )
    headers = ("", "eager's peak, MiB", "limit", "eager", "fxckpt", "budget", "allocated", "reserved")
    yield table(headers, map(_limit_cells, rows))


def _limit_cells(row: Row) -> list[str]:
    sizes = (mib(row[name]) if name in row else "–" for name in ("budget_bytes", "allocated_bytes", "reserved_bytes"))
    outcomes = [f"at {share:g} of the limit: {outcome.split(':')[0]}" for share, outcome in row["attempts"]]
    title = TRAINED[row["settings"]["subject"]].title.split(",")[0]
    return [
        title,
        mib(row["plain_bytes"]),
        mib(row["limit_bytes"]),
        row["eager"].split(":")[0],
        "; ".join(outcomes),
        *sizes,
    ]


def _host(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Time to launch a step"
    yield "Until the last kernel is launched, on an idle device; medians of steps in turn."
    headers = ("", "budget", "eager, ms", "fxckpt, ms", "ratio", "repeats")
    yield table(headers, map(_host_cells, rows))


def _host_cells(row: Row) -> list[str]:
    asked = row["settings"]
    return [
        asked["model"],
        "none" if asked["budget"] is None else f"{asked['budget']:g}",
        f"{row['plain_us'] / 1000:.1f}",
        f"{row['launch_us'] / 1000:.1f}",
        time_text(row["time"]),
        str(row["repeats"]),
    ]


def _planning(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Time to plan"
    yield table(("", "costs in the cache", "ops", "s", "CPU, s"), map(_planning_cells, rows))


def _planning_cells(row: Row) -> list[str]:
    asked = row["settings"]
    title = TRAINED[asked["subject"]].title.split(",")[0]
    cache = "none" if asked["cache"] == "cold" else "all"
    return [title, cache, str(row["ops"]), f"{row['planning_s']:.1f}", f"{row['cpu_s']:.1f}"]


def readme(data: Mapping[str, Any]) -> str:
    """What the README says: nothing if nothing was measured."""
    done = [row for row in data["rows"] if row["status"] == "done"]
    if not done:
        return ""
    kinds = {kind: [row for row in done if row["kind"] == kind] for kind in SECTIONS}
    sentences = [*(correctness_summary(kinds["correctness"]) if kinds["correctness"] else ())]
    sentences += [f"{sentence}." for row in kinds["limit"] if (sentence := limit_sentence(row))]
    parts = [f"### On a GPU: {data['machine']['device']}", "\n".join(f"- {sentence}" for sentence in sentences)]
    timed = [row for row in kinds["frontier"] if row["settings"]["subject"] == README_SUBJECT]
    if timed:
        parts += [f"{TRAINED[README_SUBJECT].title}; time over eager's, steps in turn:", frontier_table(timed)]
    parts.append(f"{machine_text(data)} Everything: `benchmarks/results/gpu/results.md`.")
    return "\n\n".join(part for part in parts if part)


def limit_sentence(row: Row) -> str:
    """What trains where eager runs out of memory; empty if that was not seen."""
    if "budget_bytes" not in row or not row["eager"].startswith("OutOfMemoryError"):
        return ""
    title = TRAINED[row["settings"]["subject"]].title.split(",")[0]
    return (
        f"{title}: under a hard limit of {mib(row['limit_bytes'])} MiB eager runs out of memory; planned "
        f"in {mib(row['budget_bytes'])} MiB it trains, with {mib(row['reserved_bytes'])} MiB reserved at most"
    )


SECTIONS = {
    "correctness": _correctness,
    "frontier": _frontier,
    "limit": _limit,
    "host": _host,
    "planning": _planning,
}

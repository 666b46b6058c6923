"""Results as Markdown. No package is needed for it beside Python's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


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


SECTIONS = {"correctness": _correctness}

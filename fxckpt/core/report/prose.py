"""Figures as sentences: what a plan or a curve gains and at what price, what makes the peak, what else would help."""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.report import rows
from fxckpt.core.report.planned import Planned
from fxckpt.core.simulate import Figures, PeakKind, Timeline
from fxckpt.units import format_bytes, format_us

_VERDICTS = {
    "unnecessary": "Checkpointing is not needed: the plain step takes {plain}, and {budget} are there.",
    "not enough": "Checkpointing is not enough: it reaches {floor} at the least, and {budget} are there.",
    "of little use": "Checkpointing is of little use here: it brings {plain} to {floor} at the least.",
    "expensive": "Checkpointing works here, but is expensive: {price}.",
    "worthwhile": "Checkpointing is worth it here: {price}.",
}

_REMEDIES: dict[PeakKind, str] = {
    "parameters and buffers": "a smaller type (bfloat16), adapters on frozen parameters, or sharding over devices",
    "gradients": "set_to_none=True in zero_grad, parameters of a smaller type, or freezing some of them",
    "inputs and outputs": "a loss inside the model, so that its large outputs need not stay, or a smaller batch",
    "saved": "a smaller batch, shorter sequences, or autocast to bfloat16",
    "recomputed": "a smaller batch or shorter sequences",
    "temporaries": "a smaller batch, or doing that op in chunks",
    "libraries": "a smaller workspace for cuBLAS (the environment variable CUBLAS_WORKSPACE_CONFIG)",
    "reserved": "an optimizer that keeps less state (SGD, Adafactor, 8-bit Adam), or sharding its state over devices",
}


def advice_text(
    verdict: str,
    floor: Planned,
    *,
    knee: Figures,
    chosen: Figures,
    budget_bytes: int | None,
    optimizer_bytes: int,
) -> str:
    """A verdict, the prices that it rests on, and what fills the memory.

    Args:
        verdict: one of `fxckpt.core.advice.Verdict`.
        floor: the plan of the lowest peak.
        knee: what the plan at the knee of the curve costs.
        chosen: what the verdict is about.
        budget_bytes: the budget that was asked about, if any [B].
        optimizer_bytes: state of the optimizer, a part of what is reserved [B].
    """
    plain = floor.baseline
    sentence = _VERDICTS[verdict].format(
        plain=format_bytes(plain.peak_bytes),
        floor=format_bytes(floor.predicted.peak_bytes),
        budget="" if budget_bytes is None else format_bytes(budget_bytes),
        price=_price(chosen, plain),
    )
    points = [("plain", plain), ("knee", knee), ("floor", floor.predicted)]
    if verdict in ("worthwhile", "expensive") and budget_bytes is not None:
        points.insert(1, ("budget", chosen))
    lines = [sentence, *(f"  {name:<6}  {_price(figures, plain)}" for name, figures in points)]
    lines.append(_memory(floor.baseline_timeline))
    if optimizer_bytes:
        lines.append(f"Reserved for the optimizer's state: {format_bytes(optimizer_bytes)}.")
    large = floor.baseline_timeline.largest
    if large is not None:
        lines.append(f"One tensor takes a large part of it: {_named(floor.graph, large)}.")
    return "\n".join([*lines, f"At the floor: {_beyond(floor)}"])


def _price(figures: Figures, plain: Figures) -> str:
    share = figures.peak_bytes / max(plain.peak_bytes, 1)
    slower = figures.recompute_us / max(plain.step_us, 1e-12)
    time = f"recomputing adds {slower:.1%} to its time" if figures.recompute_us else "nothing is recomputed"
    return f"{format_bytes(figures.peak_bytes)} ({share:.0%} of the plain peak), {time}"


def _memory(plain: Timeline) -> str:
    parts = sorted(plain.at_peak.items(), key=lambda part: -part[1])
    peak_bytes = max(plain.peak_bytes, 1)
    shares = [f"{kind} {size / peak_bytes:.0%}" for kind, size in parts if size >= 0.01 * peak_bytes]
    return f"At the plain step's peak: {', '.join(shares)}."


def closing_text(plan: Planned) -> str:
    """The paragraph that ends a printed plan: what it gains, what then makes the peak, what would lower that."""
    plain, ours = plan.baseline, plan.predicted
    if not plan.schedule.repeats():
        gain = "Nothing is recomputed: it fits as it is."
    else:
        saved_bytes = plain.peak_bytes - ours.peak_bytes
        price = ours.recompute_us / max(plain.step_us, 1e-12)
        gain = f"Recomputing saves {format_bytes(saved_bytes)} and adds {price:.1%} to the time of a step"
        gain += f" ({format_us(ours.recompute_us / (saved_bytes / 2**20))} a MiB)." if saved_bytes > 0 else "."
    return f"{gain} Now {_beyond(plan)}"


def _beyond(plan: Planned) -> str:
    """What makes the peak of a plan, and what besides recomputing would lower it."""
    timeline = plan.timeline
    if not timeline.peak_bytes:
        return "it takes no memory."
    kind, large = timeline.dominant, timeline.largest
    part, peak = format_bytes(timeline.at_peak[kind]), format_bytes(timeline.peak_bytes)
    text = f"the largest part of the peak is {kind}, {part} of {peak}"
    if large is not None:
        text += f"; the largest tensor in it: {_named(plan.graph, large)}"
    return f"{text}. What would help beyond recomputing: {_REMEDIES[kind]}."


def _named(graph: Graph, index: int) -> str:
    storage, producer = graph.storages[index], graph.producer[index]
    size = format_bytes(storage.size_bytes)
    if producer < 0:
        return f"{storage.name}, {size}"
    op = graph.ops[producer]
    return (
        f"{size} written by {rows.short_target(op.target)} in {op.module or '(model)'}, {rows.source_text(op.source)}"
    )

"""Is checkpointing worth it here, what fills the memory, and what else would help? As data, and in words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fxckpt.core.graph import Graph, Storage
from fxckpt.core.pareto import Pareto
from fxckpt.core.plans import Figures, Plan
from fxckpt.core.report import rows
from fxckpt.core.simulate import PEAK_KINDS, PeakKind, Timeline
from fxckpt.units import format_bytes, format_us

Verdict = Literal["unnecessary", "worthwhile", "expensive", "of little use", "not enough"]

_LITTLE = 0.1  # of the plain peak: saving less is of little use
_DEAR = 0.3  # of the plain step's time: about one more forward, what checkpointing every block costs
_LARGE = 0.2  # of the peak: a single tensor of this size is worth naming

_REMEDIES: dict[PeakKind, str] = {
    "parameters and buffers": "a smaller type (bfloat16), adapters on frozen parameters, or sharding over devices",
    "gradients": "set_to_none=True in zero_grad, parameters of a smaller type, or freezing some of them",
    "inputs and outputs": "a loss inside the model, so that its large outputs need not stay, or a smaller batch",
    "saved": "a smaller batch, shorter sequences, or autocast to bfloat16",
    "recomputed": "a smaller batch or shorter sequences",
    "temporaries": "a smaller batch, or doing that op in chunks",
    "reserved": "an optimizer that keeps less state (SGD, Adafactor, 8-bit Adam), or sharding its state over devices",
}


@dataclass(frozen=True)
class Advice:
    """What a step's curve says about recomputing in it.

    Attributes:
        curve: time against peak, from the floor to the plain model.
        optimizer_bytes: state of the optimizer, a part of what is reserved [B].
        budget_bytes: the budget that was asked about, if any [B].
    """

    curve: Pareto
    optimizer_bytes: int = 0
    budget_bytes: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Is checkpointing worth it here?

        With a budget: "unnecessary" if the plain step fits, "not enough" if nothing does, else "expensive" if it costs
        more than 30 % of the plain step's time. Without one the same is asked about the knee, and saving less than a
        tenth of the peak is "of little use".
        """
        floor, plain, budget_bytes = self.floor, self.baseline, self.budget_bytes
        if budget_bytes is None and floor.peak_bytes > (1 - _LITTLE) * plain.peak_bytes:
            return "of little use"
        if budget_bytes is not None and plain.peak_bytes <= budget_bytes:
            return "unnecessary"
        if budget_bytes is not None and floor.peak_bytes > budget_bytes:
            return "not enough"
        return "expensive" if self.chosen.recompute_us > _DEAR * plain.step_us else "worthwhile"

    @property
    def baseline(self) -> Figures:
        """What the plain step costs."""
        return self.curve.baseline

    @property
    def floor(self) -> Figures:
        """What the step of lowest peak costs."""
        return self.curve.points[0]

    @cached_property
    def knee(self) -> Figures:
        """What the step at the knee of the curve costs."""
        return self.curve.knee().predicted

    @cached_property
    def chosen(self) -> Figures:
        """The step for the budget; the knee if there is no budget, the floor if it can't be kept."""
        if self.budget_bytes is None:
            return self.knee
        return self.floor if self.budget_bytes < self.floor.peak_bytes else self.curve.at(self.budget_bytes).predicted

    @cached_property
    def breakdown(self) -> dict[PeakKind, int]:
        """Bytes in use at the plain step's peak, by what they are for [B]."""
        return _at_peak(self.curve.floor.baseline_timeline)

    @property
    def dominant(self) -> PeakKind:
        """What takes the most of them."""
        return _dominant(self.breakdown)

    @cached_property
    def largest(self) -> Storage | None:
        """The one tensor in use at the plain step's peak that takes a fifth of it or more, such as logits."""
        index = _large(self.curve.floor.baseline_timeline)
        return None if index is None else self.curve.graph.storages[index]

    def __str__(self) -> str:
        return "\n".join((self._verdict_text(), *self._curve_lines(), *self._memory_lines()))

    def _verdict_text(self) -> str:
        budget = "" if self.budget_bytes is None else format_bytes(self.budget_bytes)
        plain, floor = format_bytes(self.baseline.peak_bytes), format_bytes(self.floor.peak_bytes)
        texts: dict[Verdict, str] = {
            "unnecessary": f"Checkpointing is not needed: the plain step takes {plain}, and {budget} are there.",
            "not enough": f"Checkpointing is not enough: it reaches {floor} at the least, and {budget} are there.",
            "of little use": f"Checkpointing is of little use here: it brings {plain} to {floor} at the least.",
            "expensive": f"Checkpointing works here, but is expensive: {self._price(self.chosen)}.",
            "worthwhile": f"Checkpointing is worth it here: {self._price(self.chosen)}.",
        }
        return texts[self.verdict]

    def _curve_lines(self) -> list[str]:
        points = [("plain", self.baseline), ("knee", self.knee), ("floor", self.floor)]
        if self.verdict in ("worthwhile", "expensive") and self.budget_bytes is not None:
            points.insert(1, ("budget", self.chosen))
        return [f"  {name:<6}  {self._price(figures)}" for name, figures in points]

    def _price(self, figures: Figures) -> str:
        share = figures.peak_bytes / max(self.baseline.peak_bytes, 1)
        slower = figures.recompute_us / max(self.baseline.step_us, 1e-12)
        time = f"recomputing adds {slower:.1%} to its time" if figures.recompute_us else "nothing is recomputed"
        return f"{format_bytes(figures.peak_bytes)} ({share:.0%} of the plain peak), {time}"

    def _memory_lines(self) -> list[str]:
        parts = sorted(self.breakdown.items(), key=lambda part: -part[1])
        peak_bytes = max(self.baseline.peak_bytes, 1)
        shares = [f"{kind} {size / peak_bytes:.0%}" for kind, size in parts if size >= 0.01 * peak_bytes]
        lines = [f"At the plain step's peak: {', '.join(shares)}."]
        if self.optimizer_bytes:
            lines.append(f"Reserved for the optimizer's state: {format_bytes(self.optimizer_bytes)}.")
        large = _large(self.curve.floor.baseline_timeline)
        if large is not None:
            lines.append(f"One tensor takes a large part of it: {_named(self.curve.graph, large)}.")
        return [*lines, f"At the floor: {_beyond(self.curve.floor)}"]


def closing_text(plan: Plan) -> str:
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


def _beyond(plan: Plan) -> str:
    """What makes the peak of a plan, and what besides recomputing would lower it."""
    timeline = plan.timeline
    parts = _at_peak(timeline)
    total_bytes = sum(parts.values())
    if not total_bytes:
        return "it takes no memory."
    kind = _dominant(parts)
    text = f"the largest part of the peak is {kind}, {format_bytes(parts[kind])} of {format_bytes(total_bytes)}"
    large = _large(timeline)
    if large is not None:
        text += f"; the largest tensor in it: {_named(plan.graph, large)}"
    return f"{text}. What would help beyond recomputing: {_REMEDIES[kind]}."


def _at_peak(timeline: Timeline) -> dict[PeakKind, int]:
    return timeline.breakdown(timeline.peak_step)


def _dominant(parts: dict[PeakKind, int]) -> PeakKind:
    return max(PEAK_KINDS, key=lambda kind: parts[kind])


def _large(timeline: Timeline) -> int | None:
    """The largest storage at the peak that the step itself allocates, if it is a fifth of the peak or more."""
    storages = timeline.graph.storages
    alive = [life.storage for life in timeline.alive_at(timeline.peak_step)]
    largest = max(alive, key=lambda storage: storages[storage].size_bytes, default=None)
    if largest is None or storages[largest].size_bytes < _LARGE * timeline.peak_bytes:
        return None
    return largest


def _named(graph: Graph, index: int) -> str:
    storage, producer = graph.storages[index], graph.producer[index]
    size = format_bytes(storage.size_bytes)
    if producer < 0:
        return f"{storage.name}, {size}"
    op = graph.ops[producer]
    return (
        f"{size} written by {rows.short_target(op.target)} in {op.module or '(model)'}, {rows.source_text(op.source)}"
    )

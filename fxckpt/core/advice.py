"""Is checkpointing worth it here, and what fills the memory? The words for it are those of `report.prose`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fxckpt.core.graph import Storage
from fxckpt.core.pareto import Pareto
from fxckpt.core.report.prose import advice_text
from fxckpt.core.simulate import Figures, PeakKind

Verdict = Literal["unnecessary", "worthwhile", "expensive", "of little use", "not enough"]

_LITTLE = 0.1  # of the plain peak: saving less is of little use
_DEAR = 0.3  # of the plain step's time: about one more forward, what checkpointing every block costs


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

    @property
    def breakdown(self) -> dict[PeakKind, int]:
        """Bytes in use at the plain step's peak, by what they are for [B]."""
        return self.curve.baseline_timeline.at_peak

    @property
    def dominant(self) -> PeakKind:
        """What takes the most of them."""
        return self.curve.baseline_timeline.dominant

    @property
    def largest(self) -> Storage | None:
        """The one tensor in use at the plain step's peak that takes a fifth of it or more, such as logits."""
        index = self.curve.baseline_timeline.largest
        return None if index is None else self.curve.graph.storages[index]

    def __str__(self) -> str:
        return advice_text(
            self.verdict,
            self.curve.floor,
            knee=self.knee,
            chosen=self.chosen,
            budget_bytes=self.budget_bytes,
            optimizer_bytes=self.optimizer_bytes,
        )

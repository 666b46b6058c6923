"""What comparisons with other tools run on: models, and of each the blocks that a user would wrap in `checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from benchmarks.models.cases import Case, case
from benchmarks.models.zoo import CASES, llama, mlp, residual_mlp

GROUP_SIZES = (1, 2, 3, 4)
"""How many blocks are wrapped in one `checkpoint`."""


def segment_counts(blocks: int) -> list[int]:
    """With how many segments `checkpoint_sequential` is tried: √n and n/2."""
    return sorted({count for count in (round(math.sqrt(blocks)), blocks // 2) if count > 1})


@dataclass(frozen=True)
class Subject:
    """A model to compare on.

    Attributes:
        full: the model, its inputs and its loss.
        quick: the same architecture at a size for quick runs.
        blocks: paths of what a user would wrap; the path of a `ModuleList` means each of its modules.
        is_chain: whether each block takes what the one before returns, so that several can be wrapped as one.
    """

    full: Case
    quick: Case
    blocks: tuple[str, ...]
    is_chain: bool = True

    @property
    def name(self) -> str:
        """Name of the model at full size."""
        return self.full.name

    def paths(self, model: nn.Module) -> Iterator[str]:
        """Paths of the blocks, in the order in which they run."""
        for path in self.blocks:
            module = model.get_submodule(path)
            if isinstance(module, nn.ModuleList):
                yield from (f"{path}.{index}" for index in range(len(module)))
            else:
                yield path


def _own(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


SUBJECTS: tuple[Subject, ...] = (
    Subject(case("gpt12"), case("gpt"), ("blocks",)),
    Subject(case("gpt12_dropout"), case("gpt_dropout"), ("blocks",)),
    Subject(case("bert6"), case("bert"), ("bert.encoder.layer",)),
    Subject(case("resnet50"), case("resnet"), ("blocks",)),
    Subject(case("unet4"), case("unet"), ("down", "middle", "up"), is_chain=False),
    Subject(case("vit6"), case("vit"), ("vit.layers",)),
    Subject(_own("llama12"), Case("llama", lambda: llama(3, 64, 176, 64, 2)), ("blocks",)),
    Subject(Case("mlp32", lambda: mlp(32, 512, 1024)), Case("mlp", lambda: mlp(6, 64, 256)), ("blocks",)),
    Subject(_own("resmlp1000"), Case("resmlp", lambda: residual_mlp(24, 32, 256)), ("blocks",)),
)


def subjects(names: list[str]) -> list[Subject]:
    """The subjects of these names; all if there are none.

    Raises:
        SystemExit: there is no subject of a name.
    """
    known = {subject.name: subject for subject in SUBJECTS}
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no model {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] or list(SUBJECTS)

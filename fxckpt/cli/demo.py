"""`python -m fxckpt demo`: a small GPT learns the standard library's sources, plain and in 40 % of the memory.

Both models start from the same seed and see the same batches, with dropout. They take turns, step by step, so that
their times can be compared. The losses must be equal to the last bit.
"""

from __future__ import annotations

import copy
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fxckpt import api
from fxckpt.errors import FxckptError
from fxckpt.units import format_bytes, format_us

_SEED = 1
_BUDGET_RATIO = 0.4
_TEXT_LENGTH = 1_000_000
_LIMIT_S = 95.0
_FEWEST_STEPS = 10
_LINES = 12


@dataclass(frozen=True)
class Size:
    """Model and batch: layers, width, heads, length of a sequence [characters], sequences a batch, steps."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    length: int = 256
    batch: int = 4
    steps: int = 30


TINY = Size(layers=3, width=64, heads=2, length=64, batch=16, steps=4)


class Block(nn.Module):
    """A transformer layer: causal attention, then a perceptron, each on normalised inputs and added to them."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, length, width) in and out."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout, is_causal=True
        )
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class GPT(nn.Module):
    """A character-level language model; `forward` returns its loss."""

    def __init__(self, size: Size, vocabulary: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.characters = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, vocabulary, bias=False)

    def forward(self, characters: Tensor, following: Tensor) -> Tensor:
        """Mean cross entropy of the characters that follow; both of shape (batch, length)."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.characters(characters) + self.positions(positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())


def read_text(length: int = _TEXT_LENGTH) -> str:
    """The first characters of the standard library's own sources, in the order of file names.

    Raises:
        FxckptError: this Python comes without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts, missing = [], length
    for file in sorted(folder.glob("*.py")):
        part = file.read_text(encoding="utf-8", errors="replace")[:missing]
        parts.append(part)
        missing -= len(part)
        if missing <= 0:
            break
    text = "".join(parts)
    if len(text) < 10_000:
        raise FxckptError(f"the demo reads the sources of Python's standard library, but {folder} has none")
    return text


@dataclass(frozen=True)
class Batches:
    """Random pieces of a text, the same for the same step."""

    codes: Tensor
    size: Size

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Characters and the ones that follow them, each of shape (batch, length)."""
        generator = torch.Generator().manual_seed(_SEED + step)
        starts = torch.randint(len(self.codes) - self.size.length - 1, (self.size.batch,), generator=generator)
        pieces = torch.stack([self.codes[s : s + self.size.length + 1] for s in starts.tolist()])
        return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


@dataclass
class Run:
    """A model in training, and what it has shown so far: losses, and times of its steps [s]."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, number: int, batch: tuple[Tensor, Tensor]) -> None:
        """One training step; all random numbers in it depend on its number only."""
        torch.manual_seed(_SEED + number)
        start = perf_counter()
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.times_s.append(perf_counter() - start)


def run(*, steps: int | None = None, tiny: bool = False) -> int:
    """Run the demo and print what it shows. Returns 0, or 1 if plain and optimized losses differ."""
    deadline_s = perf_counter() + (_LIMIT_S if steps is None else float("inf"))
    if steps is not None and steps < 2:
        raise FxckptError(f"the demo needs at least 2 steps, but was asked for {steps}")
    size = TINY if tiny else Size()
    text = read_text()
    vocabulary = {character: code for code, character in enumerate(sorted(set(text)))}
    batches = Batches(torch.tensor([vocabulary[character] for character in text]), size)
    torch.manual_seed(_SEED)
    plain = GPT(size, len(vocabulary))
    millions = sum(p.numel() for p in plain.parameters()) / 1e6
    print(
        f"A GPT of {millions:.1f} M parameters, with dropout, learns {len(text):,} characters of Python's own library."
    )
    print(f"Capturing its training step, and planning it at {_BUDGET_RATIO:.0%} of the plain peak …\n", flush=True)
    batch = batches.at(0)
    optimized = api.optimize(copy.deepcopy(plain), _BUDGET_RATIO, example_inputs=batch)
    figures = api.measure(plain, *batch), api.measure(optimized, *batch)
    api.print_plan(optimized, measurement=figures[1])
    runs = Run("plain", plain), Run("optimized", optimized)
    _train(runs, batches, steps or size.steps, deadline_s)
    _show_losses(*runs)
    peaks = [each.peak_bytes for each in figures]
    print(f"\nmeasured peak of a step: plain {format_bytes(peaks[0])}, optimized {format_bytes(peaks[1])}: ", end="")
    print(f"{peaks[1] / peaks[0]:.1%} of it")
    return _verdict(*runs)


def _train(runs: tuple[Run, Run], batches: Batches, steps: int, deadline_s: float) -> None:
    """Train both, taking turns. Slow machines do fewer steps: after the deadline no further one begins."""
    print(flush=True)
    with tqdm(total=steps, desc="training both", unit="step", dynamic_ncols=True) as bar:
        for number in range(steps):
            batch = batches.at(number)
            for each in runs if number % 2 else runs[::-1]:
                each.step(number, batch)
            bar.set_postfix_str(f"loss {runs[0].losses[-1]:.3f}", refresh=False)
            bar.update()
            if number + 1 >= _FEWEST_STEPS and perf_counter() > deadline_s:
                break
    done = len(runs[0].losses)
    if done < steps:
        print(f"This machine is slow or busy: stopped after {done} of {steps} steps.")


def _show_losses(plain: Run, optimized: Run) -> None:
    count = len(plain.losses)
    shown = sorted({round(i * (count - 1) / (_LINES - 1)) for i in range(_LINES)})
    table = [
        [i + 1, f"{plain.losses[i]:.9f}", f"{optimized.losses[i]:.9f}", _same(plain.losses[i], optimized.losses[i])]
        for i in shown
    ]
    print()
    print(tabulate(table, ["step", "loss, plain", "loss, optimized", ""], disable_numparse=True))


def _same(one: float, other: float) -> str:
    return "identical" if one == other else f"differs by {abs(one - other):.2e}"


def _verdict(plain: Run, optimized: Run) -> int:
    plain_s, optimized_s = (median(each.times_s[1:]) for each in (plain, optimized))
    print(
        f"median step, optimizer included: plain {format_us(plain_s * 1e6)}, optimized {format_us(optimized_s * 1e6)}: "
        f"{optimized_s / plain_s:.3f} of the plain time"
    )
    different = sum(one != other for one, other in zip(plain.losses, optimized.losses, strict=True))
    if different:
        print(f"FAILED: {different} of {len(plain.losses)} losses differ, but they must be identical.")
        return 1
    print(f"all {len(plain.losses)} losses are identical")
    return 0

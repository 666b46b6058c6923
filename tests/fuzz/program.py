"""Random models: layers of the menu in a row, each reading any values before it, and their strategy for Hypothesis.

A program is its own description: what is printed for a failure can be pasted and run.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.described import Described
from tests.fuzz.menu import IDS, IMAGE, MENU, OF_PYTHON, ROWS, SEQUENCE, VOCABULARY, Sizes

DTYPES = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}
PLAIN, LOW, FROZEN, EVALUATED = "plain", "autocast", "frozen", "evaluated"


@dataclass(frozen=True, repr=False)
class Line(Described):
    """A layer of the menu applied to values.

    Attributes:
        layer: its name.
        reads: numbers of the values that it reads: first the program's inputs, then what the lines wrote.
        dtype: what it is computed in, if not in the program's own type.
        mode: "plain", within "autocast", with "frozen" parameters, or in "evaluated" mode.
        shares: the line whose module (and so weights) it uses, if not one of its own.
    """

    layer: str
    reads: tuple[int, ...]
    dtype: str = ""
    mode: str = PLAIN
    shares: int = -1


@dataclass(frozen=True, repr=False)
class Input(Described):
    """An input of a program: its form, and whether it requires grad."""

    form: str
    requires_grad: bool = False


@dataclass(frozen=True, repr=False)
class Output(Described):
    """A value that a program returns: "whole", "transposed", in "chunks", or "detached"."""

    value: int
    how: str = "whole"

    def of(self, x: Tensor) -> Any:
        if self.how == "transposed":
            return x.transpose(0, -1)
        if self.how == "chunks":
            return x.chunk(2, -1)
        return x.detach() if self.how == "detached" else x


@dataclass(frozen=True, repr=False)
class Program(Described):
    """A model: inputs, lines, outputs."""

    inputs: tuple[Input, ...]
    lines: tuple[Line, ...]
    outputs: tuple[Output, ...]
    dtype: str = "float"
    sizes: Sizes = Sizes()  # noqa: RUF009 - it is frozen

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its inputs; the same numbers each time."""
        torch.manual_seed(0)
        return Interpreter(self), tuple(self._tensor(given) for given in self.inputs)

    def _tensor(self, given: Input) -> Tensor:
        shape = self.sizes.shape(given.form)
        if given.form == IDS:
            return torch.randint(0, VOCABULARY, shape)
        return torch.randn(shape).to(DTYPES[self.dtype]).requires_grad_(given.requires_grad)


class Interpreter(nn.Module):
    """A program as a module."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.lines = nn.ModuleList()
        for line in program.lines:
            self.lines.append(self.lines[line.shares] if line.shares >= 0 else self._made(line))

    def _made(self, line: Line) -> nn.Module:
        module = MENU[line.layer].make(self.program.sizes).to(self._dtype(line))
        return module.requires_grad_(line.mode != FROZEN)

    def _dtype(self, line: Line) -> torch.dtype:
        dtype = torch.float32 if line.mode == LOW else DTYPES[line.dtype or self.program.dtype]
        return torch.float32 if MENU[line.layer].full and dtype.itemsize < 4 else dtype

    def train(self, mode: bool = True) -> Interpreter:
        super().train(mode)
        for line, module in zip(self.program.lines, self.lines, strict=True):
            if line.mode == EVALUATED:
                module.eval()
        return self

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        values = list(inputs)
        for line, module in zip(self.program.lines, self.lines, strict=True):
            with torch.autocast("cpu", torch.bfloat16) if line.mode == LOW else contextlib.nullcontext():
                given = (values[i] for i in line.reads)
                values.append(module(*(x.to(self._dtype(line)) if x.is_floating_point() else x for x in given)))
        return tuple(output.of(values[output.value]) for output in self.program.outputs)


SIZES = st.builds(
    Sizes,
    batch=st.sampled_from((16, 1, 3, 64)),
    length=st.sampled_from((8, 1, 5)),
    width=st.sampled_from((16, 6, 32, 64)),
    channels=st.just(4),
    side=st.sampled_from((8, 4, 14)),
)


@st.composite
def programs(draw: st.DrawFn, *, most_lines: int = 10, least_stateful: int = 0) -> Program:
    """Any program; so many of its last layers read, change or draw from Python."""
    inputs = tuple(draw(st.lists(_inputs(), min_size=1, max_size=3)))
    forms = [given.form for given in inputs]
    lines: list[Line] = []
    for _ in range(draw(st.integers(1, most_lines))):
        lines.append(draw(_line(tuple(forms), tuple(lines))))
        forms.append(MENU[lines[-1].layer].writes)
    for _ in range(least_stateful):
        lines.append(_stateful(draw, forms))
        forms.append(MENU[lines[-1].layer].writes)
    values = [i for i, form in enumerate(forms) if form != IDS or i < len(inputs)]
    last = Output(len(forms) - 1, draw(st.sampled_from(("whole", "transposed", "chunks"))))
    more = st.builds(Output, st.sampled_from(values), st.sampled_from(("whole", "transposed", "chunks", "detached")))
    outputs = (last, *draw(st.lists(more, max_size=2)))
    dtype = draw(st.sampled_from(("float", "float", "float", "double", "bfloat16")))
    return Program(inputs, tuple(lines), outputs, dtype, draw(SIZES))


def _inputs() -> st.SearchStrategy[Input]:
    real = st.builds(Input, st.sampled_from((ROWS, SEQUENCE, IMAGE)), st.booleans())
    return st.one_of(real, st.just(Input(IDS)))


@st.composite
def _line(draw: st.DrawFn, forms: tuple[str, ...], before: tuple[Line, ...]) -> Line:
    """A line that reads some of the values there are, more often the latest than others."""
    latest = draw(st.sampled_from((-1, -1, -1, None)))
    form = forms[-1] if latest else draw(st.sampled_from(forms))
    layer = draw(st.sampled_from([name for name, layer in MENU.items() if _fits(layer.reads, form, forms)]))
    reads = tuple(
        _value(draw, wanted, forms, latest is not None and i == 0) for i, wanted in enumerate(MENU[layer].reads)
    )
    dtype = draw(st.sampled_from(("", "", "", "", "float", "double", "bfloat16")))
    mode = draw(st.sampled_from((PLAIN, PLAIN, PLAIN, PLAIN, LOW, FROZEN, EVALUATED)))
    same = [i for i, line in enumerate(before) if (line.layer, line.dtype, line.mode) == (layer, dtype, mode)]
    shares = draw(st.sampled_from((-1, *(i for i in same if before[i].shares < 0))))
    return Line(layer, reads, dtype, mode, shares)


def _stateful(draw: st.DrawFn, forms: list[str]) -> Line:
    """A line that has to do with Python."""
    read = draw(st.sampled_from([i for i, form in enumerate(forms) if form != IDS] or [0]))
    if forms[read] == IDS:
        return Line("embedding", (read,))
    return Line(draw(st.sampled_from([name for name in OF_PYTHON if name.endswith(f"({forms[read]})")])), (read,))


def _fits(reads: tuple[str, ...], form: str, forms: tuple[str, ...]) -> bool:
    return form in reads and all(wanted in forms for wanted in reads)


def _value(draw: st.DrawFn, form: str, forms: tuple[str, ...], latest: bool) -> int:
    fitting = [i for i, other in enumerate(forms) if other == form]
    return fitting[-1] if latest else draw(st.sampled_from(fitting[::-1]))

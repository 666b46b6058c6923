"""Ops and errors are traced back to the user's lines, and to nobody else's."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxckpt
from fxckpt.capture.joint import capture
from fxckpt.capture.provenance import is_users
from fxckpt.errors import CaptureError

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


@contextlib.contextmanager
def doubled(x: Tensor) -> Iterator[Tensor]:
    yield x * 2


class Nested(nn.Module):
    """Calls torch through the standard library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with doubled(x) as y:
            total: Tensor = functools.reduce(torch.add, [self.layer(y), x, y])
            return total


def test_the_lines_of_ops_are_the_users() -> None:
    joint = capture(Nested(), (X,))
    sources = {source for _, source in joint.places.values() if source}
    first, last = (inspect.getsourcelines(part)[1] for part in (doubled, is_in_this_file))
    assert len(sources) == 2
    for source in sources:
        file, line = source.rsplit(":", 1)
        assert file == __file__
        assert first <= int(line) < last


def is_in_this_file() -> None:
    """Below all models."""


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 1, 3))])
def test_an_error_in_no_line_of_the_users_names_none(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"^the model's forward failed while the model was captured"):
        capture(model, (X,))


def test_whose_files() -> None:
    assert is_users(__file__)
    assert not any(map(is_users, (contextlib.__file__, json.__file__, torch.__file__, fxckpt.__file__, "<string>")))
    standard = contextlib.__file__.removesuffix("contextlib.py")
    assert is_users(f"{standard}site-packages/someones/model.py")

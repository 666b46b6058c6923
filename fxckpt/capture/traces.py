"""A model's forward may leave traces on the model; each time it is traced it starts from the same state."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.errors import CaptureError
from fxckpt.upstream.generators import generators_kept

Place = tuple[dict[str, Any], str]
"""Where something is found: a dictionary and a key."""


@contextlib.contextmanager
def unchanged(model: nn.Module, expected: list[Place]) -> Iterator[None]:
    """Undo what forward leaves on the model: attributes, entries of dictionaries, hooks; and random-number state.

    Tensors are `expected` in some places.

    Raises:
        CaptureError: forward stores tensors on the model.
        NotImplementedError: it seeds the random-number generator.
    """
    before = [(module, held, dict(held)) for module in model.modules() for held in _dictionaries(module)]
    try:
        with generators_kept(_seeds):
            yield
        known = {(id(held), name) for held, name in expected}
        for module, held, content in before:
            for name, value in held.items():
                if (id(held), name) not in known and _holds_tensor(value) and not _same(value, content.get(name)):
                    _check_stored(module, held, name)
    finally:
        for _, held, content in before:
            _put_back(held, content)


def _seeds(*_: int) -> None:
    raise NotImplementedError(
        "forward seeds the random-number generator, which a captured graph can't repeat. Draw from a torch.Generator "
        "outside of the model and pass what is drawn as an argument"
    )


def _dictionaries(module: nn.Module) -> list[dict[str, Any]]:
    """A module's attributes, and the dictionaries among them: parameters, buffers, hooks, the user's own."""
    return [vars(module), *(held for held in vars(module).values() if type(held) in (dict, OrderedDict))]


def _check_stored(module: nn.Module, held: dict[str, Any], name: str) -> None:
    if held is vars(module) and type(module).__module__.startswith("torch.nn."):
        return  # recurrent modules list their parameters anew
    raise CaptureError(
        f"forward stores a tensor in attribute {name!r} of {type(module).__name__}. The optimized module can't repeat "
        "that: return the tensor instead, or register it as a buffer and update it in place"
    )


def _put_back(held: dict[str, Any], content: dict[str, Any]) -> None:
    for name in held.keys() - content.keys():
        del held[name]
    for name, value in content.items():
        if held.get(name) is not value:
            held[name] = value


def _same(new: Any, old: Any) -> bool:
    """Whether an attribute is what it was: the same object, or a list of the same objects."""
    if isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)) and len(new) == len(old):
        return all(map(_same, new, old))
    return new is old


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensor, value)))

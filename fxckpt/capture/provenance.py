"""Which module and which line of the user's code an op comes from.

While the model is traced, every torch function call is seen by a mode that walks up the Python stack: the innermost
frame whose `self` is a submodule names the module, the innermost frame outside torch the source line. Both travel to
the fx nodes through torch's own node-annotation channel, and from forward to backward nodes by autograd's sequence
number.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

from fxckpt.upstream.hooks import is_call_of_module

_KEY = "fxckpt"
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = re.compile(rf"{re.escape(os.sep)}(site|dist)-packages{re.escape(os.sep)}")  # may lie within the former
_LIBRARY = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DEMO = os.path.join(_OURS, "cli", "demo.py")  # the one file of ours with a model in it


class Provenance(TorchFunctionMode):
    """A torch-function mode that annotates nodes under construction with module path and source line."""

    def __init__(self, modules: Mapping[int, str]) -> None:
        """`modules` maps the id of each submodule to its path."""
        super().__init__()
        self._paths = modules
        self._codes: dict[int, tuple[CodeType, bool, bool]] = {}  # by id: is it the user's, does it name a `self`

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _note(fx_traceback.get_current_meta(), self._place(sys._getframe(1)))
        return func(*args, **(kwargs or {}))

    def _place(self, frame: FrameType | None) -> tuple[str, str]:
        """Module path and "file:line" of the code that is running in a frame; "" where there is none."""
        module: str | None = None
        source = ""
        while frame is not None and (module is None or not source):
            code = frame.f_code
            try:
                _, users, names_self = self._codes[id(code)]
            except KeyError:
                _, users, names_self = self._codes[id(code)] = code, is_users(code.co_filename), _names_self(code)
            if users and not source:
                source = f"{code.co_filename}:{frame.f_lineno}"
            if names_self and module is None:
                owner = frame.f_locals.get("self")
                if isinstance(owner, nn.Module):
                    module = self._paths.get(id(owner))
            frame = frame.f_back
        return module or "", source


def _names_self(code: CodeType) -> bool:
    """Whether locals are worth a look: they are a dict made anew each time."""
    return "self" in (*code.co_varnames, *code.co_freevars) and not is_call_of_module(code)


def annotate(node: fx.Node, place: tuple[str, str]) -> None:
    """What is traced while `node` is interpreted comes from this place, as far as it is known."""
    _note(node.meta, place)


def _note(meta: dict[str, Any], place: tuple[str, str]) -> None:
    if place != ("", ""):
        meta["custom"] = {**meta.get("custom", {}), _KEY: place}


def is_users(filename: str) -> bool:
    """Whether a file is the user's code: neither torch's, nor ours, nor Python's, nor generated."""
    is_standard = filename.startswith(_STANDARD) and not _INSTALLED.search(filename)
    return filename == _DEMO or not (is_standard or filename.startswith((_LIBRARY, _OURS, "<")))


def noted_place(node: fx.Node) -> tuple[str, str]:
    """Module path and source line that were noted when a node was made; "" where there is none."""
    return node.meta.get("custom", {}).get(_KEY) or ("", "")


def of_nodes(graph: fx.Graph) -> dict[fx.Node, tuple[str, str]]:
    """Module path and source line of each node; backward nodes have those of their forward node."""
    places: dict[fx.Node, tuple[str, str]] = {}
    by_sequence: dict[int, tuple[str, str]] = {}
    for node in graph.nodes:
        place = noted_place(node)
        sequence = node.meta.get("seq_nr")
        is_backward = node.meta.get("partitioner_tag") == "is_backward"
        if place != ("", "") and not is_backward:
            by_sequence[sequence] = place
        inputs = node.all_input_nodes
        if inputs and "Gradient addition" in node.meta.get("stack_trace", ""):  # it has no sequence number of its own
            place = places.get(inputs[-1], place)
        elif is_backward:
            place = by_sequence.get(sequence, place)
        places[node] = place
    return places

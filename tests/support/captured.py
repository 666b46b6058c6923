"""A capture that many plans share."""

from __future__ import annotations

from typing import Any

from fxckpt.capture.joint import JointGraph, capture


class CapturedOnce:
    """Stands in for `fxckpt.pipeline.capture` where many plans of one model are tried: captures each step only once."""

    def __init__(self) -> None:
        self._known: dict[str, JointGraph] = {}

    def __call__(self, *args: Any, tangents: Any = None, **kwargs: Any) -> JointGraph:
        key = repr(tangents)
        if key not in self._known:
            self._known[key] = capture(*args, tangents=tangents, **kwargs)
        return self._known[key]

"""Turn what goes wrong while a model is traced into a CaptureError that names the user's line and a remedy."""

from __future__ import annotations

import traceback

from fxckpt.capture.provenance import is_users
from fxckpt.errors import CaptureError
from fxckpt.upstream.fakes import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

_REMEDIES: tuple[tuple[type[BaseException], str, str], ...] = (
    (
        DataDependentOutputException,
        "reads the value of a tensor (by .item(), if, float(), or the like), which is not known when the graph is "
        "captured",
        "Compute with tensors (torch.where, masks) instead of branching on them, or move this part out of the model",
    ),
    (
        DynamicOutputShapeException,
        "makes a tensor whose shape depends on values (nonzero, boolean indexing, unique, or the like)",
        "Use a form with a fixed shape (torch.where with three arguments, masks, topk), or move this part out of the "
        "model",
    ),
    (
        UnsupportedOperatorException,
        "calls an operator that has no shape rule",
        "Register a fake implementation with torch.library.register_fake",
    ),
)


def explain(error: BaseException) -> CaptureError:
    """The CaptureError that stands for an exception raised while tracing."""
    if isinstance(error, CaptureError):
        return error
    line = _user_line(error)
    for kind, what, remedy in _REMEDIES:
        if isinstance(error, kind):
            return CaptureError(f"{line} {what}, so the model can't be captured as one graph. {remedy}")
    if "Please convert all Tensors to FakeTensors" in str(error):
        return CaptureError(
            f"{line} uses a tensor that is neither a parameter, a buffer, an input nor a plain attribute of a module. "
            "Register it as a buffer"
        )
    message = str(error).strip().split("\n")[0]
    return CaptureError(f"{line} failed while the model was captured: {type(error).__name__}: {message}")


def _user_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if is_users(frame.filename)]
    if not users:
        return "the model's forward"
    last = users[-1]
    return f"{last.filename}:{last.lineno} ({last.line or last.name})"

"""Other tracers and transforms, under which a model's tensors are not what they are in a training step."""

from __future__ import annotations

import torch

from fxckpt.upstream.dispatch import is_traced


def tracer_at_work() -> str | None:
    """What traces or transforms the code that runs now, in words; None if nothing does.

    Dynamo is not among them: what it traces asks `is_dynamo_compiling`.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func (vmap, grad, jacrev and the like)"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    if is_traced():
        return "a tracer (make_fx or the like)"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return "FakeTensorMode, where nothing is computed"
    return None

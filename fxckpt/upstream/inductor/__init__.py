"""Inductor, torch's compiler: what it takes ops apart into, and graphs compiled by it."""

from fxckpt.upstream.warned import warnings_ignored

with warnings_ignored():  # its modules warn of torch's own, which nobody can change
    import torch._inductor.compile_fx  # noqa: F401

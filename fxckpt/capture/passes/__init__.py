"""Tidy a captured graph without changing a bit of what it computes: fewer nodes, no needless copies, exact dropout.

The graph is functional (nothing is changed in place), so two nodes that are the same view of the same storage are the
same value, and a copy in the same layout is its source. Each pass is one rule, and edits the graph that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxckpt.capture.passes.batch_norm import drop_unread_statistics
from fxckpt.capture.passes.convolution import split_convolution_backward
from fxckpt.capture.passes.copies import drop_copies
from fxckpt.capture.passes.dead import drop_dead
from fxckpt.capture.passes.dense import check_dense
from fxckpt.capture.passes.dropout import exact_dropout
from fxckpt.capture.passes.exchanges import exchange_parts
from fxckpt.capture.passes.gradients import own_gradients
from fxckpt.capture.passes.losses import reduce_losses_apart
from fxckpt.capture.passes.masked import leave_out_masked
from fxckpt.capture.passes.recurrent import own_recurrent_kernels
from fxckpt.capture.passes.seeds import seeds_on_cpu
from fxckpt.capture.passes.tangents import lay_out_tangents
from fxckpt.capture.passes.views import merge_views

PASSES: tuple[Callable[[fx.Graph], None], ...] = (
    check_dense,
    lay_out_tangents,
    exchange_parts,
    seeds_on_cpu,
    exact_dropout,
    own_recurrent_kernels,
    drop_unread_statistics,
    split_convolution_backward,
    reduce_losses_apart,
    leave_out_masked,
    drop_copies,
    merge_views,
    own_gradients,
    drop_dead,
)


def clean(module: fx.GraphModule) -> None:
    """Apply all passes in place, in their order, and recompile."""
    for apply in PASSES:
        apply(module.graph)
    module.graph.lint()
    module.recompile()

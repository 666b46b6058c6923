"""Recurrent kernels keep what backward needs, and give gradients one after another."""

from __future__ import annotations

from torch import fx

from fxckpt.capture.nodes import is_selection, value
from fxckpt.upstream.ops.cudnn_rnn import CUDNN_RNN_BACKWARD, KERNEL, KERNEL_BACKWARD, in_a_row, in_one_piece
from fxckpt.upstream.ops.recurrent import RECURRENT


def own_recurrent_kernels(graph: fx.Graph) -> None:
    """Call our own ops instead of torch's, which keep it only where gradients are enabled, or need addresses."""
    for node in list(graph.nodes):
        if node.target is KERNEL_BACKWARD:
            _unnest(node)
        elif node.target is KERNEL:
            _share(node)
        node.target = RECURRENT.get(node.target, node.target)


def _share(node: fx.Node) -> None:
    """The weights in one piece, which cuDNN's kernel hands out, are those that it is given, not a copy.

    Torch remembers descriptions, and not what they share.
    """
    results, weights = value(node), [value(weight) for weight in node.args[1]]  # type: ignore[union-attr, arg-type]
    with results[0].fake_mode:
        piece = in_one_piece(weights)
    node.meta["val"] = (*results[:-1], piece)
    for picked in node.users:
        if picked.args[1] == len(results) - 1:
            picked.meta["val"] = piece


def _unnest(node: fx.Node) -> None:
    """A list among the results of cuDNN's backward becomes results like the others."""
    wanted = node.args[-1]
    firsts = sum(wanted[:-1])  # type: ignore[index, arg-type]
    node.target, node.meta["val"] = CUDNN_RNN_BACKWARD, in_a_row(value(node), wanted)  # type: ignore[arg-type]
    for picked in list(node.users):
        if picked.args[1] != len(wanted) - 1:  # type: ignore[arg-type]
            picked.args = (node, sum(wanted[: picked.args[1]]))  # type: ignore[index, arg-type]
            continue
        for weight in filter(is_selection, list(picked.users)):
            weight.args = (node, firsts + weight.args[1])  # type: ignore[operator]

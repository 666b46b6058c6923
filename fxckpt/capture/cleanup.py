"""Tidy a captured graph without changing a bit of what it computes: fewer nodes, no needless copies, exact dropout.

The graph is functional (nothing is changed in place), so two nodes that are the same view of the same storage are the
same value, and a copy in the same layout is its source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot
from torch._ops import OpOverload
from torch.nn import _reduction
from torch.utils import _pytree as pytree

from fxckpt.capture.nodes import has_effects, is_selection
from fxckpt.errors import CaptureError
from fxckpt.upstream.ops.dropout import DROPOUT, DROPOUT_BACKWARD, eager_scale
from fxckpt.upstream.ops.layout import LAID_OUT
from fxckpt.upstream.ops.recurrent import RECURRENT
from fxckpt.upstream.tensors import storage_key

aten = torch.ops.aten

_REDUCTION_PLACES: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
"""Losses that keep the memory of all their terms, and which argument says how these are reduced."""

_NONE, _MEAN = _reduction.get_enum("none"), _reduction.get_enum("mean")


def clean(module: fx.GraphModule) -> None:
    """Apply all clean-ups in place and recompile."""
    graph = module.graph
    _check_layouts(graph)
    _lay_out_tangents(graph)
    _exact_dropout(graph)
    for node in graph.nodes:
        node.target = RECURRENT.get(node.target, node.target)
    _drop_unread_statistics(graph)
    _split_convolution_backward(graph)
    _reduce_losses_apart(graph)
    _leave_out_masked(graph)
    _drop_copies(graph)
    _merge_views(graph)
    _own_gradients(graph)
    _drop_dead(graph)
    graph.lint()
    module.recompile()


def _check_layouts(graph: fx.Graph) -> None:
    for node in graph.nodes:
        values = pytree.tree_leaves(node.meta.get("val"))
        if any(isinstance(value, torch.Tensor) and value.layout is not torch.strided for value in values):
            place = node.meta.get("custom", {}).get("fxckpt", ("", ""))
            raise CaptureError(
                f"{place[1] or node.name} makes a sparse tensor ({node.target}), which can't be planned. Use dense "
                f"tensors "
                "(sparse=False in an embedding)"
            )


def _lay_out_tangents(graph: fx.Graph) -> None:
    """Tangents that arrive in another layout than their output's are given to the graph in it."""
    for node in list(graph.nodes):
        if node.target is LAID_OUT:
            (tangent,) = node.all_input_nodes
            tangent.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(tangent)
            graph.erase_node(node)


def _exact_dropout(graph: fx.Graph) -> None:
    scales: dict[fx.Node, float] = {}  # mask -> scale
    for node in list(graph.nodes):
        if node.target is aten.native_dropout.default and node.args[2]:
            x, p, _ = node.args
            value = x.meta["val"]
            if value.device.type != "cpu":
                continue
            scale = eager_scale(float(p), value.dtype)
            node.target, node.args = DROPOUT, (x, float(p), scale)
            scales |= {user: scale for user in node.users if is_selection(user) and user.args[1] == 1}
        elif node.target is aten.native_dropout_backward.default and node.args[1] in scales:
            node.target, node.args = DROPOUT_BACKWARD, (*node.args[:2], scales[node.args[1]])


def _drop_unread_statistics(graph: fx.Graph) -> None:
    """In training, the backward of batch norm takes the running statistics and does not read them:

    They need not be kept.
    """
    for node in graph.nodes:
        if node.target is aten.native_batch_norm_backward.default and node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])


def _leave_out_masked(graph: fx.Graph) -> None:
    """Results that an op is told not to compute are not there, though torch may describe them (batch norm's do)."""
    for node in graph.nodes:
        parameters = node.target._schema.arguments if isinstance(node.target, OpOverload) else ()
        masks = [n for n, parameter in enumerate(parameters) if parameter.name == "output_mask" and n < len(node.args)]
        for n in masks:
            results = zip(node.meta["val"], node.args[n], strict=True)
            node.meta["val"] = tuple(value if wanted else None for value, wanted in results)


def _split_convolution_backward(graph: fx.Graph) -> None:
    """One op for the gradients of weight and bias, another for the input's: kernels compute them apart anyway.

    So each can run when it suits: the weight's gradient needs the saved input, the other the weight alone.
    """
    for node in list(graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        *arguments, (of_input, of_weight, of_bias) = node.args
        if not of_input or not (of_weight or of_bias):
            continue
        halves = []
        for name, mask in ("weight", (False, of_weight, of_bias)), ("input", (True, False, False)):
            with graph.inserting_before(node):
                half = graph.call_function(node.target, (*arguments, list(mask)), name=f"{node.name}_{name}")
            half.meta = dict(node.meta)
            halves.append(half)
        for picked in list(node.users):
            picked.replace_input_with(node, halves[picked.args[1] == 0])
        graph.erase_node(node)


def _reduce_losses_apart(graph: fx.Graph) -> None:
    """Losses become two ops, their terms and the mean or sum of them, which is what their kernels do.

    In one, a kernel hands out its scalar in the memory of all terms, which then stays for as long as the loss does.
    """
    for node in list(graph.nodes):
        place = _REDUCTION_PLACES.get(node.target)
        if place is None:
            continue
        arguments = list(node.args) + [None] * (place - len(node.args))
        reduction = arguments[place] if len(arguments) > place else node.kwargs.get("reduction", _MEAN)
        if reduction == _NONE:
            continue
        arguments[place : place + 1] = [_NONE]
        options = {name: value for name, value in node.kwargs.items() if name != "reduction"}
        with graph.inserting_before(node):
            terms = graph.call_function(node.target, tuple(arguments), options, name=f"{node.name}_terms")
        terms.meta = dict(node.meta)
        _describe_again([terms])
        node.target = aten.mean.default if reduction == _MEAN else aten.sum.default
        node.args, node.kwargs = (terms,), {}


def _drop_copies(graph: fx.Graph) -> None:
    """Replace copies in the same layout, and detached tensors, by their source."""
    kept = {storage_key(node.meta.get("val")) for node in graph.output_node().all_input_nodes}
    changed = {storage_key(node.meta["val"]) for node in _changed_inputs(graph)}
    views: dict[int | None, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            views.setdefault(storage_key(value), {})[node] = None
    for node in list(graph.nodes):
        if node.target is aten.detach.default:
            _replace_by_source(node)
        elif _is_same_layout_copy(node, kept, changed):
            others = [view for view in views[storage_key(node.meta["val"])] if view is not node]
            if all(view.target is not aten.as_strided.default for view in others):  # else it counts from another start
                _replace_by_source(node)
                _describe_again(others)


def _replace_by_source(node: fx.Node) -> None:
    node.replace_all_uses_with(_source(node))
    node.graph.erase_node(node)


def _describe_again(nodes: Iterable[fx.Node]) -> None:
    """Nodes whose arguments have changed have the value that follows from them: views are in their source's memory."""
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _source(node: fx.Node) -> fx.Node:
    """What is copied: the last of the inputs, since `copy` is told first what it takes the form of."""
    return node.all_input_nodes[-1]


def _changed_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Placeholders whose tensors the step changes."""
    outputs = graph.output_node()
    changed = {d.mutated_input for d in outputs.meta["desc"] if isinstance(d, aot.InputMutationAOTOutput)}
    return [node for node in graph.nodes if node.op == "placeholder" and node.meta["desc"] in changed]


def _is_same_layout_copy(node: fx.Node, kept: set[int | None], changed: set[int | None]) -> bool:
    if node.target not in (aten.clone.default, aten.copy.default):
        return False
    source, copy = _source(node).meta["val"], node.meta["val"]
    same = all(getattr(source, what) == getattr(copy, what) for what in ("shape", "dtype", "device"))
    same = same and source.stride() == copy.stride()
    return same and storage_key(copy) not in kept and storage_key(source) not in changed


def _merge_views(graph: fx.Graph) -> None:
    """Of several nodes that are the same view of the same storage, keep the first."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        nobody_gives = node.op == "placeholder" and not node.users  # such a tangent shares its output's memory
        if node.op == "output" or nobody_gives or type(value) is tuple or not isinstance(value, torch.Tensor):
            continue
        if value.layout is not torch.strided:
            continue
        key = (
            storage_key(value),
            value.size(),
            value.stride(),
            value.storage_offset(),
            value.dtype,
            value.is_conj(),
            value.is_neg(),
        )
        same = first.setdefault(key, node)
        if same is not node and node.op == "call_function" and not has_effects(node):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _own_gradients(graph: fx.Graph) -> None:
    """Copy a parameter's gradient where handing it over would make torch copy it, so that the copy is planned for.

    Torch keeps a gradient without copying only if it has the parameter's layout and nobody else holds it.
    """
    output = graph.output_node()
    returned: Any = output.args[0]
    leaves = list(returned)
    placeholders = {node.meta["desc"]: node for node in graph.nodes if node.op == "placeholder"}
    given = {storage_key(node.meta["val"]) for node in placeholders.values()}
    readers = _readers_by_storage(graph)
    delivered: set[tuple[int | None, int]] = set()
    for position, (desc, node) in enumerate(zip(output.meta["desc"], leaves, strict=True)):
        if not isinstance(desc, aot.GradAOTOutput) or not isinstance(node, fx.Node):
            continue
        parameter = placeholders[desc.grad_of].meta["val"]
        gradient = node.meta["val"]
        if isinstance(desc.grad_of, aot.PlainAOTInput) or gradient.layout is not torch.strided:
            continue
        key = (storage_key(gradient), gradient.storage_offset())
        shared = key in delivered or storage_key(gradient) in given or readers.get(storage_key(gradient))
        delivered.add(key)
        if shared or (gradient.stride() != parameter.stride() and parameter.is_contiguous()):
            with graph.inserting_before(output):
                copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
            copy.meta = {
                "val": torch.empty_like(gradient, memory_format=torch.contiguous_format),
                "seq_nr": node.meta.get("seq_nr"),
                "partitioner_tag": "is_backward",
                "custom": node.meta.get("custom", {}),
            }
            leaves[position] = copy
    output.args = (type(returned)(leaves),)


def _readers_by_storage(graph: fx.Graph) -> dict[int | None, int]:
    """How many ops read each storage, not counting nodes that only make views of it."""
    counts: dict[int | None, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_selection(node):
            continue
        own = storage_key(node.meta.get("val"))
        for source in {storage_key(n.meta.get("val")) for n in node.all_input_nodes} - {None, own}:
            counts[source] = counts.get(source, 0) + 1
    return counts


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not has_effects(node):
            graph.erase_node(node)

"""Outputs that other outputs are computed from, as logits are from features.

Autograd knows the ways by which gradients get from one output to another. What a gradient is the sum of, and in which
order, depends on them: so they are looked for in autograd's own graph, while a model is traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.autograd.graph import Node, get_gradient_edge

from fxckpt.capture.roles import Arrival, Exchanged, Lead
from fxckpt.upstream.dispatch import place_in_order
from fxckpt.upstream.ops.exchange import EXCHANGE


def leads(sources: Sequence[torch.Tensor]) -> dict[int, Lead]:
    """Of tensors with gradients, those that others are computed from, by number."""
    edges = [get_gradient_edge(source) for source in sources]
    ways: Counter[tuple[Node, int]] = Counter()
    reached: dict[tuple[Node, int], int] = {}  # bit i: a gradient comes from source i
    passed: dict[Node, int] = {}
    for number, edge in enumerate(edges):
        passed[edge.node] = passed.get(edge.node, 0) | 1 << number
    for node in _in_order_of_backward(passed):
        for behind, number in node.next_functions:
            if behind is not None:
                ways[behind, number] += 1
                reached[behind, number] = reached.get((behind, number), 0) | passed[node]
                passed[behind] = passed.get(behind, 0) | passed[node]
    found = {}
    for number, edge in enumerate(edges):
        place = edge.node, edge.output_nr
        if ways[place]:
            followers = frozenset(i for i in range(len(edges)) if reached[place] >> i & 1)
            found[number] = Lead(ways[place], place_in_order(edge.node), followers)
    return found


def _in_order_of_backward(nodes: Iterable[Node]) -> list[Node]:
    """The nodes and all behind them, each behind those that it gets gradients from."""
    pending = list(nodes)
    seen = set(pending)
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return sorted((node for node in seen if node.next_functions), key=place_in_order, reverse=True)


def exchange(sources: Sequence[torch.Tensor], arrivals: Mapping[int, Arrival]) -> None:
    """In the backward that is traced, hand over the gradients of those tensors that `arrivals` says so of."""
    for number, arrival in arrivals.items():
        if isinstance(arrival, Exchanged):
            sources[number].register_hook(_exchanged(number, arrival.stride))


def _exchanged(number: int, stride: tuple[int, ...] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: EXCHANGE([gradient], number, stride)

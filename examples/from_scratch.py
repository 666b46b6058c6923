"""Activation checkpointing as a graph pass, from scratch: nothing but torch and torch.fx.

A training step saves what forward computes until backward has read it. That is most of its memory. Checkpointing saves
less and computes the rest again. Once forward and backward stand in one graph, that is a small edit of the graph: give
backward its own copies of some forward ops, just before it needs them. This file does that, and shows what comes of it.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx


class Net(nn.Module):
    """16 residual layers."""

    def __init__(self, width: int = 256, layers: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.sigmoid(nn.functional.gelu(layer(x)))
        return x.square().mean()


# 1. Capture. make_fx runs a function and writes down every ATen op: with autograd inside, those of backward too.
def capture(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    names, parameters = zip(*model.named_parameters(), strict=True)

    def step(parameters: list[Tensor], x: Tensor) -> list[Tensor]:
        loss = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return [loss, *torch.autograd.grad(loss, parameters)]

    return make_fx(step)(list(parameters), x), [*parameters, x]


# 2. Rewrite. A forward value that is not kept gets a copy, made just before the first backward op that reads it.


def forward_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What is computed up to the loss, which is the first output."""
    nodes = list(graph.nodes)
    loss = nodes[-1].args[0][0]
    return [node for node in nodes[: nodes.index(loss)] if node.op == "call_function"]


def rewrite(module: fx.GraphModule, keep: Callable[[list[fx.Node]], Collection[fx.Node]]) -> fx.GraphModule:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}  # from the nodes of the old graph to those of the new one
    graph.output(graph.graph_copy(module.graph, new))  # copy everything, then change the copy
    nodes = list(graph.nodes)
    forward = forward_nodes(graph)
    dropped = set(forward) - {new[node] for node in keep(forward_nodes(module.graph))}
    copies: dict[fx.Node, fx.Node] = {}

    def remade(value: fx.Node) -> fx.Node:
        """What backward reads instead of a forward value: itself if it is kept, else a copy made from what is kept."""
        if value not in dropped:
            return value
        if value not in copies:
            copies[value] = graph.node_copy(value, remade)  # is put at the insertion point: just before the reader
        return copies[value]

    for node in nodes[nodes.index(forward[-1]) + 2 : -1]:  # backward: after the loss, without the output
        with graph.inserting_before(node):
            node.args = fx.map_arg(node.args, remade)
    graph.eliminate_dead_code()  # forward ops that nobody reads any more, such as views made for backward
    graph.lint()
    return fx.GraphModule(module, graph)


# 3. Run. fx's interpreter forgets a value after its last reader: memory follows from where the readers stand.


class Meter(fx.Interpreter):
    """Runs a graph and notes the most bytes that its values (parameters and inputs aside) ever take."""

    peak_bytes = 0

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        values = [v for node, v in self.env.items() if node.op != "placeholder"] + [result] * (n.op == "call_function")
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}  # views count once
        self.peak_bytes = max(self.peak_bytes, sum(storages.values()))
        return result


# 4. Decide. What to keep is the whole question; these are four simple answers.


def matmuls_and_sums(nodes: list[fx.Node]) -> list[fx.Node]:
    """Remake what is cheap. (Views must go too: a view that is kept keeps what it is a view of.)"""
    return [node for node in nodes if node.target in (torch.ops.aten.addmm.default, torch.ops.aten.add.Tensor)]


def every_fourth_layer(nodes: list[fx.Node]) -> list[fx.Node]:
    """Keep √n of the layers' outputs and remake four layers at a time (Chen et al. 2016, arXiv:1604.06174)."""
    return [node for node in nodes if node.target is torch.ops.aten.add.Tensor][3::4]


def nothing(_: list[fx.Node]) -> list[fx.Node]:
    """Repeats all of forward, and saves nothing indeed: when backward starts, it needs everything at once."""
    return []


if __name__ == "__main__":
    torch.manual_seed(0)
    joint, inputs = capture(Net(), torch.randn(2048, 256))
    expected = joint(inputs[:-1], inputs[-1])
    print(f"{'keep':<22}{'ops':>6}{'matmuls':>10}{'peak':>12}   gradients")
    for policy in (list, matmuls_and_sums, every_fourth_layer, nothing):
        meter = Meter(lean := rewrite(joint, policy))
        result = meter.run(*inputs)
        targets = [str(node.target) for node in lean.graph.nodes if node.op == "call_function"]
        matmuls = sum("mm" in target for target in targets)
        same = "identical" if all(map(torch.equal, expected, result)) else "DIFFERENT"
        name = "everything" if policy is list else policy.__name__.replace("_", " ")
        print(f"{name:<22}{len(targets):>6}{matmuls:>10}{meter.peak_bytes / 2**20:>8.1f} MiB   {same}")

"""`torch.compile(model, backend="fxckpt", options={"memory_budget": "8GB"})`: each graph planned and run as one step.

The entry point in the group `torch_dynamo_backends` makes the name known to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fxckpt.errors import BudgetError
from fxckpt.module.planned_graph import NothingToPlan, PlannedGraph
from fxckpt.module.planning import Planning
from fxckpt.options import read_options
from fxckpt.upstream.dynamo import traced_graph


def fxckpt(
    module: fx.GraphModule, examples: list[Any], *, options: Mapping[str, Any] | None = None, **more: Any
) -> Callable[..., Any]:
    """A backend of torch.compile.

    Args:
        module, examples: a graph of Dynamo's and the inputs that it was made for.
        options: `memory_budget` and how to plan, as for `fxckpt.optimize`.
        **more: the same, for whoever hands them over one by one.

    Raises:
        BudgetError: there is no budget, or it makes no sense.
    """
    given = {**(options or {}), **more}
    given.pop("mode", None)
    if "memory_budget" not in given:
        raise BudgetError(
            'torch.compile(model, backend="fxckpt") needs a budget: options={"memory_budget": "8GB"}, or a fraction of '
            "the plain model's peak"
        )
    budget = given.pop("memory_budget")
    planned = PlannedGraph(Planning(read_options(budget, given)), traced_graph(module, examples), None)

    def run(*inputs: Any) -> Any:
        try:
            return planned.run(inputs)
        except NothingToPlan:
            return module.forward(*inputs)

    return run

"""A function planned behind Dynamo: it guards what was read, replays what was changed, traces anew."""

from __future__ import annotations

import contextlib
import functools
import random
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from fxckpt.errors import ReplanningWarning
from fxckpt.module.function import FunctionModule
from fxckpt.module.planned_graph import CHECK, PREPARING, PlannedGraph, Prepared
from fxckpt.module.planning import Planning
from fxckpt.module.refused import check_plannable
from fxckpt.pipeline import Compiled
from fxckpt.steps.equivalence import check_same_graph
from fxckpt.upstream.dynamo import Traced, TracedGraph

_MANY = 5
"""So many plans in a row, one a call, are worth a word."""
_GRAPHS_A_PLAN = 4


class Front:
    """A function and its plans, one for each graph that Dynamo makes of it.

    Attributes:
        planning: what was planned.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module | None, planning: Planning) -> None:
        """`model` is the one whose paths name modules and parameters."""
        self.planning = planning
        self._draws = False  # whether a graph has inputs that Python's `random` draws before it runs
        self._model = model
        self._checks = self._checked_forward(function)
        self._graphs: list[PlannedGraph] = []
        self._made_in_a_row = 0
        reference = weakref.ref(self)

        def make(graph: TracedGraph) -> Callable[..., Any]:
            owner = reference()
            assert owner is not None
            return owner._make(graph)

        self._traced = Traced(function, make, one_graph=not planning.options.graph_breaks)

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result, planned.

        Raises: in each case Python's random numbers are those of before.
            NotTraced: the function can't be traced.
            NothingToPlan: it computes nothing that can be differentiated.
            CaptureError: its graph can't be captured.
        """
        drawn = random.getstate() if self._draws else None
        try:
            if self._checks is None:
                return self._call(args, kwargs)
            with self._checked(args, kwargs):
                return self._call(args, kwargs)
        except BaseException:
            state = drawn or self._traced.random_state
            if state is not None:
                random.setstate(state)
            raise

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if len(self._graphs) > _GRAPHS_A_PLAN * self.planning.options.max_plans:  # their programs are gone already
            self._traced.forget()
            self._graphs.clear()
        before = len(self._graphs)
        result = self._traced(*args, **kwargs)
        self._made_in_a_row = self._made_in_a_row + 1 if len(self._graphs) > before else 0
        if self._made_in_a_row == _MANY:
            warnings.warn(
                f"the last {_MANY} calls in a row were captured and planned anew each, at the cost of time and memory. "
                f"What changed last: {self._traced.why_again or 'unknown'}. Pass it as a tensor, or pad to few sizes",
                ReplanningWarning,
                stacklevel=6,
            )
        return result

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Plan for these arguments. Nothing is computed.

        Raises:
            NotTraced, CaptureError: as for `call`.
        """
        if self.planning.options.graph_breaks:  # what the second graph is given the first one would have to compute
            return
        token, drawn = PREPARING.set(True), random.getstate()
        try:
            with self._checked(args, kwargs):
                self._traced(*args, **kwargs)
        except Prepared:
            pass
        finally:
            PREPARING.reset(token)
            random.setstate(drawn)

    def _checked_forward(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The function for any copy of the model, if what is traced of it is to be compared with it and can be."""
        own: Any = getattr(function, "__func__", None)
        is_models = self._model is not None and getattr(function, "__self__", None) is self._model
        wanted = self.planning.options.verify and not isinstance(self._model, FunctionModule)
        return own if is_models and wanted else None

    @contextlib.contextmanager
    def _checked(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """If that is wanted, what is traced meanwhile is compared with the model before it runs."""
        model, own = self._model, self._checks
        if model is None or own is None:
            yield
            return

        def traced(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
            one_graph = not self.planning.options.graph_breaks
            return Traced(types.MethodType(own, twin), lambda graph: graph.module.forward, one_graph=one_graph)(
                *args, **kwargs
            )

        token = CHECK.set(functools.partial(check_same_graph, model, own, traced, (tuple(args), kwargs)))
        try:
            yield
        finally:
            CHECK.reset(token)

    def compiled(self) -> list[Compiled]:
        """What was planned so far."""
        return [entry.expected for graph in self._graphs for entry in graph.entries()]

    def _make(self, graph: TracedGraph) -> Callable[..., Any]:
        if self._model is not None:
            check_plannable(self._model)
        self._draws |= any("random_value" in source for source in graph.sources)
        planned = PlannedGraph(self.planning, graph, self._model)
        self._graphs.append(planned)
        return planned.run_weakly()

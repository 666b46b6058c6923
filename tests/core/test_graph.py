import doctest
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxckpt.core import graph as graph_module
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.solvers.keep import closure
from fxckpt.errors import PlanFormatError
from tests.support.strategies import chain, graphs, graphs_with_alternatives, training_steps


def test_derived_facts_of_a_chain() -> None:
    graph = chain()  # x, w0-3, a0-3, tangent, ga2, gw3, ga1, gw2, ga0, gw1, gw0
    assert graph.producer == (-1, -1, -1, -1, -1, 0, 1, 2, 3, -1, 4, 4, 5, 5, 6, 6, 7)
    assert graph.static_bytes == 7 + 4 * 4
    assert graph.with_gradients(allocated=True).static_bytes == 7 + 2 * 4 * 4
    assert replace(graph, reserved_bytes=1000).static_bytes == 1023
    assert graph.step_us == (1 + 2 + 3 + 4) * 3
    assert graph.replayed == frozenset()


def test_gradients_fresh_or_allocated_is_one_graph_seen_twice() -> None:
    graph = chain()
    assert graph.with_gradients(allocated=False) is graph
    assert graph.with_gradients(allocated=True).with_gradients(allocated=False) == graph
    assert graph.with_gradients(allocated=True).fingerprint == graph.fingerprint


def test_a_stage_is_a_part_of_all_gradients_and_never_nothing() -> None:
    assert chain(weight_bytes=640).stage_bytes == 4 * 640 // 8
    assert chain(weight_bytes=640).with_gradients(allocated=True).stage_bytes == 4 * 640 // 128
    assert chain(weight_bytes=0).stage_bytes == 1


@given(graphs())
def test_json_round_trip(graph: Graph) -> None:
    graph.check()
    copy = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert copy == graph
    assert copy.fingerprint == graph.fingerprint


def change(graph: Graph, index: int, **changes: Any) -> Graph:
    """The graph with one op changed."""
    return replace(graph, ops=(*graph.ops[:index], replace(graph.ops[index], **changes), *graph.ops[index + 1 :]))


@pytest.mark.parametrize("changes", [{"target": "other"}, {"signature": "other"}, {"pinned": "now"}, {"reads": (0,)}])
def test_the_fingerprint_depends_on_what_runs(changes: dict[str, Any]) -> None:
    assert change(chain(), 1, **changes).fingerprint != chain().fingerprint


def test_the_fingerprint_depends_on_sizes_and_roles() -> None:
    graph = chain()
    others = [
        chain((10, 20, 41)),
        chain((10, 20)),
        replace(graph, outputs=()),
        replace(graph, gradients=graph.gradients[1:]),
        replace(graph, updates=(5,)),
    ]
    assert len({g.fingerprint for g in (graph, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "changes", [{"time_us": 99.0}, {"name": "other"}, {"module": "a.b"}, {"source": "c.py:1"}, {"workspace_bytes": 5}]
)
def test_the_fingerprint_does_not_depend_on_times_and_places(changes: dict[str, Any]) -> None:
    assert change(chain(), 1, **changes).fingerprint == chain().fingerprint


def test_the_fingerprint_does_not_depend_on_the_process() -> None:
    empty = Graph(ops=(), storages=(), forward_count=0)
    assert len(empty.fingerprint) == 16
    assert empty.fingerprint == "75bc336140dd16dc"  # sha256 of "[[], [], [0, [], [], []]]"


not_whole: dict[str, Any] = {"size_bytes": 1.5}
unknown_kind: dict[str, Any] = {"kind": "cache"}
BROKEN: dict[str, Callable[[Graph], Graph]] = {
    "forward_count beyond the ops": lambda g: replace(g, forward_count=9),
    "forward_count negative": lambda g: replace(g, forward_count=-1),
    "negative size": lambda g: replace(g, storages=(Storage("x", -1, "input"), *g.storages[1:])),
    "size that is not whole": lambda g: replace(g, storages=(replace(g.storages[0], **not_whole), *g.storages[1:])),
    "unknown kind": lambda g: replace(g, storages=(replace(g.storages[0], **unknown_kind), *g.storages[1:])),
    "output that is not there": lambda g: replace(g, outputs=(99,)),
    "gradient that is not there": lambda g: replace(g, gradients=(-1,)),
    "read that is not there": lambda g: change(g, 0, reads=(99,)),
    "write that is not there": lambda g: change(g, 0, writes=(-1,)),
    "replay that is not there": lambda g: change(g, 0, replay=(99,)),
    "read before it is written": lambda g: change(g, 0, reads=(6,)),
    "tangent read in forward": lambda g: change(g, 3, reads=(9,)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_graphs_are_refused(what: str) -> None:
    graph = BROKEN[what](chain())
    with pytest.raises(ValueError, match=r"storage|forward_count|reads"):
        graph.check()
    with pytest.raises(PlanFormatError, match="not a graph written by fxckpt"):
        Graph.from_dict(json.loads(json.dumps(graph.to_dict())))


@pytest.mark.parametrize("key", ["ops", "storages", "forward_count", "outputs", "gradients", "reserved_bytes"])
def test_a_missing_part_is_refused(key: str) -> None:
    data = chain().to_dict()
    del data[key]
    with pytest.raises(PlanFormatError, match=key):
        Graph.from_dict(data)


def test_columns_of_unequal_length_are_refused() -> None:
    data = chain().to_dict()
    data["ops"]["name"].append("one more")
    with pytest.raises(PlanFormatError, match="shorter"):
        Graph.from_dict(data)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(graph_module)
    assert result.attempted > 0
    assert result.failed == 0


@given(graphs_with_alternatives())
def test_networkx_has_every_op_storage_and_arc(graph: Graph) -> None:
    net = graph.to_networkx(alternatives=True)
    ops = {index: data for (kind, index), data in net.nodes(data=True) if kind == "op"}
    storages = {index: data for (kind, index), data in net.nodes(data=True) if kind == "storage"}
    assert [Op(**{k: v for k, v in ops[i].items() if k != "part"}) for i in range(len(ops))] == list(graph.ops)
    assert [Storage(**storages[i]) for i in range(len(storages))] == list(graph.storages)
    parts = [ops[i]["part"] for i in range(len(ops))]
    backward = graph.plain_count - graph.forward_count
    assert parts == ["forward"] * graph.forward_count + ["backward"] * backward + ["alternative"] * graph.alternatives
    for index, op in enumerate(graph.ops):
        assert {s for _, s in net.predecessors(("op", index))} == set(op.reads)
        assert {s for _, s in net.successors(("op", index))} == set(op.writes)
    assert nx.is_bipartite(net)


@given(graphs_with_alternatives())
def test_the_plain_step_is_a_network_without_circles(graph: Graph) -> None:
    net = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(net)
    assert sum(kind == "op" for kind, _ in net) == graph.plain_count
    assert nx.dag_longest_path_length(net, weight="time_us") <= graph.step_us
    assert all(net.nodes[node]["place"] == "device" for node in net if node[0] == "storage")


@given(training_steps(), st.data())
def test_what_must_run_again_is_what_leads_there(graph: Graph, data: st.DataObject) -> None:
    activations = [i for i, s in enumerate(graph.storages) if s.kind == "activation"]
    needed = data.draw(st.lists(st.sampled_from(activations), max_size=3))
    live = set(data.draw(st.lists(st.sampled_from(activations), max_size=4)))
    net = graph.to_networkx()
    net.remove_nodes_from([("storage", s) for s in live])
    before = {a for s in needed if s not in live for a in nx.ancestors(net, ("storage", s))}
    assert closure(graph, needed, live) == sorted(index for kind, index in before if kind == "op")


def test_replayed_storages_may_be_read_by_their_op_only_through_replay() -> None:
    draw = Op("draw", "rand", reads=(), writes=(0,), replay=(1,))
    graph = Graph((draw,), (Storage("y", 4, "activation"), Storage("state", 8, "activation")), 1, outputs=(0,))
    graph.check()
    assert graph.replayed == {1}
    assert graph.producer == (0, -1)

"""Hypothesis strategies for graphs and schedules, and small graphs with numbers that a reader can check by hand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from fxckpt.core.graph import Engine, Graph, Op, Place, Storage, StorageKind
from fxckpt.core.schedule import Schedule, plain

sizes = st.sampled_from((0, 1, 2, 3, 5, 8, 100))


@st.composite
def graphs(draw: st.DrawFn, *, most_forward: int = 6, most_backward: int = 6) -> Graph:
    """Any training step that `Graph.check` accepts and the plain schedule runs: odd ones too.

    Ops may read nothing or write nothing, storages may be empty, gradients may be tangents that pass through.
    """
    storages: list[Storage] = []

    def add(kind: StorageKind) -> int:
        storages.append(Storage(f"{kind}{len(storages)}", draw(sizes), kind))
        return len(storages) - 1

    given_kinds: tuple[StorageKind, ...] = ("parameter", "buffer", "input")
    given = [add(kind) for kind in draw(st.lists(st.sampled_from(given_kinds), max_size=3))]
    tangents = [add("tangent") for _ in range(draw(st.integers(0, 2)))]
    forward_count = draw(st.integers(0, most_forward))
    backward_count = draw(st.integers(0, most_backward))
    available, results = list(given), list(tangents)
    activations: list[int] = []
    ops: list[Op] = []
    for position in range(forward_count + backward_count):
        in_forward = position < forward_count
        if position == forward_count:
            available += tangents
        writes = tuple(add("activation" if in_forward else "backward") for _ in range(draw(st.integers(0, 2))))
        pinned = draw(st.sampled_from(("", "", "", "it has effects")))
        replay = () if pinned else tuple(add("activation") for _ in range(draw(st.sampled_from((0, 0, 0, 1)))))
        ops.append(
            Op(
                name=f"op{position}",
                target=draw(st.sampled_from(("cheap", "dear"))),
                reads=tuple(draw(st.lists(st.sampled_from(available), max_size=3, unique=True)) if available else ()),
                writes=writes,
                replay=replay,
                time_us=float(draw(st.integers(0, 5))),
                workspace_bytes=draw(sizes),
                pinned=pinned,
                ordered=draw(st.booleans()) and draw(st.booleans()),
            )
        )
        available += writes
        (activations if in_forward else results).extend(writes)
    gradients = _some(draw, results if backward_count else [])
    return Graph(
        ops=tuple(ops),
        storages=tuple(storages),
        forward_count=forward_count,
        outputs=_some(draw, activations),
        updates=_some(draw, activations),
        gradients=gradients,
        gradients_allocated=draw(st.booleans()),
        allocated_gradient_bytes=sum(storages[s].size_bytes for s in gradients),
        reserved_bytes=draw(sizes),
    )


def _some(draw: st.DrawFn, items: list[int]) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from(items), max_size=3, unique=True))) if items else ()


@st.composite
def schedules(draw: st.DrawFn, graph: Graph, *, most_repeats: int = 6) -> Schedule:
    """A valid schedule: the plain one with ops repeated anywhere after their first run, in forward too."""
    order, forward_steps = list(plain(graph).order), graph.forward_count
    free = [i for i, op in enumerate(graph.plain_ops) if not op.pinned]
    for index in draw(st.lists(st.sampled_from(free), max_size=most_repeats)) if free else ():
        place = draw(st.integers(order.index(index) + 1, len(order)))
        if place < forward_steps or (place == forward_steps and index < graph.forward_count and draw(st.booleans())):
            forward_steps += 1
        order.insert(place, index)
    return Schedule(tuple(order), forward_steps)


@st.composite
def graphs_with_schedules(draw: st.DrawFn) -> tuple[Graph, Schedule]:
    """A graph and a valid schedule of it."""
    graph = draw(graphs())
    return graph, draw(schedules(graph))


def with_offload(graph: Graph, storage: int, *, out_us: float = 0.0, in_us: float = 0.0) -> Graph:
    """The graph with three alternatives more: a storage is sent to the host, waited for, and fetched again.

    What is waited for is in memory no longer: `sent` takes no time and is the last that reads the original.
    """
    name, size_bytes = graph.storages[storage].name, graph.storages[storage].size_bytes
    host = len(graph.storages)
    ops = (
        Op(f"send_{name}", "send", (storage,), (host,), time_us=out_us, engine="copy_out"),
        Op(f"sent_{name}", "sent", (host,), ()),
        Op(f"fetch_{name}", "fetch", (host,), (storage,), time_us=in_us, engine="copy_in"),
    )
    return replace(
        graph,
        ops=(*graph.ops, *ops),
        storages=(*graph.storages, Storage(f"{name}.host", size_bytes, "activation", "host")),
        alternatives=graph.alternatives + len(ops),
    )


engines: st.SearchStrategy[Engine] = st.sampled_from(("compute", "network", "copy_out", "copy_in"))


@st.composite
def graphs_with_alternatives(draw: st.DrawFn, *, most: int = 5) -> Graph:
    """A training step with other ways to have some of its storages, and ops that other engines carry out."""
    graph = draw(graphs())
    ops = [replace(op, engine="network") if draw(st.booleans()) and draw(st.booleans()) else op for op in graph.ops]
    storages = list(graph.storages)
    written = [s for op in ops for s in op.writes]
    readable = [*written, *(i for i, s in enumerate(storages) if s.kind in ("parameter", "input", "tangent"))]
    places: tuple[Place, ...] = ("host", "disk", "device")
    count = draw(st.integers(0, most))
    for number in range(count):
        writes: tuple[int, ...] = tuple(draw(st.lists(st.sampled_from(written), max_size=1)) if written else ())
        if draw(st.booleans()):
            storages.append(Storage(f"copy{number}", draw(sizes), "activation", draw(st.sampled_from(places))))
            writes += (len(storages) - 1,)
        engine: Engine = draw(engines)
        reads = tuple(draw(st.lists(st.sampled_from(readable), max_size=2, unique=True)) if readable else ())
        time_us, pinned = float(draw(st.integers(0, 5))), draw(st.sampled_from(("", "", "once")))
        ops.append(Op(f"way{number}", "way", reads, writes, time_us=time_us, pinned=pinned, engine=engine))
        readable += [s for s in writes if s >= len(graph.storages)]
    return replace(graph, ops=tuple(ops), storages=tuple(storages), alternatives=count)


@st.composite
def schedules_with_alternatives(draw: st.DrawFn, graph: Graph) -> Schedule:
    """A valid schedule of a graph, with some of its alternatives anywhere where what they read is there."""
    schedule = draw(schedules(graph))
    order, split = list(schedule.order), schedule.forward_steps
    for index in (
        draw(st.lists(st.integers(graph.plain_count, len(graph.ops) - 1), max_size=6)) if graph.alternatives else ()
    ):
        if graph.ops[index].pinned and index in order:
            continue
        starts = []
        for storage in graph.ops[index].reads:
            made = [step for step, op in enumerate(order) if storage in graph.ops[op].writes]
            given = {"tangent": split}.get(graph.storages[storage].kind, 0)
            needs_op = graph.producer[storage] >= 0 or bool(graph.ways[storage])
            starts.append(given if not needs_op else made[0] + 1 if made else len(order) + 1)
        low = max(starts, default=0)
        if low > len(order):
            continue
        place = draw(st.integers(low, len(order)))
        late = any(graph.storages[s].kind == "tangent" for s in graph.ops[index].reads)
        if place < split or (place == split and not late and draw(st.booleans())):
            split += 1
        order.insert(place, index)
    return Schedule(tuple(order), split)


@st.composite
def steps_with_alternatives(draw: st.DrawFn) -> tuple[Graph, Schedule]:
    """A graph with alternatives, and a valid schedule of it."""
    graph = draw(graphs_with_alternatives())
    return graph, draw(schedules_with_alternatives(graph))


def chain(sizes_bytes: tuple[int, ...] = (10, 20, 40), *, weight_bytes: int = 4, last_bytes: int = 1) -> Graph:
    """Layers in a row: forward op i turns activation i-1 into activation i, backward goes the other way.

    Op f<i> takes i+1 µs and reads the weight w<i> and the activation before it; op b<i> takes 2(i+1) µs, reads the
    gradient of activation i, the weight and the activation before, and writes the gradients of that activation (but not
    of the input) and of the weight. The last activation, of `last_bytes`, is the output; its gradient is the tangent.
    """
    sizes_bytes = (*sizes_bytes, last_bytes)
    layers = len(sizes_bytes)
    storages = [Storage("x", 7, "input")]
    storages += [Storage(f"w{i}", weight_bytes, "parameter") for i in range(layers)]
    activation = [0] + [len(storages) + i for i in range(layers)]
    storages += [Storage(f"a{i}", size, "activation") for i, size in enumerate(sizes_bytes)]
    gradient = {layers - 1: len(storages)}
    storages.append(Storage("tangent", last_bytes, "tangent"))
    weight_gradient: dict[int, int] = {}
    ops = [
        Op(f"f{i}", "layer", (activation[i], 1 + i), (activation[i + 1],), time_us=float(i + 1), flops=10 * (i + 1))
        for i in range(layers)
    ]
    for i in reversed(range(layers)):
        if i:
            gradient[i - 1] = len(storages)
            storages.append(Storage(f"ga{i - 1}", sizes_bytes[i - 1], "backward"))
        weight_gradient[i] = len(storages)
        storages.append(Storage(f"gw{i}", weight_bytes, "backward"))
        reads = (gradient[i], 1 + i, activation[i])
        writes = (gradient[i - 1], weight_gradient[i]) if i else (weight_gradient[i],)
        ops.append(Op(f"b{i}", "layer_backward", reads, writes, time_us=2.0 * (i + 1), flops=20 * (i + 1)))
    gradients = tuple(weight_gradient[i] for i in range(layers))
    return Graph(
        ops=tuple(ops),
        storages=tuple(storages),
        forward_count=layers,
        outputs=(activation[-1],),
        gradients=gradients,
        allocated_gradient_bytes=weight_bytes * layers,
    )


@st.composite
def training_steps(draw: st.DrawFn, *, most_layers: int = 8) -> Graph:
    """A forward pass with skips and a backward pass that belongs to it.

    Layer i reads the activation before it and sometimes an earlier one too. Its backward reads the gradient of its
    output and some of its inputs and output; where an activation has several readers, gradients are added up.
    """
    layers = draw(st.integers(1, most_layers))
    storages = [Storage("x", draw(sizes), "input")]

    def add(name: str, kind: StorageKind, size_bytes: int) -> int:
        storages.append(Storage(name, size_bytes, kind))
        return len(storages) - 1

    values, ops, inputs = [0], [], []
    for i in range(layers):
        reads = [values[-1], *draw(st.lists(st.sampled_from(values), max_size=1))]
        inputs.append(tuple(dict.fromkeys(reads)))
        weight = add(f"w{i}", "parameter", draw(sizes))
        values.append(add(f"a{i}", "activation", draw(sizes)))
        pinned = draw(st.sampled_from(("", "", "", "", "it has effects")))
        time_us = float(draw(st.integers(0, 9)))
        ops.append(Op(f"f{i}", "f", (*inputs[i], weight), (values[-1],), time_us=time_us, flops=i % 2, pinned=pinned))
    flow = {values[-1]: add("tangent", "tangent", storages[values[-1]].size_bytes)}
    gradients = []
    for i in reversed(range(layers)):
        output = values[i + 1]
        if output not in flow:
            continue
        saved = draw(st.lists(st.sampled_from((*inputs[i], output)), unique=True))
        gradients.append(add(f"gw{i}", "backward", storages[ops[i].reads[-1]].size_bytes))
        ops.append(Op(f"w{i}b", "w", tuple(dict.fromkeys((flow[output], *saved))), (gradients[-1],), time_us=2.0))
        for value in inputs[i]:
            if value:
                written = add(f"g{i}_{value}", "backward", storages[value].size_bytes)
                ops.append(
                    Op(f"b{i}_{value}", "b", tuple(dict.fromkeys((flow[output], *saved))), (written,), time_us=3.0)
                )
                if value in flow:
                    total = add(f"s{i}_{value}", "backward", storages[value].size_bytes)
                    ops.append(Op(f"s{i}_{value}b", "add", (flow[value], written), (total,), time_us=1.0))
                    written = total
                flow[value] = written
    return Graph(
        ops=tuple(ops),
        storages=tuple(storages),
        forward_count=layers,
        outputs=(values[-1],),
        gradients=tuple(gradients),
        gradients_allocated=draw(st.booleans()),
        allocated_gradient_bytes=sum(storages[s].size_bytes for s in gradients),
    )

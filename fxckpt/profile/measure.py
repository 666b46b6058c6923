"""The measuring cost model: run each distinct op of a graph on its device.

All are run for their workspaces, one run each after a warm-up. For times only those are run that matter: beginning
with the ops that by estimate take most of the step, until the rest is less than a hundredth of it. The rest is
estimated, on the scale of what was measured: if estimates are wrong by half, the step's time is by half a percent.

Results are kept for the life of the process, by the form of the op and the settings that it depends on; `known`
keeps them longer. What can't be run by itself is estimated, see `standalone`.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import fx

from fxckpt.capture.nodes import device
from fxckpt.errors import MeasuringWarning
from fxckpt.profile import private
from fxckpt.profile.build import CostModel, OpCost, written_bytes
from fxckpt.profile.clock import clock_of
from fxckpt.profile.estimate import count_flops
from fxckpt.profile.known import KNOWN, Key, key_of
from fxckpt.profile.standalone import Call, NoMemory, NotRunnable, Standalone, try_run, with_memory
from fxckpt.profile.workspace import workspaces

_LEFT_OUT = 0.01  # the share of the step's estimated time that is not measured
_LONGEST_S = 60.0  # when measuring times has taken so long, the rest is estimated


def measured(
    nodes: Sequence[fx.Node], estimate: CostModel, *, times: bool, given: Mapping[fx.Node, torch.Tensor] | None = None
) -> CostModel:
    """Measure what is not known yet, and give the costs.

    Args:
        nodes: the ops of a step, or those of them that can be run by themselves.
        estimate: what ops cost that are not measured.
        times: whether times are measured, too, or workspaces alone.
        given: what inputs of the graph really are, as far as that is known.
    """
    run = Standalone(given or {})
    keys = {node: key_of(node) for node in nodes}
    distinct = {key: node for node, key in keys.items()}
    guesses = _measure_workspaces(distinct, run)
    scale = _measure_times(distinct, Counter(keys.values()), estimate, run) if times else 1.0

    def cost(node: fx.Node) -> OpCost:
        key = keys.get(node)
        time_us = KNOWN.times_us.get(key) if times and key else None
        if time_us is None:
            time_us = estimate(node).time_us * (1.0 if count_flops(node) else scale)
        return OpCost(time_us, KNOWN.workspace_bytes.get(key, guesses.get(key, 0)) if key else 0)

    return cost


def correct_private(nodes: Iterable[fx.Node], given: Mapping[fx.Node, torch.Tensor] | None = None) -> None:
    """Find the sizes of buffers in a private format, read or not, and correct what was traced."""
    run = Standalone(given or {})
    for node in filter(private.is_producer, nodes):
        key = key_of(node)
        try:
            if key not in KNOWN.private_sizes:
                KNOWN.private_sizes[key] = with_memory(functools.partial(_sizes, node, run))
        except NotRunnable:
            continue
        except NoMemory:
            _warn_of_memory([node], "the buffers that they hand to backward are counted as empty")
        else:
            private.correct_sizes(node, KNOWN.private_sizes[key])


def _sizes(node: fx.Node, run: Standalone) -> private.Sizes:
    call = run.call(node)
    with call.aside():
        return private.sizes_of(try_run(call))


def _measure_workspaces(distinct: Mapping[Key, fx.Node], run: Standalone) -> dict[Key, int]:
    """Find workspaces; for ops that there is no memory for, what they may take [B]."""
    fresh = {k: n for k, n in distinct.items() if k not in KNOWN.workspace_bytes and k not in KNOWN.refused}
    lacking: dict[Key, fx.Node] = {}
    for place, some in _by_device(fresh).items():
        calls: dict[str, Callable[[], Call]] = {k[0]: functools.partial(run.call, n) for k, n in some.items()}
        found = workspaces(calls, place)
        for key, node in some.items():
            taken = found[key[0]]
            if isinstance(taken, NoMemory):
                lacking[key] = node
            elif isinstance(taken, NotRunnable):
                KNOWN.refused.add(key)
            else:
                KNOWN.workspace_bytes[key] = taken
    if lacking:
        _warn_of_memory(lacking.values(), "their workspaces are guessed from those of smaller ops of the same kind")
    return {key: _guess_bytes(node, distinct) for key, node in lacking.items()}


def _guess_bytes(node: fx.Node, distinct: Mapping[Key, fx.Node]) -> int:
    """The workspace of an op if it is as large, against its results, as the largest of other ops of its kind [B]."""
    alike = [(key, n) for key, n in distinct.items() if n.target == node.target and key in KNOWN.workspace_bytes]
    ratios = [KNOWN.workspace_bytes[key] / written_bytes(n) for key, n in alike if written_bytes(n)]
    return int(max(ratios, default=0.0) * written_bytes(node))


def _measure_times(
    distinct: Mapping[Key, fx.Node], counts: Mapping[Key, int], estimate: CostModel, run: Standalone
) -> float:
    """Find the times that matter; the ratio of measured to estimated times, of ops that move memory only."""
    shares = {key: counts[key] * estimate(node).time_us for key, node in distinct.items()}
    wanted = that_matter(shares)
    fresh = {key: distinct[key] for key in wanted if key not in KNOWN.times_us and key not in KNOWN.refused}
    end = time.monotonic() + _LONGEST_S
    for place, some in _by_device(fresh).items():
        clock = clock_of(place)
        for key, node in some.items():
            if time.monotonic() > end:
                break
            try:
                call = run.call(node)
                with call.aside():
                    clock.time(key[0], call.run, estimate(node).time_us)
            except torch.AcceleratorError:
                raise
            except Exception:  # it can't be run, which has been said where workspaces were measured: it is estimated
                continue
        found = clock.finish()
        KNOWN.times_us.update({key: found[key[0]] for key in some if key[0] in found})
    moving = [key for key in wanted if key in KNOWN.times_us and not count_flops(distinct[key])]
    estimated_us = sum(shares[key] for key in moving)
    return sum(counts[key] * KNOWN.times_us[key] for key in moving) / estimated_us if estimated_us else 1.0


def that_matter(shares: Mapping[Key, float]) -> list[Key]:
    """The keys of most of the sum of shares, the largest first."""
    left, found = sum(shares.values()), []
    enough = _LEFT_OUT * left
    for key in sorted(shares, key=lambda key: (-shares[key], key)):
        if left <= enough:
            break
        found.append(key)
        left -= shares[key]
    return found


def _by_device(nodes: Mapping[Key, fx.Node]) -> dict[torch.device, dict[Key, fx.Node]]:
    places: dict[torch.device, dict[Key, fx.Node]] = {}
    for key, node in nodes.items():
        places.setdefault(device(node), {})[key] = node
    return places


def _warn_of_memory(nodes: Iterable[fx.Node], instead: str) -> None:
    names = [str(node.target) for node in nodes]
    warnings.warn(
        f"there was not enough memory to measure {len(names)} ops ({', '.join(dict.fromkeys(names))}): {instead}, so "
        "the peak may be higher than planned. Plan before other memory is taken, or with smaller inputs",
        MeasuringWarning,
        stacklevel=2,
    )

"""The cost model that a user named, for a captured step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from fxckpt.capture.joint import JointGraph
from fxckpt.errors import BudgetError
from fxckpt.profile import cost_cache as files
from fxckpt.profile.build import CostModel, OpCost, working_nodes
from fxckpt.profile.calibrate import profile_of
from fxckpt.profile.devices import DEVICES, DeviceProfile, named
from fxckpt.profile.estimate import estimate_us
from fxckpt.profile.fused import kernel_costs
from fxckpt.profile.known import kept
from fxckpt.profile.measure import correct_private, measured
from fxckpt.profile.storage import StorageMap


def cost_model(
    joint: JointGraph,
    name: str = "auto",
    *,
    device: str | DeviceProfile | None = None,
    cost_cache: str | os.PathLike[str] = "auto",
    run_ops: bool = True,
    given: Mapping[fx.Node, torch.Tensor] | None = None,
    fused: StorageMap | None = None,
) -> CostModel:
    """What the ops of a step cost; workspaces are measured wherever ops may be run.

    Args:
        joint: the captured step.
        name: "auto", "estimate", "measure" or "reference".
        device: what to estimate times for, if not the device that the model is on.
        cost_cache: file of measured costs; "auto" for the user's, "off" for none.
        run_ops: whether ops may be run; on the meta device none can.
        given: what inputs of the captured graph really are, as far as they are known.
        fused: the storages of the step if it runs in kernels of several nodes each.

    Raises:
        BudgetError: ops are to be run but can't be, or there is no device of the name given.
        CostCacheError: the file of measured costs that was named is damaged, or can't be read or written.
    """
    runs = run_ops and joint.device.type != "meta"
    name = name_on(joint.device, name, run_ops=run_ops)
    if name == "measure" and not runs:
        raise BudgetError(
            'cost_model="measure" runs the ops, but the model is on the meta device: use cost_model="estimate"'
        )
    if cost_cache not in ("auto", "off") and not runs:
        raise BudgetError(
            "cost_cache keeps what was measured, but here no op is run: "
            'use cost_model="measure" on a real device, or leave it out'
        )
    file = files.default_file() if cost_cache == "auto" else None if cost_cache == "off" else Path(cost_cache)
    default = cost_cache == "auto"
    rates = DEVICES["reference"] if name == "reference" else device_profile(joint.device, device, file, default=default)
    estimate = estimated(rates)
    if fused is not None:
        estimate = kernel_costs(fused, estimate, rates)
    if not runs:
        return estimate
    nodes = working_nodes(joint, fused)
    if fused is not None:
        nodes = [node for node in nodes if not any(source in fused.inlined for source in node.all_input_nodes)]
    correct_private(nodes, given)
    with kept(file, nodes, default=default):
        return measured(nodes, estimate, times=name == "measure", given=given)


def name_on(device: torch.device, name: str, *, run_ops: bool) -> str:
    """The name of the cost model on a device: what "auto" means there."""
    if name != "auto":
        return name
    return "measure" if run_ops and device.type != "meta" else "estimate"


def estimated(device: DeviceProfile) -> CostModel:
    """The cost model that runs nothing."""
    return lambda node: OpCost(estimate_us(node, device))


def device_profile(
    device: torch.device, wanted: str | DeviceProfile | None, file: Path | None = None, *, default: bool = False
) -> DeviceProfile:
    """The profile that a user named, else that of the model's device; an A100's for a model on the meta device.

    A CUDA device that is there is measured, once: what is measured is kept in a file as for `known.kept`.

    Raises:
        BudgetError: there is no profile of this name, or no CUDA device.
        CostCacheError: the file that was named is damaged, or can't be read or written.
    """
    if isinstance(wanted, DeviceProfile):
        return wanted
    if wanted is not None and wanted != "cuda":
        profile = named(wanted)
        if profile is None:
            raise BudgetError(
                f"there is no device {wanted!r}; choose one of {', '.join(DEVICES)}, cuda, or give a DeviceProfile"
            )
        return profile
    if wanted == "cuda" or device.type == "cuda":
        if torch.cuda.is_available():
            place = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
            return profile_of(place, file, default=default)
        if wanted == "cuda":
            raise BudgetError('device="cuda" is the CUDA device at hand, but there is none: name one, such as "H100"')
    return DEVICES["cpu" if device.type == "cpu" else "A100"]

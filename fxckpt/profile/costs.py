"""The cost model that a user named, for a captured step."""

from __future__ import annotations

import os

import torch

from fxckpt.capture.joint import JointGraph
from fxckpt.errors import BudgetError
from fxckpt.profile import measure
from fxckpt.profile.build import CostModel, OpCost, working_nodes
from fxckpt.profile.estimate import DEVICES, DeviceProfile, estimate_us


def cost_model(
    joint: JointGraph,
    name: str = "auto",
    *,
    device: str | DeviceProfile | None = None,
    cost_cache: str | os.PathLike[str] | None = None,
    run_ops: bool = True,
) -> CostModel:
    """What the ops of a step cost; workspaces are measured wherever ops may be run.

    Args:
        joint: the captured step.
        name: "auto", "estimate", "measure" or "reference".
        device: what to estimate times for, if not the device that the model is on.
        cost_cache: file of measured costs.
        run_ops: whether ops may be run; on the meta device none can.

    Raises:
        BudgetError: ops are to be run but can't be, or there is no device of the name given.
        CostCacheError: the file of measured costs is damaged, or can't be read or written.
    """
    runs = run_ops and joint.device.type != "meta"
    name = name_on(joint.device, name, run_ops=run_ops)
    if name == "measure" and not runs:
        raise BudgetError(
            'cost_model="measure" runs the ops, but the model is on the meta device: use cost_model="estimate"'
        )
    if cost_cache is not None and not runs:
        raise BudgetError(
            "cost_cache keeps what was measured, but here no op is run: "
            'use cost_model="measure" on a real device, or leave it out'
        )
    estimate = estimated(DEVICES["reference"] if name == "reference" else device_profile(joint.device, device))
    if not runs:
        return estimate
    nodes = working_nodes(joint)
    measure.measure_private(nodes)
    with measure.cost_file(cost_cache, nodes):
        measure.measure_workspaces(nodes)
        if name != "measure":
            return measure.with_workspaces(estimate)
        measure.measure_times(nodes, estimate)
        return measure.measured


def name_on(device: torch.device, name: str, *, run_ops: bool) -> str:
    """The name of the cost model on a device: what "auto" means there."""
    if name != "auto":
        return name
    return "measure" if run_ops and device.type != "meta" else "estimate"


def estimated(device: DeviceProfile) -> CostModel:
    """The cost model that runs nothing."""
    return lambda node: OpCost(estimate_us(node, device))


def device_profile(device: torch.device, wanted: str | DeviceProfile | None) -> DeviceProfile:
    """The profile that a user named, else that of the model's device; an A100's for a model on the meta device.

    Raises:
        BudgetError: there is no profile of this name.
    """
    if isinstance(wanted, DeviceProfile):
        return wanted
    if wanted is not None:
        if wanted not in DEVICES:
            raise BudgetError(
                f"there is no device {wanted!r}; choose one of {', '.join(DEVICES)}, or give a DeviceProfile"
            )
        return DEVICES[wanted]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((profile for key, profile in DEVICES.items() if key in name), DEVICES["A100"])
    return DEVICES["A100" if device.type == "meta" else "cpu"]

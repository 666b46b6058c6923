"""Records the ops that eager torch dispatches for each layer of a menu on a device, and compares them with captures.

python -m tests.gpu.record_dispatch --out tests/gpu/dispatched.json.gz
python -m tests.gpu.record_dispatch --compare --seconds 120 --out differences.json.gz
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.comparable import differences, unexpected
from tests.support.dispatched import Called, captured, captured_for_gpu, in_eager, quiet
from tests.support.layer_menu import LayerCase
from tests.support.op_menu import MENU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each n-th case")
    parser.add_argument("--compare", action="store_true", help="capture each case, and tell where the ops differ")
    parser.add_argument("--recorded", type=Path, help="compare with this recording what is captured for that GPU")
    parser.add_argument("--out", type=Path, help="a .json.gz file to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    recording = json.loads(gzip.decompress(options.recorded.read_bytes())) if options.recorded else None
    found: dict[str, Any] = {}
    end = time.monotonic() + options.seconds
    known = MENU if recording is None else recording["cases"]
    cases = [case for name, case in MENU.items() if options.only in name and name in known][:: options.every]
    for case in cases:
        if time.monotonic() > end:
            break
        if recording is not None:
            found[case.name] = compared_for_gpu(case, recording)
        else:
            found[case.name] = compared(case, device) if options.compare else recorded(case, device)
    on = where(device) if recording is None else recording["device"]
    print(f"{len(found)} of {len(cases)} cases, {torch.__version__}, {on}")
    if options.compare or recording is not None:
        _tell(found)
    else:
        failed = {name: calls for name, calls in found.items() if isinstance(calls, str)}
        print(f"{len(failed)} don't run:")
        for name, error in failed.items():
            print(f"  {name}: {error[:160]}")
    if options.out:
        written = {"torch": torch.__version__, "device": on, "cases": found}
        options.out.write_bytes(gzip.compress(json.dumps(written, separators=(",", ":")).encode(), mtime=0))
        print(f"{options.out}: {options.out.stat().st_size} bytes")


def where(device: torch.device) -> dict[str, Any]:
    """What decides about kernels."""
    if device.type != "cuda":
        return {"name": device.type}
    name, capability = torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))
    return {"name": name, "capability": capability, "cudnn": torch.backends.cudnn.version()}


def recorded(case: LayerCase, device: torch.device) -> list[list[str]] | str:
    """What eager dispatches, or why it does not run."""
    try:
        with quiet():
            return [list(dataclasses.astuple(call)) for call in in_eager(case, device)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def compared(case: LayerCase, device: torch.device) -> dict[str, Any]:
    """Where a capture differs from eager; {} where it does not."""
    eager = recorded(case, device)
    return {} if isinstance(eager, str) else _told(case, eager, lambda: captured(case, device))


def compared_for_gpu(case: LayerCase, recording: dict[str, Any]) -> dict[str, Any]:
    """Where a capture for the GPU of a recording differs from that."""
    eager = recording["cases"].get(case.name, "not recorded")
    capability = tuple(recording["device"]["capability"])
    return {} if isinstance(eager, str) else _told(case, eager, lambda: captured_for_gpu(case, capability))


def _told(case: LayerCase, eager: list[list[str]], capture: Callable[[], list[Called]]) -> dict[str, Any]:
    try:
        with quiet():
            ours = capture()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()[-1500:]}
    different = unexpected(case.name, differences(ours, [Called(*call) for call in eager]))
    return {"differences": different} if different else {}


def _tell(found: dict[str, Any]) -> None:
    print(f"{sum(not told for told in found.values())} as in eager")
    for name, told in found.items():
        if "refused" in told:
            print(f"  {name}: REFUSED {told['refused'][:200]}")
        for line in told.get("differences", [])[:8]:
            print(f"  {name}: {line}")


if __name__ == "__main__":
    main()

"""The figures of the README and of the pages in docs/ are those of the committed results."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.versions import minor, with_table
from fxckpt.units import format_bytes

ROOT = Path(__file__).parents[1]
README, WORKS, COMPARISON = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/what_works.md", "docs/comparison.md")
)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MODELS = {
    "GPT": "gpt12",
    "BERT": "bert6",
    "ResNet-50": "resnet50",
    "U-Net": "unet4",
    "MLP": "mlp32",
    "Llama-like": "llama12",
}


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_comparison_is_that_of_the_results() -> None:
    found = {model["model"]: model for model in results("torch_planner")["models"]}
    rows = re.findall(r"^\| ([\w-]+)[^|]*\|((?: [\d.]+[^|]*\|){5})$", COMPARISON, flags=re.MULTILINE)
    assert [MODELS[name] for name, _ in rows] == list(found)
    for name, cells in rows:
        model = found[MODELS[name]]
        blocks = next(rival for rival in model["rivals"] if rival["name"] == "checkpoint every 1")
        lowest_bytes = min(rival["peer"]["peak_bytes"] for rival in model["rivals"])
        assert [float(cell) for cell in re.findall(r"[\d.]+", cells)] == [
            round(model["plain_peak_bytes"] / 2**20),
            round(100 * blocks["peer"]["repeated_flops_ratio"], 1),
            round(100 * blocks["fxckpt"]["repeated_flops_ratio"], 1),
            round(lowest_bytes / 2**20, 1),
            round(model["floor_bytes"] / 2**20, 1),
        ]


def test_the_picture_shows_what_its_caption_says() -> None:
    found = results("timeline")
    plain, ours = found["baseline"], found["predicted"]
    plain_peak, peak = format_bytes(plain["peak_bytes"]), format_bytes(ours["peak_bytes"])
    adds = f"{100 * ours['recompute_us'] / plain['step_us']:.1f} %"
    caption = " ".join(README[README.index("![") : README.index("## Try it")].split())
    assert f"falls from {plain_peak.removesuffix(' MiB')} to {peak}, and recomputing adds {adds}" in caption
    assert (
        f"rises to {plain_peak}, the planned step stays below its budget of {format_bytes(found['budget_bytes'])}"
        in (caption)
    )
    assert ours["peak_bytes"] <= found["budget_bytes"] == int(0.4 * plain["peak_bytes"])
    assert (ROOT / re.findall(r"!\[[^]]*\]\(([^)]*)\)", caption)[0]).is_file()


def test_fxckpt_repeats_no_more_at_any_peak_of_the_others() -> None:
    for model in results("torch_planner")["models"]:
        for rival in model["rivals"]:
            assert rival["fxckpt"]["peak_bytes"] <= rival["peer"]["peak_bytes"]
            assert rival["fxckpt"]["repeated_flops_ratio"] <= rival["peer"]["repeated_flops_ratio"]


@pytest.mark.parametrize("page", [README, WORKS], ids=["README", "what_works"])
def test_the_count_of_architectures_is_that_of_the_results(page: str) -> None:
    rows = results("architectures")["rows"]
    working = sum(row["same_bits"] is True for row in rows)
    assert f"{working} of {len(rows)} architectures of transformers" in page


def test_the_versions_are_those_of_the_results() -> None:
    runs = results("versions")
    assert with_table(README, runs) == README, (
        "run .ci/versions, or write what benchmarks.versions makes of its results"
    )


def test_no_version_fails_and_all_are_supported() -> None:
    (torch,) = (d for d in tomllib.loads(PROJECT)["project"]["dependencies"] if d.startswith("torch"))
    least, beyond = (minor(bound) for bound in torch.split(","))
    for run in results("versions"):
        assert least <= minor(run["torch"]) < beyond
        assert run["passed"] > 0
        assert run["failures"] == []

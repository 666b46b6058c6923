"""Costs that a file keeps: used again, checked when read, left whole when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.errors import BudgetError, CostCacheError
from fxckpt.profile import cost_cache, measure

X = torch.randn(32, 24)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8))


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been measured yet in this process."""
    monkeypatch.setattr(measure, "_TIME_US", {})
    monkeypatch.setattr(measure, "_WORKSPACE_BYTES", {})


def times(file: Path) -> list[float]:
    plan = fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_model="measure", cost_cache=file)
    return [op.time_us for op in plan.graph.ops]


def forget() -> None:
    measure._TIME_US.clear()
    measure._WORKSPACE_BYTES.clear()


def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    first = times(file)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    forget()
    monkeypatch.setattr(measure, "_fastest_us", lambda *_: pytest.fail("an op is measured again"))
    assert times(file) == first


def test_other_machines_are_kept_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    times(file)
    before = json.loads(file.read_text())
    forget()
    monkeypatch.setattr(cost_cache, "machine_name", lambda _: "another machine")
    monkeypatch.setattr(measure, "_fastest_us", lambda *_: 12345.0)
    assert set(times(file)) == {12345.0}
    after = json.loads(file.read_text())
    assert set(after["machines"]) == {*before["machines"], "another machine"}
    assert before["machines"].items() <= after["machines"].items()


def test_the_machine_is_device_version_and_threads() -> None:
    name = cost_cache.machine_name(torch.device("cpu"))
    assert name.endswith(f", torch {torch.__version__}, {torch.get_num_threads()} threads")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "does not say"),
        ('{"fxckpt_costs": 2, "machines": {}}', "does not say"),
        ('{"fxckpt_costs": 1}', "no table of machines"),
        ('{"fxckpt_costs": 1, "machines": {"m": 3}}', "no table of machines"),
        *(
            (json.dumps({"fxckpt_costs": 1, "machines": {"m": {"aten.mm": cost}}}), "the cost of aten.mm on m")
            for cost in (
                3,
                {"time_us": -1.0},
                {"time_us": float("nan")},
                {"time_us": float("inf")},
                {"time_us": "3"},
                {"time_us": True},
                {"workspace_bytes": 1.5},
                {"workspace_bytes": -1},
                {"flops": 3},
            )
        ),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(content)
    with pytest.raises(CostCacheError, match=message):
        times(file)
    assert file.read_text() == content


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CostCacheError, match="can't write the cost cache"):
        times(tmp_path / "no folder" / "costs.json")
    with pytest.raises(CostCacheError, match="can't read the cost cache"):
        times(tmp_path)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    cost_cache.write(file, "m", {"aten.mm": {"time_us": 1.0}})
    before = file.read_text()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CostCacheError, match="No space left"):
        cost_cache.write(file, "m", {"aten.add": {"time_us": 1.0}})
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_costs_are_added_op_by_op(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    cost_cache.write(file, "m", {"aten.mm": {"time_us": 1.0}})
    cost_cache.write(file, "m", {"aten.mm": {"workspace_bytes": 8}, "aten.add": {"time_us": 2.0}})
    expected = {"aten.mm": {"time_us": 1.0, "workspace_bytes": 8}, "aten.add": {"time_us": 2.0}}
    assert cost_cache.read(file, "m") == expected
    assert cost_cache.read(file, "other") == {}


def test_a_cache_where_nothing_is_measured_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match='use cost_model="measure"'):
        fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_cache=tmp_path / "costs.json")

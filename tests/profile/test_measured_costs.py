"""Costs that a file keeps: used again, checked when read, left whole when something goes wrong."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.errors import BudgetError, CostCacheError, MeasuringWarning
from fxckpt.profile import clock, cost_cache, known, measure
from fxckpt.profile.known import Known

X = torch.randn(32, 24)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8))


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been measured yet in this process."""
    monkeypatch.setattr(known, "KNOWN", Known())
    monkeypatch.setattr(measure, "KNOWN", known.KNOWN)


def times(file: Path) -> list[float]:
    plan = fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_model="measure", cost_cache=file)
    return [op.time_us for op in plan.graph.ops]


def forget() -> None:
    known.KNOWN.forget()


def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    first = times(file)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    forget()
    monkeypatch.setattr(clock.WallClock, "time", lambda *_: pytest.fail("an op is timed again"))
    monkeypatch.setattr(measure, "workspaces", lambda calls, _: dict.fromkeys(calls, pytest.fail) if calls else {})
    assert times(file) == first


def test_other_machines_are_kept_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    times(file)
    before = json.loads(file.read_text())
    forget()
    monkeypatch.setattr(cost_cache, "machine_name", lambda _: "another machine")
    monkeypatch.setattr(clock.WallClock, "finish", lambda self: dict.fromkeys(self._found, 12345.0))
    assert 12345.0 in times(file)
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of caches."""
    monkeypatch.setenv("FXCKPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured_by_default() -> None:
    fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_model="measure")


def test_by_default_costs_are_kept_in_the_users_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_by_default()
    assert [path.name for path in folder.iterdir()] == ["costs.json"]
    forget()
    monkeypatch.setattr(clock.WallClock, "time", lambda *_: pytest.fail("an op is timed again"))
    measured_by_default()
    fxckpt.optimize(net(), "1GB", example_inputs=(X,))


def test_the_users_folder_can_be_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_model="measure", cost_cache="off")
    monkeypatch.setenv("FXCKPT_CACHE_DIR", "")
    measured_by_default()
    assert not folder.exists()


def test_where_the_users_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXCKPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cost_cache.default_file() == tmp_path / "xdg" / "fxckpt" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cost_cache.default_file() == tmp_path / "home" / ".cache" / "fxckpt" / "costs.json"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cost_cache.default_file() == tmp_path / "home" / "Library" / "Caches" / "fxckpt" / "costs.json"


def test_a_damaged_file_of_the_users_folder_is_written_anew(folder: Path) -> None:
    folder.mkdir()
    (folder / "costs.json").write_text("{")
    with pytest.warns(MeasuringWarning, match="it is not JSON. Ops are measured again"):
        measured_by_default()
    assert cost_cache.read(folder / "costs.json", cost_cache.machine_name(torch.device("cpu")))


@pytest.mark.parametrize("there", ["a file", "a folder in the file's place", "no folder can be made"])
def test_a_users_folder_that_is_of_no_use_is_no_obstacle(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXCKPT_CACHE_DIR", str(tmp_path / "cache"))
    if there == "a file":
        (tmp_path / "cache").write_text("")
    elif there == "a folder in the file's place":
        (tmp_path / "cache" / "costs.json").mkdir(parents=True)
    else:
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    before = sorted(tmp_path.rglob("*"))
    measured_by_default()
    assert known.KNOWN.times_us
    assert sorted(tmp_path.rglob("*")) == before


WRITER = """
import sys
from pathlib import Path
from fxckpt.profile import cost_cache
for number in range(25):
    cost_cache.write(Path(sys.argv[1]), "m", {f"op {sys.argv[2]} {number}": {"time_us": 1.0}}, default=True)
"""


def test_processes_that_write_together_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(cost_cache.read(file, "m")) == 75
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_a_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "_MOST_KEPT", 3)
    file = tmp_path / "costs.json"
    for name in "abcad":
        cost_cache.write(file, "m", {name: {"time_us": 1.0}})
    assert list(cost_cache.read(file, "m")) == ["c", "a", "d"]


def test_settings_that_costs_depend_on_are_part_of_their_name() -> None:
    for is_set in (False, True):
        with torch.backends.cudnn.flags(benchmark=is_set):  # other tests may have frozen the flags themselves
            assert ("cuDNN benchmark" in cost_cache.machine_name(torch.device("cpu"))) is is_set


def test_devices_of_a_kind_share_what_is_measured() -> None:
    done = doctest.testmod(cost_cache)
    assert (done.attempted > 0, done.failed) == (True, 0)


def test_a_cache_where_nothing_is_measured_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match='use cost_model="measure"'):
        fxckpt.plan(net(), "1GB", example_inputs=(X,), cost_cache=tmp_path / "costs.json")


def test_what_was_measured_before_is_written_to_a_new_file(tmp_path: Path) -> None:
    how: dict[str, Any] = {"example_inputs": (X,), "cost_model": "measure"}
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        fxckpt.plan(net(), "1GB", cost_cache=file, **how)
    one, two = (file.read_text() for file in files)
    assert one == two

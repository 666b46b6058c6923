"""The commands that need torch: `plan` on a model of the user's, and the demo in its small form."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fxckpt.cli.main import main
from fxckpt.core.plans import Plan
from fxckpt.core.report.page import page
from fxckpt.steps.step import Measurement

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x, *, scale=None):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return x.sum() if scale is None else (x * scale).sum()

def build():
    return Net(), (torch.randn(256, 64),)

def build_with_names():
    return Net(), {"x": torch.randn(256, 64), "scale": torch.ones(())}

def build_with_both():
    return Net(), ((torch.randn(256, 64),), {"scale": torch.ones(())})

def build_meta():
    with torch.device("meta"):
        return Net(), (torch.randn(256, 64),)

def build_half():
    return Net()

def build_list():
    return Net(), [torch.randn(256, 64)]

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's in it."""
    (tmp_path / "users_model.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_model", raising=False)
    return tmp_path


@pytest.mark.parametrize("function", ["build", "build_with_names", "build_with_both", "build_meta"])
def test_plan_prints_and_writes_a_plan(function: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", f"users_model:{function}", "--memory-budget", "80%", "--cost-model", "estimate"]
    assert main([*command, "--output", "plan.json", "--html", "plan.html"]) == 0
    shown = capsys.readouterr().out
    assert "users_model.py:" in shown
    assert "layers.{0-" in shown
    assert os.fspath(folder) not in shown
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan.predicted.peak_bytes <= plan.budget_bytes < plan.baseline.peak_bytes
    assert main(["explain", "plan.json"]) == 0
    assert shown.startswith(capsys.readouterr().out)
    assert (folder / "plan.html").read_text(encoding="utf-8") == page(plan)


def test_plan_takes_a_solver_and_the_state_of_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "users_model:build", "--memory-budget", "1GB", "--cost-model", "reference"]
    assert main([*command, "--solver", "save_all", "--gradients", "allocated", "--all"]) == 0
    shown = capsys.readouterr().out
    assert "save_all" in shown
    assert "already allocated" in shown.split("graph")[0]
    assert "layers.7" in shown


def test_plan_takes_a_device_an_optimizer_and_a_reserve(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "users_model:build", "--memory-budget", "1GB", "--output", "plan.json"]
    plans = []
    for more in ([], ["--device", "H100"], ["--reserve", "1MB"], ["--optimizer", "AdamW"]):
        assert main([*command, *more]) == 0
        plans.append(Plan.from_json(Path("plan.json").read_text(encoding="utf-8")))
    usual, fast, reserved, stepped = plans
    assert fast.predicted.step_us < usual.predicted.step_us
    assert reserved.predicted.peak_bytes == usual.predicted.peak_bytes + 10**6
    assert stepped.graph.reserved_bytes == 2 * 8 * 4 * (64 * 64 + 64) + 16 * 4
    assert main([*command, "--device", "Z80"]) == 2
    assert "no device 'Z80'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "budget", "message"),
    [
        ("users_model", "1GB", "MODULE:FUNCTION"),
        ("users_model.py:build", "1GB", "users_model:build"),
        ("no_such_module:build", "1GB", "no_such_module"),
        ("users_model:nothing", "1GB", "no function 'nothing'"),
        ("users_model:number", "1GB", "no function 'number'"),
        ("users_model:build_half", "1GB", "(model, inputs)"),
        ("users_model:build_list", "1GB", "tuple of arguments"),
        ("users_model:build", "lots", "lots"),
        ("users_model:build", "140%", "140%"),
        ("users_model:build", "1KB", "smallest peak"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    function: str, budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", function, "--memory-budget", budget]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fxckpt: ")
    assert message in shown.err


def test_a_plan_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "users_model:build", "--memory-budget", "1GB", "--cost-model", "estimate"]
    assert main([*command, "--output", "no/such/folder/plan.json"]) == 2
    assert "can't write" in capsys.readouterr().err


def test_a_small_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--tiny", "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "all 3 losses are identical" in shown
    assert "measured" in shown
    assert "FAILED" not in shown


def test_the_demo_says_when_losses_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fxckpt.cli import demo

    step = demo.Run.step

    def wrong(self: demo.Run, number: int, batch: Any) -> None:
        step(self, number, batch)
        self.losses[-1] += 1e-6 * (self.name == "optimized")

    monkeypatch.setattr(demo.Run, "step", wrong)
    monkeypatch.setattr("fxckpt.api.optimize", lambda model, *_, **__: model)
    monkeypatch.setattr("fxckpt.api.measure", lambda *_: Measurement(1, 1, 1.0, 1))
    monkeypatch.setattr("fxckpt.api.print_plan", lambda *_, **__: None)
    assert main(["demo", "--tiny", "--steps", "2"]) == 1
    assert "FAILED: 2 of 2 losses differ" in capsys.readouterr().out


def test_an_interrupted_demo_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fxckpt.cli import demo

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "read_text", interrupt)
    assert main(["demo", "--tiny", "--steps", "2"]) == 130
    assert capsys.readouterr() == ("", "fxckpt: interrupted\n")


def test_a_demo_of_one_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--tiny", "--steps", "1"]) == 2
    assert "at least 2 steps" in capsys.readouterr().err

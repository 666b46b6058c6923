"""`transformers.Trainer` around an optimized model: its losses, its options, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


import fxckpt
from fxckpt.api import plan_of
from fxckpt.errors import CheckpointingBypassedWarning
from tests.integrations.models import VOCABULARY, gpt2, llama
from tests.integrations.support import Recorder, Trained, assert_same_training, assert_within, planned

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]

LENGTH = 48


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Random token ids, each row its own labels."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def fit(model: nn.Module, folder: Path, *, resume: str | None = None, **options: Any) -> Trained:
    """Train with `Trainer`; losses, gradients and peaks are those of its training steps."""
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **options,
        },
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows())
    recorder, step = Recorder(model), trainer.training_step

    def recorded(model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        return recorder.step(lambda: step(model, inputs, *rest), inputs)

    with mock.patch.object(trainer, "training_step", recorded):
        trainer.train(resume_from_checkpoint=resume)
    return recorder.done()


def build(make: Callable[[], nn.Module], budget: float | None) -> Any:
    torch.manual_seed(0)
    return make() if budget is None else fxckpt.optimize(make(), budget, effort="fast")


def check(make: Callable[[], nn.Module], folder: Path, **options: Any) -> None:
    expected = fit(build(make, None), folder, **options)
    ours = build(make, 0.7)
    with planned():
        found = fit(ours, folder, **options)
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_losses_gradients_and_peak(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    check(make, tmp_path)


def test_bf16(tmp_path: Path) -> None:
    check(llama, tmp_path, bf16=True)


def test_accumulation(tmp_path: Path) -> None:
    check(gpt2, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)


@pytest.mark.xfail(strict=True, reason="a loss outside of the model is in no plan")
def test_label_smoothing(tmp_path: Path) -> None:
    check(gpt2, tmp_path, label_smoothing_factor=0.1)


def test_label_smoothing_leaves_the_same(tmp_path: Path) -> None:
    expected = fit(build(gpt2, None), tmp_path, label_smoothing_factor=0.1)
    with planned():
        found = fit(build(gpt2, 0.7), tmp_path, label_smoothing_factor=0.1)
    assert_same_training(found, expected)
    assert max(found.peaks) < max(expected.peaks)


@pytest.mark.parametrize("enable", ["by the model", "by the trainer"])
def test_checkpointing_of_the_models_own_gives_way(enable: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_checkpointing": True} if enable == "by the trainer" else {}
    expected = fit(build(llama, None), tmp_path)
    ours: Any = build(llama, 0.7)
    if enable == "by the model":
        ours.activation_checkpointing_enable()
    with planned():
        found = fit(ours, tmp_path, **options)
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected)


def test_checkpointing_of_the_models_own_is_named() -> None:
    model: Any = fxckpt.optimize(llama(), "1GB", effort="fast")
    model.activation_checkpointing_enable()
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.warns(CheckpointingBypassedWarning):
        model(input_ids=ids, labels=ids)


def test_resume_from_a_checkpoint(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    expected = fit(build(gpt2, None), tmp_path / "plain", **saving)
    whole = fit(build(gpt2, 0.7), tmp_path / "ours", **saving)
    assert_same_training(whole, expected)
    resumed = fit(build(gpt2, 0.7), tmp_path / "ours", resume=str(tmp_path / "ours" / "checkpoint-2"), **saving)
    for found, wanted in zip(resumed.losses, expected.losses[2:], strict=True):
        assert torch.equal(found, wanted)
    for name, value in expected.state.items():
        assert torch.equal(resumed.state[name], value), name
    with_resumed = (max(resumed.peaks), max(whole.peaks))
    assert max(with_resumed) < max(expected.peaks)

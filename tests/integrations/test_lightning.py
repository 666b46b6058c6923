"""Lightning: a module whose training step calls an optimized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning")

import fxckpt
from fxckpt.api import plan_of
from tests.integrations.models import Classifier
from tests.integrations.support import Recorder, Trained, assert_same_training, assert_within, planned

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Keeps the losses of its training steps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.net(*batch)
        self.losses.append(loss.detach().clone())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("validation", self.net(*batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Manual(Task):
    """Runs backward itself, where its peak can be measured."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.recorder = Recorder(net)

    def training_step(self, batch: Any, _: int) -> Tensor:
        def run() -> Tensor:
            loss: Tensor = self.net(*batch)
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.recorder.step(run, batch)
        optimizer.step()
        return loss


def build(budget: float | None) -> nn.Module:
    torch.manual_seed(0)
    return (
        Classifier(nn.BatchNorm1d)
        if budget is None
        else fxckpt.optimize(Classifier(nn.BatchNorm1d), budget, effort="fast")
    )


def batches() -> Any:
    generator = torch.Generator().manual_seed(5)
    inputs, labels = torch.randn(1280, 32, generator=generator), torch.randint(0, 4, (1280,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=256)


def fit(task: Any, folder: Path, **options: Any) -> Any:
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(task, batches(), batches())
    return task


def trained(task: Any) -> Trained:
    return Trained(losses=task.losses, state={name: value.clone() for name, value in task.net.state_dict().items()})


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_automatic_optimization(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(fit(Task(build(None)), tmp_path, **options))
    with planned():
        found = trained(fit(Task(build(0.7)), tmp_path, **options))
    assert_same_training(found, expected)


def test_manual_optimization(tmp_path: Path) -> None:
    expected = fit(Manual(build(None)), tmp_path).recorder.done()
    ours = build(0.7)
    with planned():
        found = fit(Manual(ours), tmp_path).recorder.done()
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected)

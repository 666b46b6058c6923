"""accelerate: a prepared model with autocast, accumulation, clipping, and states that are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate")

import fxckpt
from fxckpt.api import plan_of
from tests.integrations.models import Classifier
from tests.integrations.support import Recorder, Trained, assert_same_training, assert_within, planned

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]


def build(budget: float | None) -> nn.Module:
    torch.manual_seed(0)
    return (
        Classifier(nn.LayerNorm) if budget is None else fxckpt.optimize(Classifier(nn.LayerNorm), budget, effort="fast")
    )


def fit(net: nn.Module, folder: Path, **options: Any) -> Trained:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    generator = torch.Generator().manual_seed(5)
    rows = torch.utils.data.TensorDataset(
        torch.randn(1536, 32, generator=generator), torch.randint(0, 4, (1536,), generator=generator)
    )
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.AdamW(net.parameters(), lr=1e-3), torch.utils.data.DataLoader(rows, batch_size=256)
    )
    torch.manual_seed(1)
    recorder = Recorder(net)
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):

            def run(batch: Any = batch) -> Tensor:
                loss: Tensor = model(*batch)
                accelerator.backward(loss)
                return loss

            recorder.step(run, batch)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if number == 3:
            accelerator.save_state(str(folder / "state"))
            with torch.no_grad():
                for parameter in accelerator.unwrap_model(model).parameters():
                    parameter.zero_()
            accelerator.load_state(str(folder / "state"))
    return recorder.done()


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_prepared_model(options: dict[str, Any], tmp_path: Path) -> None:
    expected = fit(build(None), tmp_path, **options)
    ours = build(0.7)
    with planned():
        found = fit(ours, tmp_path, **options)
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected)

"""trl's trainers, which replace the model's `forward` and compute the loss outside of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


import fxckpt
from fxckpt.errors import PlanBypassedWarning
from tests.integrations import models
from tests.integrations.support import Recorder, Trained, assert_same_training, planned

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]

WORDS = [f"w{number}" for number in range(61)]
LENGTH = 40


def tokenizer() -> Any:
    """A tokenizer of its own, a word a token: nothing is downloaded."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(seed: int, length: int = LENGTH) -> str:
    drawn = torch.randint(0, len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[k] for k in drawn.tolist())


def llama() -> nn.Module:
    torch.manual_seed(0)
    return models.llama(pad_token_id=0, bos_token_id=1, eos_token_id=1)


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
    }


def fit(trainer: Any, *models: nn.Module) -> Trained:
    recorder, step = Recorder(*models), trainer.training_step

    def recorded(model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        return recorder.step(lambda: step(model, inputs, *rest), dict(inputs))

    with mock.patch.object(trainer, "training_step", recorded):
        trainer.train()
    return recorder.done()


def sft(model: nn.Module, folder: Path) -> Trained:
    data = datasets.Dataset.from_list([{"text": text(k)} for k in range(64)])
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**arguments(folder)), train_dataset=data, processing_class=tokenizer()
    )
    return fit(trainer, model)


def dpo(model: nn.Module, folder: Path) -> Trained:
    rows = [{"prompt": text(k, 8), "chosen": text(100 + k), "rejected": text(200 + k)} for k in range(64)]
    reference = llama()
    trainer = trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(**arguments(folder)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return fit(trainer, model, reference)


@pytest.fixture(autouse=True)
def _narrow_tiles() -> Iterator[None]:
    """The fused head computes logits in tiles of this many words, whatever the vocabulary."""
    with mock.patch("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 32):
        yield


Train = Callable[[nn.Module, Path], Trained]


@pytest.mark.parametrize("train", [sft, dpo])
def test_what_replaces_forward_is_planned_or_named(train: Train, tmp_path: Path) -> None:
    """Both trainers set a forward that ends in a head of their own."""
    expected = train(llama(), tmp_path)
    ours = fxckpt.optimize(llama(), 0.8, effort="fast")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = train(ours, tmp_path)
    assert_same_training(found, expected)
    said = [str(w.message) for w in seen if issubclass(w.category, PlanBypassedWarning)]
    if said:
        assert len(said) == 1
        assert "forward was replaced" in said[0]
        assert "/trl/" in said[0]
    else:
        assert max(found.peaks) < max(expected.peaks)


@pytest.mark.parametrize("train", [sft, dpo])
def test_an_optimized_backbone(train: Train, tmp_path: Path) -> None:
    """The remedy: plan the part that their forward calls."""

    def within(model: Any) -> Any:
        model.model = fxckpt.optimize(model.model, 0.7, effort="fast")
        return model

    expected = train(llama(), tmp_path)
    ours = within(llama())
    with planned():
        found = train(ours, tmp_path)
    assert_same_training(found, expected)
    assert max(found.peaks) < max(expected.peaks)

"""Fine-tune a transformers model with `Trainer`, in a memory budget and without touching the model's code.

    python examples/hf_trainer.py [--quick]

The model has random weights (nothing is downloaded) and learns whether a line of Python's standard library is a
comment, an import, a definition, or something else.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import fxckpt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
options = parser.parse_args()
STEPS, LAYERS, WIDTH, LENGTH = (3, 2, 64, 32) if options.quick else (40, 4, 128, 64)


def examples_of(text: str) -> list[dict[str, Any]]:
    """Lines as bytes, padded to one length, each with its class."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        label = (
            1 if line.startswith("#") else 2 if line.startswith(("import ", "from ")) else 3 if "def " in line else 0
        )
        codes = list(line.encode()[:LENGTH])
        padding = LENGTH - len(codes)
        mask = [1] * len(codes) + [0] * padding
        rows.append({"input_ids": codes + [0] * padding, "attention_mask": mask, "labels": label})
    return rows


data = examples_of(Path(os.__file__).read_text(encoding="utf-8"))


def fine_tune(memory_budget: float | None) -> list[float]:
    """The loss of every step."""
    set_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        num_labels=4,
    )
    model: torch.nn.Module = BertForSequenceClassification(config)
    if memory_budget is not None:
        model = fxckpt.optimize(model, memory_budget)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
    if memory_budget is not None:
        fxckpt.print_plan(model)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


plain, within = fine_tune(None), fine_tune(0.6)
print(f"\nloss {plain[0]:.4f} -> {plain[-1]:.4f} in {STEPS} steps; with fxckpt {within[0]:.4f} -> {within[-1]:.4f}")
print("losses identical:", plain == within)

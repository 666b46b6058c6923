"""peft's adapters on an optimized model, and optimized models that have adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


import fxckpt
from fxckpt.api import plan_of
from tests.integrations.models import VOCABULARY, gpt2, llama
from tests.integrations.support import assert_same_training, assert_within, check, planned, train

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]

LENGTH = 40


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
MODELS = {"gpt2": gpt2, "llama": llama}


def loss_of(model: Any, number: int) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(number))
    loss: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    return loss


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters(kind: str, base: str) -> None:
    check(lambda: peft.get_peft_model(MODELS[base](), CONFIGS[kind]()), loss_of)


def test_adapters_put_on_an_optimized_model() -> None:
    """peft changes the model that is given: here the parts of one that stands in already."""
    torch.manual_seed(0)
    expected = train(peft.get_peft_model(gpt2(), CONFIGS["lora"]()), loss_of)
    torch.manual_seed(0)
    ours = fxckpt.optimize(gpt2(), 0.7, effort="fast")
    with planned():
        found = train(peft.get_peft_model(ours, CONFIGS["lora"]()), loss_of)
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected)


def test_scaling_and_adapters_that_change_between_steps() -> None:
    """What peft changes on its layers in the middle of training is what the next step computes."""

    def changing(model: Any, number: int) -> Tensor:
        if number == 2:
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.scale_layer(0.5)
        if number == 3:
            with model.disable_adapter():
                assert not loss_of(model, 9).requires_grad
        return loss_of(model, number)

    check(lambda: peft.get_peft_model(llama(), CONFIGS["lora"]()), changing, steps=5)

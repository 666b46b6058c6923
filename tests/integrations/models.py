"""Small models that several of the packages train."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCABULARY = 64


def gpt2() -> nn.Module:
    """Two layers, up to 64 tokens."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama(**options: Any) -> nn.Module:
    """Two layers; `options` are further ones of its config."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


class Classifier(nn.Module):
    """Six layers with a norm and dropout; its loss is its own."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        layers = (layer for _ in range(6) for layer in (nn.Linear(32, 32), norm(32), nn.GELU(), nn.Dropout(0.1)))
        self.layers = nn.Sequential(*layers, nn.Linear(32, 4))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(inputs), labels)

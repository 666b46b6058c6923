"""The models that are timed, at a size for one large GPU, each with a tiny one of the same kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.cases import GPT, Arguments, Case, ResNet, llama, own_loss, tokens
from benchmarks.models.zoo import LLAMA_1B
from benchmarks.peers.subjects import Subject


class WithLoss(nn.Module):
    """A model with its loss inside: cross entropy over the last dimension, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def itself(output: Tensor) -> Tensor:
    """The loss of a model that returns it."""
    return output


@dataclass(frozen=True)
class Trained:
    """A model to time.

    Attributes:
        subject: the model, at both sizes.
        title: what it is, for tables.
        autocast: whether it runs under bf16 autocast; if not, it is bf16 itself.
        samples: what is counted of a step's inputs: "tokens" or "images".
    """

    subject: Subject
    title: str
    autocast: bool
    samples: str


def gpt(layers: int, width: int, heads: int, vocabulary: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    ids = tokens(batch, length, vocabulary)
    return WithLoss(GPT(layers, width, heads, vocabulary, length)), ((ids, ids.roll(-1, 1)), {})


def resnet(counts: tuple[int, ...], width: int, batch: int, size: int) -> tuple[nn.Module, Arguments]:
    model = WithLoss(ResNet(counts, width))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    return model, ((images, tokens(1, batch).flatten()), {})


def llama_1b() -> tuple[nn.Module, Arguments]:
    """Llama of 1.3 billion parameters (the sizes of Sheared-LLaMA-1.3B), in bfloat16; 4 × 2,048 labelled tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B, max_position_embeddings=4096))
    ids = tokens(4, 2048, LLAMA_1B["vocab_size"])
    return model.bfloat16(), ((), {"input_ids": ids, "labels": ids})


def tiny_llama() -> tuple[nn.Module, Arguments]:
    model, inputs = llama(2, 64, 32, 4)
    return model.bfloat16(), inputs


TRAINED: dict[str, Trained] = {
    trained.subject.name: trained
    for trained in (
        Trained(
            Subject(
                Case("gpt", lambda: gpt(12, 1024, 16, 50_304, 1024, 8), itself),
                Case("gpt", lambda: gpt(3, 64, 4, 200, 64, 2), itself),
                ("model.blocks",),
            ),
            "GPT, 12 layers, width 1,024, 8 × 1,024 tokens, vocabulary 50,304, bf16 autocast, loss inside",
            autocast=True,
            samples="tokens",
        ),
        Trained(
            Subject(
                Case("llama", llama_1b, own_loss),
                Case("llama", tiny_llama, own_loss),
                ("model.layers",),
            ),
            "Llama of 1.3 billion parameters (transformers), 4 × 2,048 tokens, bf16, loss inside",
            autocast=False,
            samples="tokens",
        ),
        Trained(
            Subject(
                Case("resnet50", lambda: resnet((3, 4, 6, 3), 64, 128, 224), itself),
                Case("resnet50", lambda: resnet((1, 1), 16, 4, 48), itself),
                ("model.blocks",),
            ),
            "ResNet-50, 128 images of 224², channels last, bf16 autocast, loss inside",
            autocast=True,
            samples="images",
        ),
    )
}

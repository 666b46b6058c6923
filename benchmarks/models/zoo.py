"""Models for benchmarks that tests have no use for, with their inputs: `CASES`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.cases import Arguments, Bottleneck, Case, gpt, tokens, unet

Halves = Callable[[Tensor], tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    """Scale to unit mean square, written out op by op."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def by_chunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of the last dimension; in backward one `cat` joins their gradients."""
    first, second = x.chunk(2, -1)
    return first, second


def by_slices(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same; in backward each half's gradient is filled up with zeros, and the two are added."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


class Copy(nn.Module):
    """What AOTAutograd traces of dropout with p = 0, and eager leaves out: a copy in forward, nothing in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, and a gated feed-forward layer; no biases."""

    def __init__(self, width: int, heads: int, hidden: int, halves: Halves) -> None:
        super().__init__()
        self.heads, self.halves = heads, halves
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm_1(x)
        query, key, value = (
            layer(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.rotated(query, cos, sin), self.rotated(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y = self.norm_2(x)
        z: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return z

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions, halves of the last dimension as pairs."""
        first, second = self.halves(x)
        return x * cos + torch.cat((-second, first), -1) * sin


class Llama(nn.Module):
    """A Llama-like decoder that returns logits."""

    def __init__(
        self, layers: int, width: int, heads: int, hidden: int, vocabulary: int, length: int, halves: Halves
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, hidden, halves) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = width // heads
        frequencies = torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(0, half, 2).float() / half))
        angles = torch.cat((frequencies, frequencies), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Residual(nn.Module):
    """x + relu(linear(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(x))


class Stack(nn.Module):
    """Blocks one after the other, then a linear head of ten outputs."""

    def __init__(self, blocks: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def llama(
    layers: int, width: int, hidden: int, length: int, batch: int, halves: Halves = by_chunk
) -> tuple[nn.Module, Arguments]:
    return Llama(layers, width, 4, hidden, 1000, length, halves), ((tokens(batch, length),), {})


def gpt_copies(layers: int, width: int, length: int, batch: int, vocabulary: int) -> tuple[nn.Module, Arguments]:
    """The GPT without dropout, with a copy where dropout would be."""
    model, inputs = gpt(layers, width, length, batch, vocabulary, 0.0)
    for block in model.blocks:  # type: ignore[union-attr]
        block.dropout = Copy()
    return model, inputs


def llama3_8b() -> tuple[nn.Module, Arguments]:
    """transformers' Llama 3 of eight billion parameters, in bfloat16 on the meta device; 4 × 4,096 labelled tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        ids = torch.zeros(4, 4096, dtype=torch.long)
    return model, ((), {"input_ids": ids, "labels": ids})


LLAMA_1B = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "use_cache": False,
}
"""A config of transformers' Llama with 1.3 billion parameters: the sizes of Sheared-LLaMA-1.3B."""


def llama_1b() -> tuple[nn.Module, Arguments]:
    """transformers' Llama of 1.3 billion parameters on the meta device; 4 × 2,048 labelled tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
        ids = torch.zeros(4, 2048, dtype=torch.long)
    return model, ((), {"input_ids": ids, "labels": ids})


def residual_mlp(layers: int, width: int, batch: int) -> tuple[nn.Module, Arguments]:
    """Very deep and narrow."""
    return Stack((Residual(width) for _ in range(layers)), width), ((torch.randn(batch, width),), {})


def mlp(layers: int, width: int, batch: int) -> tuple[nn.Module, Arguments]:
    """The ops of `cases.mlp`, with linear and relu in one module, so that both can be wrapped at once."""
    blocks = (nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers))
    return Stack(blocks, width), ((torch.randn(batch, width),), {})


def bottleneck(width_in: int, width: int, batch: int, size: int) -> tuple[nn.Module, Arguments]:
    return Bottleneck(width_in, width, 1), ((torch.randn(batch, width_in, size, size, requires_grad=True),), {})


CASES: tuple[Case, ...] = (
    Case("gpt1", lambda: gpt(1, 256, 256, 4, 1000, 0.0)),
    Case("bottleneck1", lambda: bottleneck(256, 64, 8, 24)),
    Case("unet1", lambda: unet(1, 16, 4, 96)),
    Case("gpt12_copies", lambda: gpt_copies(12, 256, 256, 4, 1000)),
    Case("llama12", lambda: llama(12, 256, 688, 256, 4)),
    Case("llama12_slices", lambda: llama(12, 256, 688, 256, 4, by_slices)),
    Case("resmlp1000", lambda: residual_mlp(1000, 32, 256)),
)

"""Models to test with, each with its inputs and its loss: `CASES` are small and quick, `FULL` are at full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Projection(torch.autograd.Function):
    """A loss that costs no memory of its own beside the gradient that it starts with: a fixed random projection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = (x.shape, x.dtype, x.device)
        return torch.dot(x.reshape(-1), Projection.direction(*ctx.like).reshape(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return Projection.direction(*ctx.like).mul_(gradients[0])

    @staticmethod
    def direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(len(shape))
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def project(output: Tensor) -> Tensor:
    """The loss of a model that returns one tensor."""
    loss: Tensor = Projection.apply(output)  # type: ignore[no-untyped-call]
    return loss


def own_loss(output: Any) -> Tensor:
    """The loss that a transformers model computes itself from labels."""
    loss: Tensor = output.loss
    return loss


@dataclass(frozen=True)
class Case:
    """A model to train for a step.

    `make` builds model and arguments; use `build`, which seeds first, so that each call gives the same numbers.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Arguments]]
    loss: Callable[[Any], Tensor] = project

    def build(self, device: str = "cpu") -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(0)
        with torch.device(device):
            model, (args, kwargs) = self.make()
        return model.train(), args, kwargs

    def __repr__(self) -> str:
        return self.name


class MLP(nn.Module):
    """A chain: linear and relu, over and over."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        y: Tensor = self.head(x)
        return y


class GPTBlock(nn.Module):
    """Pre-norm attention and a feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))
        return y


class GPT(nn.Module):
    """A decoder that returns logits."""

    def __init__(
        self,
        layers: int = 12,
        width: int = 256,
        heads: int = 4,
        vocabulary: int = 1000,
        length: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Bottleneck(nn.Module):
    """A residual block of three convolutions, with relu in place."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = 4 * width
        self.conv_1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(width)
        self.conv_3 = nn.Conv2d(width, width_out, 1, bias=False)
        self.norm_3 = nn.BatchNorm2d(width_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        y = F.relu(self.norm_1(self.conv_1(x)), inplace=True)
        y = F.relu(self.norm_2(self.conv_2(y)), inplace=True)
        return F.relu(self.norm_3(self.conv_3(y)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks; the default counts make ResNet-50."""

    def __init__(self, counts: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList()
        width_in = width
        for stage, count in enumerate(counts):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                self.blocks.append(Bottleneck(width_in, width * 2**stage, stride))
                width_in = 4 * width * 2**stage
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x)), inplace=True), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def double_convolution(width_in: int, width: int) -> nn.Sequential:
    """Twice: convolution, batch norm, relu in place."""
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """An encoder and a decoder with a long skip at each level."""

    def __init__(self, levels: int = 4, width: int = 16, width_in: int = 3, width_out: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        entries = [width_in, *widths[:-2]]
        self.down = nn.ModuleList(double_convolution(i, o) for i, o in zip(entries, widths[:-1], strict=True))
        self.middle = double_convolution(widths[-2], widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[:-1])
        self.up = nn.ModuleList(double_convolution(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat((skips[level], self.grow[level](x)), 1))
        y: Tensor = self.head(x)
        return y


class DenseBlock(nn.Module):
    """Each layer reads the outputs of all layers before it."""

    def __init__(self, layers: int, width_in: int, growth: int) -> None:
        super().__init__()
        widths = [width_in + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.layers = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class UnrolledLSTM(nn.Module):
    """A recurrent network written as a Python loop over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], x.shape[2])
        memory = hidden
        outputs = []
        for step in range(x.shape[1]):
            hidden, memory = self.cell(x[:, step], (hidden, memory))
            outputs.append(self.head(hidden))
        return torch.stack(outputs, 1)


class TwoTowers(nn.Module):
    """Two inputs through one encoder, each then through a tower of its own, and all pairs compared."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)))
        self.left = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
        self.right = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a = F.normalize(self.left(self.encoder(left)), dim=-1)
        b = F.normalize(self.right(self.encoder(right)), dim=-1)
        return a @ b.T


def tokens(batch: int, length: int, vocabulary: int = 1000) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def mlp(layers: int, width: int, batch: int) -> tuple[nn.Module, Arguments]:
    return MLP(layers, width), ((torch.randn(batch, width),), {})


def gpt(
    layers: int, width: int, length: int, batch: int, vocabulary: int, dropout: float
) -> tuple[nn.Module, Arguments]:
    model = GPT(layers, width, 4, vocabulary, length, dropout)
    return model, ((tokens(batch, length, vocabulary),), {})


def resnet(counts: tuple[int, ...], width: int, batch: int, size: int) -> tuple[nn.Module, Arguments]:
    return ResNet(counts, width), ((torch.randn(batch, 3, size, size),), {})


def unet(levels: int, width: int, batch: int, size: int) -> tuple[nn.Module, Arguments]:
    return UNet(levels, width), ((torch.randn(batch, 3, size, size),), {})


def dense(layers: int, width: int, growth: int, batch: int, size: int) -> tuple[nn.Module, Arguments]:
    return DenseBlock(layers, width, growth), ((torch.randn(batch, width, size, size),), {})


def lstm(width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    return UnrolledLSTM(width), ((torch.randn(batch, length, width),), {})


def towers(width: int, layers: int, batch: int) -> tuple[nn.Module, Arguments]:
    return TwoTowers(width, layers), ((torch.randn(batch, width), torch.randn(batch, width)), {})


def encoder_sizes(layers: int, width: int) -> dict[str, int]:
    return {
        "vocab_size": 1000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
    }


def bert(layers: int, width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**encoder_sizes(layers, width), max_position_embeddings=length)
    ids = tokens(batch, length)
    return BertForMaskedLM(config), ((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def roberta(layers: int, width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**encoder_sizes(layers, width), max_position_embeddings=length + 2, num_labels=3)
    return RobertaForSequenceClassification(config), ((tokens(batch, length),), {"labels": torch.arange(batch) % 3})


def gpt2(layers: int, width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1000,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = tokens(batch, length)
    return GPT2LMHeadModel(config), ((ids,), {"labels": ids})


def llama(layers: int, width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        use_cache=False,
    )
    ids = tokens(batch, length)
    return LlamaForCausalLM(config), ((ids,), {"labels": ids})


def t5(layers: int, width: int, length: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=1000, d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=layers, num_heads=4, use_cache=False
    )
    config.decoder_start_token_id = 0  # not an argument of every version
    model = T5ForConditionalGeneration(config)
    return model, ((), {"input_ids": tokens(batch, length), "labels": tokens(batch, length // 2)})


def vit(layers: int, width: int, size: int, batch: int) -> tuple[nn.Module, Arguments]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=8,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    return model, ((torch.randn(batch, 3, size, size),), {"labels": torch.arange(batch) % 10})


CASES: tuple[Case, ...] = (
    Case("mlp", lambda: mlp(6, 64, 256)),
    Case("gpt", lambda: gpt(3, 64, 64, 2, 200, 0.0)),
    Case("gpt_dropout", lambda: gpt(3, 64, 64, 2, 200, 0.1)),
    Case("resnet", lambda: resnet((1, 1, 1, 1), 16, 4, 48)),
    Case("unet", lambda: unet(2, 8, 2, 32)),
    Case("dense", lambda: dense(4, 16, 8, 4, 16)),
    Case("lstm", lambda: lstm(32, 6, 16)),
    Case("towers", lambda: towers(64, 2, 64)),
    Case("bert", lambda: bert(2, 64, 32, 4), own_loss),
    Case("roberta", lambda: roberta(2, 64, 32, 4), own_loss),
    Case("gpt2", lambda: gpt2(2, 64, 32, 4), own_loss),
    Case("llama", lambda: llama(2, 64, 32, 4), own_loss),
    Case("t5", lambda: t5(1, 64, 32, 4), own_loss),
    Case("vit", lambda: vit(2, 64, 48, 4), own_loss),
)

FULL: tuple[Case, ...] = (
    Case("mlp32", lambda: mlp(32, 1024, 512)),
    Case("gpt12", lambda: gpt(12, 256, 256, 4, 1000, 0.0)),
    Case("gpt12_dropout", lambda: gpt(12, 256, 256, 4, 1000, 0.1)),
    Case("resnet50", lambda: resnet((3, 4, 6, 3), 64, 8, 96)),
    Case("unet4", lambda: unet(4, 16, 4, 96)),
    Case("dense12", lambda: dense(12, 64, 32, 8, 32)),
    Case("lstm64", lambda: lstm(256, 64, 32)),
    Case("towers8", lambda: towers(512, 8, 512)),
    Case("bert6", lambda: bert(6, 256, 128, 8), own_loss),
    Case("roberta6", lambda: roberta(6, 256, 128, 8), own_loss),
    Case("gpt2_6", lambda: gpt2(6, 256, 128, 8), own_loss),
    Case("llama6", lambda: llama(6, 256, 128, 8), own_loss),
    Case("t5_4", lambda: t5(4, 256, 128, 8), own_loss),
    Case("vit6", lambda: vit(6, 256, 96, 8), own_loss),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in (*CASES, *FULL) if c.name == name)

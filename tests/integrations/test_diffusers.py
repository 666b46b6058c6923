"""diffusers' models: UNets, and an autoencoder whose `encode` and `decode` are called instead of its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

diffusers = pytest.importorskip("diffusers")

import fxckpt
from fxckpt.errors import PlanBypassedWarning
from tests.integrations.support import assert_same_training, check, planned, train

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]


def unet() -> nn.Module:
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model


def conditional_unet() -> nn.Module:
    model: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model


def autoencoder() -> nn.Module:
    model: nn.Module = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return model


def drawn(number: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(number))


def denoised(batch: int, channels: int, side: int) -> int:
    """What a loss outside of the model holds at once: noise, its difference to the output, gradients of both [B]."""
    return 4 * 4 * batch * channels * side * side


@pytest.mark.parametrize("batch", [1, 4])
def test_unet(batch: int) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)

    def loss_of(model: Any, number: int) -> Tensor:
        clean, noise = drawn(number, batch, 3, 16, 16), drawn(50 + number, batch, 3, 16, 16)
        times = torch.randint(0, 100, (batch,), generator=torch.Generator().manual_seed(number))
        return F.mse_loss(model(scheduler.add_noise(clean, noise, times), times).sample, noise)

    check(unet, loss_of, 0.8, outside_bytes=denoised(batch, 3, 16))


@pytest.mark.parametrize("batch", [1, 4])
def test_conditional_unet(batch: int) -> None:
    def loss_of(model: Any, number: int) -> Tensor:
        noisy, noise = drawn(number, batch, 4, 16, 16), drawn(50 + number, batch, 4, 16, 16)
        times = torch.full((batch,), number)
        return F.mse_loss(model(noisy, times, encoder_hidden_states=drawn(number, batch, 6, 16)).sample, noise)

    check(conditional_unet, loss_of, 0.8, outside_bytes=denoised(batch, 4, 16))


@pytest.mark.parametrize("batch", [1, 3])
def test_autoencoder(batch: int) -> None:
    def loss_of(model: Any, number: int) -> Tensor:
        image = drawn(number, batch, 3, 32, 32)
        return F.mse_loss(model(image, sample_posterior=True).sample, image)

    check(autoencoder, loss_of, 0.8, outside_bytes=denoised(batch, 3, 32))


def latent_loss(model: Any, number: int) -> Tensor:
    """As autoencoders are trained: `encode` and `decode` by themselves, and a term for what lies between."""
    image = drawn(number, 3, 3, 32, 32)
    latents = model.encode(image).latent_dist
    term: Tensor = latents.kl().mean()
    return F.mse_loss(model.decode(latents.sample()).sample, image) + 1e-3 * term


def test_encode_and_decode() -> None:
    torch.manual_seed(0)
    expected = train(autoencoder(), latent_loss)
    torch.manual_seed(0)
    ours = fxckpt.optimize(autoencoder(), 0.8, effort="fast", methods=("encode", "decode"))
    with planned():
        found = train(ours, latent_loss)
    assert_same_training(found, expected)
    assert max(found.peaks) < max(expected.peaks)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_method_that_is_not_planned_says_so(method: str) -> None:
    ours = fxckpt.optimize(autoencoder(), 0.8, effort="fast")
    with pytest.warns(PlanBypassedWarning, match=method):
        latent_loss(ours, 0)

"""Train the example's small VAE on pictures in both looks and in random colours, so that it favours no look.

It sees small cut-outs first, then larger ones, then whole pictures: the network is convolutional, and most of what it has to
learn is local, so the early steps can be cheap.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

Vae = Any
"""An AutoencoderKL, whose methods diffusers hides from type checkers."""
CHANNELS = (16, 32, 32)
"""Of its levels; each but the last halves both sides, so that a latent pixel stands for 4x4 pixels."""
STAGES = ((0.35, 16, 16), (0.86, 32, 16), (1.0, 64, 6))
"""Until which part of the training, cut-outs of how many pixels a side, and how many in a batch."""
RATE, KL_WEIGHT, MOMENT_WEIGHT = 4e-3, 2.4e-3, 0.02


def new_vae(seed: int) -> Vae:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def train_vae(wild: Tensor, tame: Tensor, steps: int, seed: int, report: Callable[[str], None]) -> Vae:
    """Train a VAE and set its scaling factor.

    Args:
        wild: pictures in random colours, (N, 3, H, W) in [-1, 1]; most of what it sees at first, so that it learns colour early.
        tame: pictures as they will be encoded, the same shape; most of what it sees later.
    """
    vae = new_vae(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        pixels = cut_out(wild, tame, progress, random)
        reconstruction, divergence, moments = losses(vae, pixels, random)
        optimizer.zero_grad()
        (reconstruction + KL_WEIGHT * min(1.0, progress / 0.3) * divergence + MOMENT_WEIGHT * moments).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            report(f"VAE: step {step + 1} of {steps}, reconstruction {reconstruction.item():.3f}")
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, tame[::7]).std().item(), 4))
    return vae


def cut_out(wild: Tensor, tame: Tensor, progress: float, random: torch.Generator) -> Tensor:
    """Draw a batch of this moment's size, half of them mirrored."""
    side, count = next((side, count) for until, side, count in STAGES if progress < until)
    wilds = max(1, round(count * max(0.9 - 1.2 * progress, 0.1)))
    chosen = [torch.randint(len(pool), (number,), generator=random) for pool, number in ((wild, wilds), (tame, count - wilds))]
    pixels = torch.cat([wild[chosen[0]], tame[chosen[1]]])
    top, left = torch.randint(0, pixels.shape[-1] - side + 1, (2,), generator=random).tolist()
    pixels = pixels[..., top : top + side, left : left + side]
    return pixels.flip(-1) if torch.rand((), generator=random) < 0.5 else pixels


def losses(vae: Vae, pixels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction; divergence from a standard normal, a latent number; how far each channel is from mean 0 and deviation 1."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample(random)  # (B, C, h, w)
    error = vae.decode(latents).sample - pixels
    coarse = functional.avg_pool2d(error, 4)
    # Edges make ink crisp; the coarse error makes colours right, which would otherwise come last.
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    reconstruction = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 8 * coarse.square().mean() + 2 * coarse.abs().mean()
    moments = (latents.std((0, 2, 3)) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
    return reconstruction, posterior.kl().mean() / latents[0].numel(), moments


@torch.no_grad()
def encode(vae: Vae, pixels: Tensor) -> Tensor:
    """Means of the raw latents, (B, C, h, w)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])


@torch.no_grad()
def fidelity_db(vae: Vae, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures that went through the VAE and back, on average."""
    restored = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in encode(vae, pixels).split(64)])
    errors = ((restored - pixels) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())

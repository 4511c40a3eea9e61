"""Pixels to raw latents, and raw latents to the scaled ones that a denoiser sees.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

UNSTATED_SCALING = 0.18215
"""What AutoencoderKL of diffusers takes where its config.json is silent."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a VAE makes of pixels."""

    channels: int
    stride_px: int
    """Pixels to a latent pixel, along a side."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Brings raw latents to about unit variance: (raw - shift) * factor."""

    factor: float
    shift: float = 0.0

    def scale(self, raw: Tensor) -> Tensor:
        return (raw - self.shift) * self.factor if self.shift else raw * self.factor


def scaling_of(vae_config: Mapping[str, Any], has_shift: bool) -> Scaling:
    """Read the scaling from a VAE's configuration.

    Args:
        has_shift: whether the family's pipeline undoes `shift_factor` when it decodes; some ignore it.
    """
    factor = vae_config.get("scaling_factor")
    shift = vae_config.get("shift_factor") if has_shift else None
    return Scaling(UNSTATED_SCALING if factor is None else float(factor), float(shift or 0.0))


def stride_of(vae_config: Mapping[str, Any]) -> int:
    """Pixels to a latent pixel: every level of an AutoencoderKL but the last halves both sides."""
    return int(2 ** (len(vae_config.get("block_out_channels", [64])) - 1))


def decode_any_precision(vae: Any) -> None:
    """Have a VAE take latents of any precision: most pipelines hand it the denoiser's as they are, and its own may be another."""

    def cast(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].to(next(module.parameters()).dtype), *arguments[1:])

    for module in (getattr(vae, "post_quant_conv", None), vae.decoder):
        if module is not None:
            module.register_forward_pre_hook(cast)


def encode_posterior(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Encode (B, 3, H, W) in [-1, 1] to the posterior's `mean` and `std`, float32, (B, C, h, w) each.

    Raises:
        ConfigError: the VAE overflowed its precision.
    """
    import torch

    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    # In float32 from here on: the variance of a good VAE is far below what bf16 can tell from its neighbours.
    moments = {"mean": posterior.mean.float(), "std": torch.exp(0.5 * posterior.logvar.float())}
    if not all(bool(torch.isfinite(moment).all()) for moment in moments.values()):
        raise ConfigError(f"the VAE gives NaN or infinite latents in {vae.dtype}", hint="Set vae_dtype to fp32 or bf16.")
    return moments

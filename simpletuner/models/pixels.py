"""Training on pixels: a model without a VAE, whose raw latents are the pictures themselves, one or three channels in [-1, 1].

Letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CHANNELS = (1, 3)
"""Grey, colour."""
GREEN, BLUE = 0.587, 0.114
"""Their parts of a grey, by ITU-R BT.601, as Pillow has them; red has the rest."""


def config_in_place_of_vae(denoiser_config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """What a VAE's configuration would say if pixels were its latents: stride 1, scale 1.

    Raises:
        ConfigError: the denoiser takes something else than grey or colour.
    """
    channels = denoiser_config.get("in_channels")
    if channels not in CHANNELS:
        raise ConfigError(
            f"without a VAE {location} would be trained on pixels, which have 1 or 3 channels; its in_channels is {channels}",
            hint="Leave out pretrained_vae_model_name_or_path none, or set in_channels and out_channels of a model with random weights to 1 or 3.",
        )
    return {"latent_channels": channels, "block_out_channels": [1], "scaling_factor": 1.0, "force_upcast": False}


def encode(pixels: Tensor, channels: int) -> dict[str, Tensor]:
    """Pixels (B, 3, H, W) in [-1, 1] as `mean` (B, C, H, W), float32, grey if C is 1; `std` is zero, for nothing is drawn."""
    import torch

    pixels = pixels.float()
    if channels == 1:
        red, green, blue = pixels.split(1, dim=1)
        pixels = red + GREEN * (green - red) + BLUE * (blue - red)  # so that what is grey already stays the very same number
    return {"mean": pixels, "std": torch.zeros_like(pixels)}


def stand_in(config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """What a pipeline may call in place of a VAE: it decodes latents to themselves, in float32."""
    import torch

    class Pixels(torch.nn.Module):  # in here, as importing this file imports no torch
        place: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(**config)
            self.register_buffer("place", torch.zeros((), device=device), persistent=False)

        @property
        def device(self) -> torch.device:
            return self.place.device

        @property
        def dtype(self) -> torch.dtype:
            return torch.float32

        def decode(self, latents: Tensor, return_dict: bool = False, generator: object = None) -> tuple[Tensor]:
            return (latents,)

        def enable_slicing(self) -> None:
            """Do nothing, as asked: there is no memory to save."""

        def enable_tiling(self) -> None:
            """The same."""

    return Pixels()

"""What families with a U-Net have in common: a 4-channel VAE, sizes, and text of CLIP.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.clip import TOKENS
from simpletuner.models.denoising import DenoisingFamily
from simpletuner.models.text import TextEncoder, count_tokens
from simpletuner.models.usual import RELEASED_ALIGNMENT_PX

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.options.validation import Validation

PIPELINE_STEP_PX = 8
"""The pipelines of diffusers refuse sides that are no multiple of this."""


class UNetFamily(DenoisingFamily):
    """A family around UNet2DConditionModel. Text and the call itself are the family's own."""

    denoiser_folder = "unet"
    denoiser_class = "UNet2DConditionModel"
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("BasicTransformerBlock",),
        "Transformer2DModel": ("Transformer2DModel",),
        "ResnetBlock2D": ("ResnetBlock2D",),
        "Downsample2D": ("Downsample2D",),
        "Upsample2D": ("Upsample2D",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    # Before anything is loaded.

    @property
    def alignment_px(self) -> int:
        """64 for the released models; for a smaller one the step in which its U-Net halves sizes without rounding."""
        if self.source.is_released and not (self.source.is_replaced("unet") or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX
        halvings = len(self.denoiser_config.get("block_out_channels", [0] * 4)) - 1
        return min(RELEASED_ALIGNMENT_PX, math.lcm(self.step_px, self.vae_stride * 2**halvings))

    @property
    def step_px(self) -> int:
        return math.lcm(PIPELINE_STEP_PX, self.vae_stride)

    def notes(self) -> list[str]:
        found = super().notes()
        if self.options.tokenizer_max_length not in (None, TOKENS):
            found.append(f"tokenizer_max_length has no effect: the CLIP encoders of {self.options.model_family} read {TOKENS} tokens")
        return found

    # Text.

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[0].tokenizer, prompts)

    @property
    def text_tokens(self) -> int:
        return TOKENS

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {}

    # Looking.

    def guidance_arguments(self, options: Validation) -> dict[str, Any]:
        return {**self.pipeline_call_arguments(options.validation_guidance), "guidance_rescale": options.validation_guidance_rescale}

    # Training.

    def tokens(self, latents: Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1])

"""What Stable Diffusion 1 and 2 have in common: one CLIP text encoder whose last states the U-Net attends to.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.clip import encode_last
from simpletuner.models.text import TextEncoder, width_of
from simpletuner.models.unet import UNetFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised


class StableDiffusion(UNetFamily):
    """A model of StableDiffusionPipeline."""

    defaults: ClassVar = {"validation_guidance": 7.5}
    parts = ("text_encoder", "tokenizer", "vae", "unet", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    pipeline_class = "StableDiffusionPipeline"
    tiny_autoencoder = "madebyollin/taesd"
    original_layout = "sd"
    adaptable_text: Mapping[str, str] = {"text_encoder.text_model": "clip"}
    text_prefixes: ClassVar = {"text_encoder": "cond_stage_model."}

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D)."""
        return {"prompt": encode_last(encoders[0], prompts)}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        return {"prompt": (self.text_tokens, width_of(encoders[0], self.released_text_width))}

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Noise, velocity or data, as the schedule says, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        prediction: Tensor = denoiser(
            noised.latents.to(dtype),  # (B, C, h, w)
            self.timesteps(noised.time),  # (B,)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        return self.pipeline_around(
            denoiser, vae, self.sampling_schedule(options), safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": text["prompt"], "negative_prompt_embeds": negative["prompt"]}

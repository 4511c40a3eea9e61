"""Stable Diffusion XL: a U-Net that predicts noise or velocity, told the sizes of the image, with two CLIP text encoders.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.clip import encode_penultimate
from simpletuner.models.text import TextEncoder
from simpletuner.models.unet import UNetFamily
from simpletuner.models.usual import pooled_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised, Sample


class StableDiffusionXL(UNetFamily):
    flavours: ClassVar = {
        "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
        "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
    }
    defaults: ClassVar = {"validation_guidance": 5.0}
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "unet", "scheduler")
    text_parts = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    pipeline_class = "StableDiffusionXLPipeline"
    original_layout = "sdxl"
    modelspec_architecture = "stable-diffusion-xl-v1-base"
    kohya_base = "sdxl_base_v1-0"

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), both encoders' states side by side, and `pooled` (B, P) of the second."""
        import torch

        (first, _), (second, pooled) = (encode_penultimate(text, prompts) for text in encoders)
        return {"prompt": torch.cat([first, second], dim=-1), "pooled": pooled}

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Noise, velocity or data, as the schedule says, (B, C, h, w)."""
        import torch

        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        sizes = torch.tensor([size_conditioning(sample) for sample in batch.samples], dtype=dtype)
        prediction: Tensor = denoiser(
            noised.latents.to(dtype),  # (B, C, h, w)
            self.timesteps(noised.time),  # (B,)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            added_cond_kwargs={"text_embeds": batch.text["pooled"].to(device, dtype), "time_ids": sizes.to(device, non_blocking=True)},
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        return self.pipeline_around(denoiser, vae, self.sampling_schedule(options), add_watermarker=False)

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return pooled_inputs(text, negative)


def size_conditioning(sample: Sample) -> tuple[int, int, int, int, int, int]:
    """Height and width of the image as it was, top and left of the crop in the resized one, height and width of the picture.

    In this order the model was trained on them (Podell et al. 2023, section 2.2) and the pipeline gives them.
    """
    original, crop = sample.geometry.original, sample.geometry.crop
    return original.height, original.width, crop.top, crop.left, crop.height, crop.width

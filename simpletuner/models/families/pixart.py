"""PixArt Sigma and Alpha: a diffusion transformer that predicts noise and its variance, with one T5 and the VAE of Stable Diffusion.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.denoising import DenoisingFamily
from simpletuner.models.recognise import Shapes
from simpletuner.models.text import TextEncoder, count_tokens, encode_masked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

SIGMA, ALPHA = "PixArtSigmaPipeline", "PixArtAlphaPipeline"
TEXT_TOKENS = {SIGMA: 300, ALPHA: 120}
"""As many as the pipelines read when they are not told otherwise."""
PIPELINE_STEP_PX = 8
"""The pipelines refuse sides that are no multiple of this."""
SHALLOW_BLOCKS = 28
"""Of the models of 0.6B."""
STAGES = {"900m-1024-v0.7-stage1": "the noisier steps", "900m-1024-v0.7-stage2": "the less noisy steps"}
"""Of a pair of models of which one goes on where the other leaves off, what each is asked at."""


class PixArt(DenoisingFamily):
    idle: ClassVar = {"distilled_guidance": "the model is not told a guidance"}
    flavours: ClassVar = {
        "900m-1024-v0.6": "terminusresearch/pixart-900m-1024-ft-v0.6",
        "900m-1024-v0.7-stage1": "terminusresearch/pixart-900m-1024-ft-v0.7-stage1",
        "900m-1024-v0.7-stage2": "terminusresearch/pixart-900m-1024-ft-v0.7-stage2",
        "600m-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
        "600m-1024": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "600m-2048": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
    }
    billions: ClassVar = {
        "900m-1024-v0.6": 0.9,
        "900m-1024-v0.7-stage1": 0.9,
        "900m-1024-v0.7-stage2": 0.9,
        "600m-512": 0.6,
        "600m-1024": 0.6,
        "600m-2048": 0.6,
    }
    defaults: ClassVar = {"validation_guidance": 4.5}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("BasicTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    masks_attention = True
    pipeline_loads_lora = False
    delicate_layers = (*DenoisingFamily.delicate_layers, "adaln_single*")
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    t5_parts = text_parts[0]
    denoiser_class = "PixArtTransformer2DModel"
    original_layout = "pixart"

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By the number of blocks; models of 0.6B for different sizes have the same tensors."""
        is_deep = any(f"blocks.{SHALLOW_BLOCKS}." in name for name in denoiser)
        return ("900m-1024-v0.6", *STAGES) if is_deep else ("600m-1024", "600m-512", "600m-2048")

    # Before anything is loaded.

    @cached_property
    def pipeline_class(self) -> str:
        """As the model's own list of parts says; every flavour is a Sigma."""
        if self.source.is_released:
            return SIGMA
        try:
            return ALPHA if self.source.index.get("_class_name") == ALPHA else SIGMA
        except ConfigError:  # a folder without such a list: `check_source` has more to say of it
            return SIGMA

    def objective_notes(self, options: Diffusion) -> list[str]:
        found = super().objective_notes(options)
        stage = STAGES.get(self.source.flavour or "")
        if stage is not None:
            found.append(f"{self.source_name()} is one of two stages, asked at {stage} alone; pictures of a validation are made by it alone")
            if not options.refiner_training:
                found.append("all steps are trained: refiner_training, and refiner_training_invert_schedule for stage 1, say which are")
        return found

    @property
    def step_px(self) -> int:
        return math.lcm(PIPELINE_STEP_PX, self.vae_stride * self._patch)

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), zero where there is padding, which `mask` (B, T) hides from the denoiser anyway."""
        return encode_masked(encoders[0], _as_read(prompts), self.text_tokens)

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[0].tokenizer, _as_read(prompts))

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS[self.pipeline_class]

    # Training.

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // self._patch) * (latents.shape[-1] // self._patch))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Noise, velocity or data, as the schedule says, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        prediction: Tensor = denoiser(
            noised.latents.to(dtype),  # (B, C, h, w)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            encoder_attention_mask=batch.text["mask"].to(device, non_blocking=True),  # (B, T)
            timestep=self.timesteps(noised.time),  # (B,)
            added_cond_kwargs=self._sizes(denoiser, noised.latents, dtype),
            return_dict=False,
        )[0]
        return prediction[:, : noised.latents.shape[1]]  # the other half of the channels is a variance that no sampler of today reads

    def _sizes(self, denoiser: nn.Module, latents: Tensor, dtype: Any) -> dict[str, Tensor | None]:
        """What an Alpha for 1024 pixels is told of the picture: height and width in pixels, (B, 2), and height over width, (B, 1)."""
        import torch

        if not denoiser.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        count, (height, width) = len(latents), (side * self.vae_stride for side in latents.shape[-2:])
        told = torch.tensor([[height, width, height / width]]).to(latents.device, dtype, non_blocking=True).expand(count, 3)  # (B, 3)
        return {"resolution": told[:, :2], "aspect_ratio": told[:, 2:]}

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        return self.pipeline_around(denoiser, vae, self.sampling_schedule(options))

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt"],
            "prompt_attention_mask": text["mask"],
            "negative_prompt_embeds": negative["prompt"],
            "negative_prompt_attention_mask": negative["mask"],
            "negative_prompt": None,  # the pipelines refuse their own default beside embeddings
        }

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {**super().pipeline_text_arguments(), "clean_caption": False}

    def pipeline_call_arguments(self, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": guidance, "use_resolution_binning": False}  # or it would render another size and resize that

    def pipeline_callback(self, after_step: Callable[[int, Tensor], None]) -> dict[str, Any]:
        return {"callback": lambda index, timestep, latents: after_step(index, latents)}

    @property
    def _patch(self) -> int:
        return int(self.denoiser_config.get("patch_size", 2))


def _as_read(prompts: Sequence[str]) -> list[str]:
    """In small letters, as the pipelines read prompts."""
    return [prompt.lower().strip() for prompt in prompts]

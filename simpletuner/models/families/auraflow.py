"""AuraFlow: a flow-matching transformer with one T5-style text encoder and a 4-channel VAE.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.models.flow import flow_matching
from simpletuner.models.identity import digest_files
from simpletuner.models.latents import Scaling, encode_posterior, scaling_of, stride_of
from simpletuner.models.loading import load_network, random_network
from simpletuner.models.text import TextEncoder, count_tokens, encode_masked, load_text_encoder
from simpletuner.types import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

RELEASED_ALIGNMENT_PX = 64
"""Of pictures of a thousand pixels a side this makes a few dozen buckets; in the model's own 16 px there would be hundreds."""
TEXT_TOKENS = {"pony": 768}
USUAL_TEXT_TOKENS = 256
"""As many as AuraFlowPipeline reads when it is not told otherwise, so that captions are cut and padded as prompts will be. The existing
tool of our name takes 120; `tokenizer_max_length: 120` repeats that."""


class AuraFlow(ModelFamily):
    flavours: ClassVar = {
        "v0.3": "terminusresearch/auraflow-v0.3",
        "v0.2": "fal/AuraFlow-v0.2",
        "v0.1": "fal/AuraFlow",
        "pony": "purplesmartai/pony-v7-base",
    }
    objective: ClassVar = "flow"
    defaults: ClassVar = {"flow_schedule_shift": 1.73, "validation_guidance": 3.5}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("AuraFlowFeedForward",),
        "TransformerBlock": ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        "JointTransformerBlock": ("AuraFlowJointTransformerBlock",),
        "SingleTransformerBlock": ("AuraFlowSingleTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    pipeline_class = "AuraFlowPipeline"

    # Before anything is loaded.

    @property
    def alignment_px(self) -> int:
        """64 for the released models; for a smaller one a sixteenth of its longest side, in steps that it can take."""
        if self.source.is_released and not (self.source.is_replaced("transformer") or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX  # known without asking the hub
        return self._step_px * max(1, min(RELEASED_ALIGNMENT_PX, self._longest_px // 16) // self._step_px)

    def check_size(self, size: Size) -> None:
        if size.width % self._step_px or size.height % self._step_px:
            raise ConfigError(
                f"{size} is not a size that {self.source_name()} can take: both sides must be multiples of {self._step_px}",
                hint=f"Set aspect_bucket_alignment to {self.alignment_px}, or leave it out.",
            )
        if max(size.width, size.height) > self._longest_px:
            # Positions beyond the grid would wrap around to its other side, without an error.
            raise ConfigError(
                f"{size} is too large for {self.source_name()}: it knows positions up to {self._longest_px} pixels a side",
                hint="Lower resolution or validation_resolution, or crop to squarer pictures.",
            )

    # Text.

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return load_text_encoder(self.source, device, dtype)

    def text_modules(self, encoders: TextEncoder) -> list[nn.Module]:
        return [encoders.encoder]

    def encode_text(self, encoders: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
        return encode_masked(encoders, prompts, self.text_tokens)

    def count_tokens(self, encoders: TextEncoder, prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders.tokenizer, prompts)

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS.get(self.source.flavour or "", USUAL_TEXT_TOKENS)

    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        files = {f"{name}/{file}": path for name in ("text_encoder", "tokenizer") for file, path in self.source.part(name).files().items()}
        return f"{digest_files(files, memo_folder)} masked {self.text_tokens}"

    # Latents.

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from diffusers import AutoencoderKL

        vae: nn.Module = load_network(AutoencoderKL, self.source.part("vae"), dtype).to(device)
        return vae

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        return encode_posterior(vae, pixels)

    def scale_latents(self, raw: Tensor) -> Tensor:
        return self._scaling.scale(raw)

    # Training.

    def load_denoiser(self, dtype: torch.dtype, seed: int) -> nn.Module:
        from diffusers import AuraFlowTransformer2DModel

        part = self.source.part("transformer")
        denoiser: nn.Module = (
            random_network(AuraFlowTransformer2DModel, part, dtype, seed)
            if self.starts_random
            else load_network(AuraFlowTransformer2DModel, part, dtype)
        )
        return denoiser

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, self.defaults["flow_schedule_shift"])

    def tokens(self, latents: Tensor) -> int:
        patch = self._denoiser_config["patch_size"]
        return int((latents.shape[-2] // patch) * (latents.shape[-1] // patch))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device = noised.latents.device
        dtype = next(denoiser.parameters()).dtype  # of the register tokens, which are never adapted or quantised
        velocity: Tensor = denoiser(
            hidden_states=noised.latents.to(dtype),  # (B, C, h, w)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            timestep=noised.time.to(dtype),  # (B,), in [0, 1]; rounded to the model's dtype, as the pipeline does
            return_dict=False,
        )[0]
        return velocity

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        from diffusers import AuraFlowPipeline

        scheduler = self.source.class_of("scheduler").from_config(self.source.part("scheduler").config())
        return AuraFlowPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=denoiser, scheduler=scheduler)

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt"],
            "prompt_attention_mask": text["mask"],
            "negative_prompt_embeds": negative["prompt"],
            "negative_prompt_attention_mask": negative["mask"],
        }

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.text_tokens}

    # What the configuration files say, each read once.

    @cached_property
    def _denoiser_config(self) -> dict[str, Any]:
        return {"patch_size": 2, "pos_embed_max_size": 1024, **self.source.part("transformer").config()}

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return self.source.part("vae").config()

    @cached_property
    def _scaling(self) -> Scaling:
        return scaling_of(self._vae_config, has_shift=False)  # AuraFlowPipeline divides by the factor and adds nothing

    @property
    def _step_px(self) -> int:
        # AuraFlowPipeline wants multiples of two latent pixels whatever the patch is.
        return stride_of(self._vae_config) * math.lcm(2, self._denoiser_config["patch_size"])

    @property
    def _longest_px(self) -> int:
        positions = math.isqrt(self._denoiser_config["pos_embed_max_size"])  # a side of the square grid of learned positions
        return int(positions * self._denoiser_config["patch_size"] * stride_of(self._vae_config))

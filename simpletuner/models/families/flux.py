"""Flux.1: a flow-matching transformer with a T5 and a CLIP text encoder, most of its flavours distilled to a guidance they are told.

Letters: B batch, C latent channels, h w latent pixels, N image tokens (h/2 x w/2), T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.clip import encode_pooled
from simpletuner.models.family import ModelFamily
from simpletuner.models.flow import flow_matching, pack, positions, unpack
from simpletuner.models.identity import digest_files
from simpletuner.models.latents import Scaling, encode_posterior, scaling_of, stride_of
from simpletuner.models.loading import load_network, random_network
from simpletuner.models.text import TextEncoder, count_tokens, encode_unmasked, load_text_encoder
from simpletuner.types import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

RELEASED_ALIGNMENT_PX = 64
TEXT_TOKENS = {"schnell": 256}
USUAL_TEXT_TOKENS = 512
SHIFT = 3.0


class Flux(ModelFamily):
    objective: ClassVar = "flow"
    flavours: ClassVar = {
        "krea": "black-forest-labs/FLUX.1-Krea-dev",
        "dev": "black-forest-labs/FLUX.1-dev",
        "schnell": "black-forest-labs/FLUX.1-schnell",
        "fluxbooru": "terminusresearch/fluxbooru-v0.3",
    }
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 3.5}
    class_aliases: ClassVar = {
        "Attention": ("FluxAttention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        "JointTransformerBlock": ("FluxTransformerBlock",),
        "SingleTransformerBlock": ("FluxSingleTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "transformer", "scheduler")
    text_parts: ClassVar = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    pipeline_class = "FluxPipeline"

    # Before anything is loaded.

    @property
    def alignment_px(self) -> int:
        if self.source.is_released and not (self.source.is_replaced("transformer") or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX  # known without asking the hub
        return self._step_px

    def check_size(self, size: Size) -> None:
        if size.width % self._step_px or size.height % self._step_px:
            raise ConfigError(
                f"{size} is not a size that {self.source_name()} can take: both sides must be multiples of {self._step_px}",
                hint=f"Set aspect_bucket_alignment to {self.alignment_px}, or leave it out.",
            )

    # Text.

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> list[TextEncoder]:
        return [load_text_encoder(self.source, device, dtype, encoder, tokenizer) for encoder, tokenizer in self.text_parts]

    def text_modules(self, encoders: Sequence[TextEncoder]) -> list[nn.Module]:
        return [text.encoder for text in encoders]

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D) of the T5, padding and all, and `pooled` (B, P) of the CLIP."""
        clip, t5 = encoders
        return {"prompt": encode_unmasked(t5, prompts, self.text_tokens), "pooled": encode_pooled(clip, prompts)}

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[1].tokenizer, prompts)  # the T5's: what the CLIP does not see of a long prompt, the T5 does

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS.get(self.source.flavour or "", USUAL_TEXT_TOKENS)

    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        names = [name for pair in self.text_parts for name in pair]
        files = {f"{name}/{file}": path for name in names for file, path in self.source.part(name).files().items()}
        return f"{digest_files(files, memo_folder)} {self.text_tokens}"

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
        from diffusers import FluxTransformer2DModel

        part = self.source.part("transformer")
        denoiser: nn.Module = (
            random_network(FluxTransformer2DModel, part, dtype, seed) if self.starts_random else load_network(FluxTransformer2DModel, part, dtype)
        )
        return denoiser

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT, options.distilled_guidance if self._denoiser_config.get("guidance_embeds") else None)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // 2) * (latents.shape[-1] // 2))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        height, width = noised.latents.shape[-2:]
        prompt = batch.text["prompt"].to(device, dtype)  # (B, T, D)
        velocity: Tensor = denoiser(
            hidden_states=pack(noised.latents.to(dtype)),  # (B, N, 4 C)
            encoder_hidden_states=prompt,
            pooled_projections=batch.text["pooled"].to(device, dtype),  # (B, P)
            timestep=noised.time.to(dtype),  # (B,), in [0, 1]; rounded to the model's dtype, as the pipeline does
            guidance=None if noised.guidance is None else noised.guidance.float(),
            img_ids=positions(height // 2, width // 2, like=prompt),
            txt_ids=prompt.new_zeros(prompt.shape[1], 3),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        from diffusers import FluxPipeline

        scheduler = self.source.class_of("scheduler").from_config(self.source.part("scheduler").config())
        nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return FluxPipeline(vae=vae, transformer=denoiser, scheduler=scheduler, **nothing)

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": text["prompt"], "pooled_prompt_embeds": text["pooled"]}  # a distilled model takes no negative prompt

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.text_tokens}

    # What the configuration files say, each read once.

    @cached_property
    def _denoiser_config(self) -> dict[str, Any]:
        return self.source.part("transformer").config()

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return self.source.part("vae").config()

    @cached_property
    def _scaling(self) -> Scaling:
        return scaling_of(self._vae_config, has_shift=True)

    @property
    def _step_px(self) -> int:
        return stride_of(self._vae_config) * 2

"""Sana: a flow-matching transformer with linear attention on latents of 32 x 32 pixels a cell, and a Gemma that is told what to make of a prompt.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.flow import flow_matching
from simpletuner.models.latents import LatentSpec
from simpletuner.models.recognise import Shapes
from simpletuner.models.text import TextEncoder, both_ways_shapes, count_tokens, encode_both_ways, width_of
from simpletuner.models.usual import UsualFamily, both_ways_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 300
TIME_SCALE = 1000
PIPELINE_STEP_PX = 32
"""The pipeline refuses sides that are no multiple of this."""
NARROW, DEEP_BLOCKS = 1152, 60
"""Width of the 0.6B model, blocks of the 4.8B one."""


class Sana(UsualFamily):
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is not distilled from guidance"}
    flavours: ClassVar = {
        "sana1.5-4.8b-1024": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
        "sana1.5-1.6b-1024": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "sana1.0-1.6b-2048": "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers",
        "sana1.0-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "sana1.0-600m-1024": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
        "sana1.0-600m-512": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    }
    billions: ClassVar = {
        "sana1.5-4.8b-1024": 4.8,
        "sana1.5-1.6b-1024": 1.6,
        "sana1.0-1.6b-2048": 1.6,
        "sana1.0-1.6b-1024": 1.6,
        "sana1.0-600m-1024": 0.6,
        "sana1.0-600m-512": 0.6,
    }
    defaults: ClassVar = {"flow_schedule_shift": 3.0, "validation_guidance": 4.5}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("GLUMBConv",),
        "TransformerBlock": ("SanaTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    masks_attention = True
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    vae_class = "AutoencoderDC"
    released_latents = LatentSpec(channels=32, stride_px=32)
    released_text_width = 2304

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By width, depth and, between those that have these in common, whether queries are normalised."""
        entry = denoiser.get("x_embedder.proj.weight", denoiser.get("patch_embed.proj.weight"))
        if entry is None:
            return ()
        if entry[0] == NARROW:
            return ("sana1.0-600m-1024", "sana1.0-600m-512")
        if any(f"blocks.{DEEP_BLOCKS - 1}." in name for name in denoiser):
            return ("sana1.5-4.8b-1024",)
        is_normalised = any(name.endswith(("attn.q_norm.weight", "attn1.norm_q.weight")) for name in denoiser)
        return ("sana1.5-1.6b-1024",) if is_normalised else ("sana1.0-1.6b-1024", "sana1.0-1.6b-2048")

    @property
    def step_px(self) -> int:
        return math.lcm(PIPELINE_STEP_PX, self.vae_stride * int(self.denoiser_config.get("patch_size", 1)))

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D) and `mask` (B, T) after the pipeline's instruction to the Gemma; `negative` and `negative_mask` without it."""
        import diffusers

        told = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return encode_both_ways(diffusers.SanaPipeline, encoders[0], prompts, self.text_tokens, complex_human_instruction=told)

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        return both_ways_shapes(self.text_tokens, width_of(encoders[0], self.released_text_width))

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        # After the instruction there is room for one less, and the pipeline makes small letters of all.
        return [count + 1 for count in count_tokens(encoders[0].tokenizer, [prompt.lower().strip() for prompt in prompts])]

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Latents.

    def latent_spec(self, vae: Mapping[str, Any] | None) -> LatentSpec:
        """Every level but the last halves both sides."""
        return self.released_latents if vae is None else LatentSpec(int(vae["latent_channels"]), 2 ** (len(vae["encoder_block_out_channels"]) - 1))

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """The VAE is no variational one: it gives one latent, not a distribution."""
        import torch

        encoder: Any = vae
        with torch.no_grad():
            latent = encoder.encode(pixels.to(encoder.device, encoder.dtype)).latent.float()
        if not bool(torch.isfinite(latent).all()):
            raise ConfigError(f"the VAE gives NaN or infinite latents in {encoder.dtype}", hint="Set vae_dtype to fp32 or bf16.")
        return {"mean": latent, "std": torch.zeros_like(latent)}

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, self.defaults["flow_schedule_shift"])

    def tokens(self, latents: Tensor) -> int:
        patch = int(self.denoiser_config.get("patch_size", 1))
        return int((latents.shape[-2] // patch) * (latents.shape[-1] // patch))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        velocity: Tensor = denoiser(
            hidden_states=noised.latents.to(dtype),  # (B, C, h, w)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            encoder_attention_mask=batch.text["mask"].to(device, non_blocking=True),  # (B, T)
            timestep=noised.time * TIME_SCALE * float(self.denoiser_config.get("timestep_scale", 1.0)),  # (B,)
            return_dict=False,
        )[0]
        return velocity[:, : noised.latents.shape[1]]  # further channels, where a model has them, are a variance that the sampler does not read

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return both_ways_inputs(text, negative)

    def pipeline_call_arguments(self, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": guidance, "use_resolution_binning": False}  # or it would render another size and resize that

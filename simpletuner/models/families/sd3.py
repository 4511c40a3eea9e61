"""Stable Diffusion 3 and 3.5: a flow-matching transformer with two CLIP text encoders and a T5.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.clip import TOKENS as CLIP_TOKENS
from simpletuner.models.clip import encode_penultimate
from simpletuner.models.flow import flow_matching
from simpletuner.models.latents import LatentSpec
from simpletuner.models.recognise import Shapes
from simpletuner.models.text import TextEncoder, count_tokens, encode_unmasked, pooled_width_of, width_of
from simpletuner.models.usual import UsualFamily, pooled_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.validation import Validation
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 256
"""Of the T5, as many as StableDiffusion3Pipeline reads when it is not told otherwise."""
LARGE_BLOCKS = 38
TIME_SCALE = 1000
"""The denoiser is told times from 0 to this."""


class StableDiffusion3(UsualFamily):
    objective: ClassVar = "flow"
    own_options = ("validation_guidance_skip_layers",)
    idle: ClassVar = {"distilled_guidance": "the model is not distilled from guidance"}
    flavours: ClassVar = {
        "medium": "stabilityai/stable-diffusion-3.5-medium",
        "large": "stabilityai/stable-diffusion-3.5-large",
        "3.0-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    }
    billions: ClassVar = {"medium": 2.5, "large": 8.1, "3.0-medium": 2.1}
    defaults: ClassVar = {"flow_schedule_shift": 3.0, "validation_guidance": 5.0}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("JointTransformerBlock",),
        "JointTransformerBlock": ("JointTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
    t5_parts = text_parts[2]
    tiny_autoencoder = "madebyollin/taesd3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    original_layout = "sd3"
    adaptable_text: Mapping[str, str] = {"text_encoder.text_model": "clip_l", "text_encoder_2.text_model": "clip_g"}
    modelspec_architecture = "stable-diffusion-3.5-medium"
    kohya_base = "sd3"
    text_prefixes: ClassVar = {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    }
    vae_has_shift = True
    released_latents = LatentSpec(channels=16, stride_px=8)

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By the number of blocks and of positions."""
        if any(f"{blocks}.{LARGE_BLOCKS - 1}." in name for name in denoiser for blocks in ("joint_blocks", "transformer_blocks")):
            return ("large",)
        positions = denoiser.get("pos_embed", denoiser.get("pos_embed.pos_embed"))
        return {192**2: ("3.0-medium",), 384**2: ("medium",)}.get(positions[1], ()) if positions else ()

    @property
    def step_px(self) -> int:
        return self.vae_stride * int(self.denoiser_config.get("patch_size", 2))

    @property
    def longest_px(self) -> int:
        """A side of the square grid of positions, of which smaller pictures take the middle."""
        return int(self.denoiser_config.get("pos_embed_max_size", 96)) * self.step_px

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D): both CLIPs' states side by side and filled up with zeros, then the T5's; `pooled` (B, P) of both CLIPs."""
        return self.encode_trained(encoders, prompts, self.encode_frozen(encoders, prompts))

    def encode_frozen(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"t5": encode_unmasked(encoders[2], prompts, self.text_tokens)}

    def encode_trained(self, encoders: Sequence[TextEncoder], prompts: Sequence[str], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        (first, pooled_1), (second, pooled_2) = (encode_penultimate(text, prompts) for text in encoders[:2])
        t5 = frozen["t5"]
        clips = torch.cat([first, second], dim=-1)
        clips = torch.nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return {"prompt": torch.cat([clips, t5], dim=-2), "pooled": torch.cat([pooled_1, pooled_2], dim=-1)}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        first, second, t5 = encoders
        pooled = pooled_width_of(first, 768) + pooled_width_of(second, 1280)
        return {"prompt": (CLIP_TOKENS + self.text_tokens, width_of(t5, self.released_text_width)), "pooled": (pooled,)}

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[2].tokenizer, prompts)  # the T5's: what the CLIPs do not see of a long prompt, the T5 does

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, self.defaults["flow_schedule_shift"])

    def tokens(self, latents: Tensor) -> int:
        patch = self.step_px // self.vae_stride
        return int((latents.shape[-2] // patch) * (latents.shape[-1] // patch))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        velocity: Tensor = denoiser(
            hidden_states=noised.latents.to(dtype),  # (B, C, h, w)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            pooled_projections=batch.text["pooled"].to(device, dtype),  # (B, P)
            timestep=noised.time * TIME_SCALE,  # (B,)
            return_dict=False,
        )[0]
        return velocity

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return pooled_inputs(text, negative)

    def guidance_arguments(self, options: Validation) -> dict[str, Any]:
        layers = options.validation_guidance_skip_layers
        skipped = {
            "skip_guidance_layers": layers,
            "skip_layer_guidance_scale": options.validation_guidance_skip_scale,
            "skip_layer_guidance_start": options.validation_guidance_skip_layers_start,
            "skip_layer_guidance_stop": options.validation_guidance_skip_layers_stop,
        }
        return {**self.pipeline_call_arguments(options.validation_guidance), **(skipped if layers else {})}

"""AuraFlow: a flow-matching transformer with one T5-style text encoder and a 4-channel VAE.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.flow import flow_matching
from simpletuner.models.recognise import Shapes
from simpletuner.models.text import TextEncoder, count_tokens, encode_masked
from simpletuner.models.usual import RELEASED_ALIGNMENT_PX, UsualFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = {"pony": 768}
USUAL_TEXT_TOKENS = 256
"""As many as AuraFlowPipeline reads when it is not told otherwise, so that captions are cut and padded as prompts will be. The existing
tool of our name takes 120; `tokenizer_max_length: 120` repeats that."""


class AuraFlow(UsualFamily):
    flavours: ClassVar = {
        "v0.3": "terminusresearch/auraflow-v0.3",
        "v0.2": "fal/AuraFlow-v0.2",
        "v0.1": "fal/AuraFlow",
        "pony": "purplesmartai/pony-v7-base",
    }
    billions: ClassVar = dict.fromkeys(flavours, 6.8)
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is not distilled from guidance"}
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
    text_parts = (("text_encoder", "tokenizer"),)
    t5_parts = text_parts[0]
    released_text_width = 2048
    takes_pixels: ClassVar = True
    tiny_autoencoder = "madebyollin/taesdxl"
    pipeline_class = "AuraFlowPipeline"
    denoiser_class = "AuraFlowTransformer2DModel"
    original_layout = "auraflow"

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By the number of positions."""
        positions = denoiser.get("positional_encoding", denoiser.get("pos_embed.pos_embed"))
        return {32**2: ("v0.2", "v0.1", "pony"), 96**2: ("v0.3", "pony")}.get(positions[1], ()) if positions else ()

    # Before anything is loaded.

    @property
    def alignment_px(self) -> int:
        """64 for the released models; for a smaller one a sixteenth of its longest side, in steps that it can take."""
        if self.source.is_released and not (self.source.is_replaced("transformer") or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX
        return self.step_px * max(1, min(RELEASED_ALIGNMENT_PX, self.longest_px // 16) // self.step_px)

    @property
    def step_px(self) -> int:
        # AuraFlowPipeline wants multiples of two latent pixels whatever the patch is.
        return self.vae_stride * math.lcm(2, self._patch)

    @property
    def longest_px(self) -> int:
        """A side of the square grid of learned positions; those beyond it would wrap around to its other side, without an error."""
        return math.isqrt(self.denoiser_config.get("pos_embed_max_size", 1024)) * self._patch * self.vae_stride

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        return encode_masked(encoders[0], prompts, self.text_tokens)

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[0].tokenizer, prompts)

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS.get(self.source.flavour or "", USUAL_TEXT_TOKENS)

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, self.defaults["flow_schedule_shift"])

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // self._patch) * (latents.shape[-1] // self._patch))

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

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt"],
            "prompt_attention_mask": text["mask"],
            "negative_prompt_embeds": negative["prompt"],
            "negative_prompt_attention_mask": negative["mask"],
        }

    @property
    def _patch(self) -> int:
        return int(self.denoiser_config.get("patch_size", 2))

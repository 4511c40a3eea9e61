"""Flux.1: a flow-matching transformer with a T5 and a CLIP text encoder, most of its flavours distilled to a guidance they are told.

Letters: B batch, C latent channels, h w latent pixels, N image tokens (h/2 x w/2), T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.clip import encode_pooled
from simpletuner.models.flow import flow_matching, pack, positions, unpack
from simpletuner.models.latents import LatentSpec
from simpletuner.models.recognise import Shapes
from simpletuner.models.text import TextEncoder, count_tokens, encode_unmasked, mask_padding, width_of
from simpletuner.models.usual import UsualFamily, pooled_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.validation import Validation
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = {"schnell": 256}
USUAL_TEXT_TOKENS = 512
SHIFT = 3.0
UNTOLD = ("schnell", "libreflux")
"""Flavours that are told no guidance."""
TEXT_MASK = "text_mask"
"""What the denoiser's attention is told of the padding, by the text that it may see, until it is widened by the image's tokens."""

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
OF_TEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
WITH_FEED_FORWARD = (*ATTENTION, "ff.net.0.proj", "ff.net.2", *TEXT_FEED_FORWARD, "proj_mlp", "proj_out")


class Flux(UsualFamily):
    objective: ClassVar = "flow"
    flavours: ClassVar = {
        "krea": "black-forest-labs/FLUX.1-Krea-dev",
        "dev": "black-forest-labs/FLUX.1-dev",
        "schnell": "black-forest-labs/FLUX.1-schnell",
        "fluxbooru": "terminusresearch/fluxbooru-v0.3",
        "libreflux": "jimmycarter/LibreFlux-SimpleTuner",
    }
    billions: ClassVar = dict.fromkeys(flavours, 11.9)
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 3.5}
    flavour_defaults: ClassVar = {
        "schnell": {"validation_guidance": 0.0, "validation_num_inference_steps": 4},
        "fluxbooru": {"validation_guidance_real": 6.0},
        "libreflux": {"validation_guidance_real": 6.0},
    }
    assistants: ClassVar = {"schnell": "ostris/FLUX.1-schnell-training-adapter"}
    class_aliases: ClassVar = {
        "Attention": ("FluxAttention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        "JointTransformerBlock": ("FluxTransformerBlock",),
        "SingleTransformerBlock": ("FluxSingleTransformerBlock",),
    }
    lora_targets = ATTENTION
    lora_target_sets: ClassVar = {
        "all": ATTENTION,
        "context": OF_TEXT,
        "context+ffs": (*OF_TEXT, *TEXT_FEED_FORWARD),
        "all+ffs": WITH_FEED_FORWARD,
        "all+ffs+embedder": (*WITH_FEED_FORWARD, "x_embedder"),
        "ai-toolkit": (*WITH_FEED_FORWARD, "norm.linear", "norm1.linear", "norm1_context.linear"),
        "mmdit": ("to_k", "to_q", "to_v", "to_out.0"),
        "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
        "nano": ("single_transformer_blocks.7.proj_out",),
    }
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    t5_parts: ClassVar = ("text_encoder_2", "tokenizer_2")
    tiny_autoencoder = "madebyollin/taef1"
    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    original_layout = "flux"
    own_options = ("flux_attention_masked_training",)
    adaptable_text: Mapping[str, str] = {"text_encoder.text_model": "clip_l"}
    modelspec_architecture = "flux-1-dev"
    kohya_base = "flux1"
    text_prefixes: ClassVar = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."}
    vae_has_shift = True
    released_latents = LatentSpec(channels=16, stride_px=8)

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By whether it is told a guidance."""
        is_told = "guidance_in.in_layer.weight" in denoiser or "time_text_embed.guidance_embedder.linear_1.weight" in denoiser
        return ("dev", "krea", "fluxbooru") if is_told else ("schnell", "libreflux", "fluxbooru")

    takes_real_guidance = True

    # Before anything is loaded.

    @property
    def idle(self) -> Mapping[str, str]:
        untold = "" if self._is_told_guidance else "the model is told no guidance"
        named = ("distilled_guidance", "validation_guidance") if untold else ()
        return {"validation_negative_prompt": "it needs a validation_guidance_real above 1", **dict.fromkeys(named, untold)}

    @property
    def _is_told_guidance(self) -> bool:
        """As its configuration says; what the flavours are is known without asking the hub."""
        if self.source.is_released or not self.source.is_here:
            return self.source.flavour not in UNTOLD
        try:
            return bool(self.denoiser_config.get("guidance_embeds"))
        except ConfigError:  # a folder without it: `check_source` has more to say of it
            return True

    @property
    def step_px(self) -> int:
        return self.vae_stride * 2

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D) of the T5, padding and all, and `pooled` (B, P) of the CLIP; `mask` (B, T), zero at padding, if that is hidden."""
        return self.encode_trained(encoders, prompts, self.encode_frozen(encoders, prompts))

    def encode_frozen(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded = {"prompt": encode_unmasked(encoders[1], prompts, self.text_tokens)}
        return {**encoded, "mask": mask_padding(encoders[1], prompts, self.text_tokens)} if self.hides_padding else encoded

    def encode_trained(self, encoders: Sequence[TextEncoder], prompts: Sequence[str], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**frozen, "pooled": encode_pooled(encoders[0], prompts)}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        clip, t5 = encoders
        shapes: dict[str, tuple[int, ...]] = {"prompt": (self.text_tokens, width_of(t5, self.released_text_width)), "pooled": (width_of(clip, 768),)}
        return {**shapes, "mask": (self.text_tokens,)} if self.hides_padding else shapes

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[1].tokenizer, prompts)  # the T5's: what the CLIP does not see of a long prompt, the T5 does

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS.get(self.source.flavour or "", USUAL_TEXT_TOKENS)

    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        return super().text_fingerprint(memo_folder) + (" with a mask" if self.hides_padding else "")

    @property
    def hides_padding(self) -> bool:
        """Whether the denoiser is kept from seeing the T5's padding. The makers' models see it; LibreFlux was trained without."""
        return self.options.flux_attention_masked_training or self.source.flavour == "libreflux"

    @property
    def masks_attention(self) -> bool:
        return self.hides_padding

    # Training.

    def prepare_denoiser(self, denoiser: nn.Module) -> nn.Module:
        if self.hides_padding:
            denoiser.register_forward_pre_hook(_mask_attention, with_kwargs=True)
        return denoiser

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT, options.distilled_guidance if self.denoiser_config.get("guidance_embeds") else None)

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
            joint_attention_kwargs=self._attention({**batch.text, "prompt": prompt}),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        # The pipeline asks nothing of the negative prompt where `true_cfg_scale` is 1, as it is unless `guidance_arguments` says otherwise.
        return {**pooled_inputs(text, negative), "joint_attention_kwargs": self._attention(text, negative)}

    def guidance_arguments(self, options: Validation) -> dict[str, Any]:
        real = options.validation_guidance_real
        return {**self.pipeline_call_arguments(options.validation_guidance), **({"true_cfg_scale": real} if real > 1 else {})}

    def _attention(self, *texts: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """What the denoiser is told of the padding in any of these, of which it sees one at a time."""
        return {TEXT_MASK: [(text["prompt"], text["mask"]) for text in texts]} if self.hides_padding else None


def _mask_attention(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make of a mask over text, (B, T), the one that attention wants: truth values over text and image, (B, 1, 1, T + N).

    Here, because the denoiser alone knows how many image tokens there are when its pipeline calls it.
    """
    import torch

    told = dict(named.get("joint_attention_kwargs") or {})
    masks = told.pop(TEXT_MASK, None)
    if masks is None:
        return None
    prompt = named["encoder_hidden_states"]
    mask = next(mask for seen, mask in masks if seen is prompt).to(prompt.device, non_blocking=True)
    image = mask.new_ones(named["hidden_states"].shape[:2])  # (B, N)
    told["attention_mask"] = torch.cat([mask.expand(len(image), -1), image], dim=1).bool()[:, None, None, :]
    return arguments, {**named, "joint_attention_kwargs": told}

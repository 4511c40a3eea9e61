"""Z-Image: a flow-matching transformer in one stream with a Qwen3 whose states of the prompt alone it reads, without padding.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.flow import flow_matching
from simpletuner.models.latents import LatentSpec
from simpletuner.models.text import TextEncoder, fill_up, unpadded
from simpletuner.models.usual import UsualFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 512
SHIFT = 3.0
PATCH = 2
AXES_LENS = (1536, 512, 512)
"""Positions that the released model knows: of text and picture, of rows, of columns."""


class ZImage(UsualFamily):
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is told no guidance"}
    flavours: ClassVar = {
        "base": "Tongyi-MAI/Z-Image",
        "turbo": "Tongyi-MAI/Z-Image-Turbo",
    }
    billions: ClassVar = dict.fromkeys(flavours, 6.2)
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 4.0}
    flavour_defaults: ClassVar = {"turbo": {"validation_guidance": 0.0, "validation_num_inference_steps": 9}}
    assistants: ClassVar = {"turbo": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v1.safetensors"}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("ZImageTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    masks_attention = True
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    tiny_autoencoder = "madebyollin/taef1"
    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    original_layout = "z_image"
    vae_has_shift = True
    released_latents = LatentSpec(channels=16, stride_px=8)
    released_text_width = 2560

    @property
    def step_px(self) -> int:
        return self.vae_stride * PATCH

    @property
    def longest_px(self) -> int:
        return int(min(self.denoiser_config.get("axes_lens", AXES_LENS)[1:])) * self.step_px

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), zero where there is padding, and `mask` (B, T), one where there is none."""
        import diffusers
        import torch

        (text,) = encoders
        kind: Any = diffusers.ZImagePipeline
        pipeline = kind(scheduler=None, vae=None, text_encoder=text.encoder, tokenizer=text.tokenizer, transformer=None)
        with torch.no_grad():
            states, _ = pipeline.encode_prompt(
                list(prompts), next(text.encoder.parameters()).device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
            )
        return fill_up(states, self.text_tokens)

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        tokenizer = encoders[0].tokenizer
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // PATCH) * (latents.shape[-1] // PATCH))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        import torch

        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        velocities: list[Tensor] = denoiser(
            list(noised.latents.to(dtype)[:, :, None]),  # B of (C, 1, h, w)
            1 - noised.time,  # (B,); this model has noise at 0 and data at 1, and the velocity the other way round
            [states.to(device, dtype) for states in unpadded(batch.text)],  # B of (tokens, D)
            return_dict=False,
        )[0]
        return -torch.stack(velocities)[:, :, 0]

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": unpadded(text), "negative_prompt_embeds": unpadded(negative)}

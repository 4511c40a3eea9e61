"""Qwen-Image: a flow-matching transformer in two streams, with a Qwen2.5-VL that describes the prompt and a VAE made for films.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, N image tokens (h/2 x w/2), T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.flow import flow_matching, pack, unpack
from simpletuner.models.latents import LatentSpec, encode_posterior
from simpletuner.models.text import TextEncoder, fill_up
from simpletuner.models.usual import UsualFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 512
SHIFT = 3.0
MOST_TEXT_TOKENS = 1024
"""What the pipeline cuts longer prompts to, whatever it is asked for."""


class QwenImage(UsualFamily):
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is told no guidance"}
    flavours: ClassVar = {
        "v2.0": "Qwen/Qwen-Image-2512",
        "v1.0": "Qwen/Qwen-Image",
    }
    billions: ClassVar = dict.fromkeys(flavours, 20.4)
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 4.0}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("QwenImageTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    masks_attention = True
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    original_layout = "qwen_image"
    vae_class = "AutoencoderKLQwenImage"
    released_latents = LatentSpec(channels=16, stride_px=8)
    released_text_width = 3584

    # Before anything is loaded.

    def check_source(self) -> None:
        if self.text_tokens > MOST_TEXT_TOKENS:
            raise ConfigError(
                f"tokenizer_max_length {self.text_tokens} is too long for model_family qwen_image: its pipeline reads {MOST_TEXT_TOKENS} tokens",
                hint=f"Leave tokenizer_max_length out for {TEXT_TOKENS}, or set it to {MOST_TEXT_TOKENS} at most.",
            )
        super().check_source()

    @property
    def step_px(self) -> int:
        return self.vae_stride * 2

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D) after the pipeline's template, zero where there is padding, and `mask` (B, T), one where there is none."""
        import torch

        (text,) = encoders
        with torch.no_grad():
            states, mask = _text_pipeline(text).encode_prompt(
                list(prompts), next(text.encoder.parameters()).device, max_sequence_length=self.text_tokens
            )
        lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return fill_up([row[:length] for row, length in zip(states, lengths)], self.text_tokens)

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        pipeline = _text_pipeline(encoders[0])
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        return [len(ids) - pipeline.prompt_template_encode_start_idx for ids in encoders[0].tokenizer(texts, verbose=False)["input_ids"]]

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Latents.

    def latent_spec(self, vae: Mapping[str, Any] | None) -> LatentSpec:
        """Every level that may shorten a film halves both sides."""
        return self.released_latents if vae is None else LatentSpec(int(vae["z_dim"]), 2 ** len(vae["temperal_downsample"]))

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        return {name: moment[:, :, 0] for name, moment in encode_posterior(vae, pixels[:, :, None]).items()}  # a film of one picture

    def scale_latents(self, raw: Tensor) -> Tensor:
        """Every channel has a mean and a deviation of its own."""
        import torch

        mean, std = (torch.tensor(values, device=raw.device, dtype=raw.dtype)[:, None, None] for values in self._statistics)
        return (raw - mean) / std

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        return self.vae_config["latents_mean"], self.vae_config["latents_std"]

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // 2) * (latents.shape[-1] // 2))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        height, width = noised.latents.shape[-2:]
        prompt, mask = _cropped(batch.text)
        velocity: Tensor = denoiser(
            hidden_states=pack(noised.latents.to(dtype)),  # (B, N, 4 C)
            timestep=noised.time.to(dtype),  # (B,), in [0, 1]; rounded to the model's dtype, as the pipeline does
            encoder_hidden_states=prompt.to(device, dtype),  # (B, longest, D)
            encoder_hidden_states_mask=None if mask is None else mask.to(device, non_blocking=True),  # (B, longest)
            img_shapes=[[(1, height // 2, width // 2)]] * len(prompt),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt"][:, : _longest(text)],
            "prompt_embeds_mask": text["mask"][:, : _longest(text)],
            "negative_prompt_embeds": negative["prompt"][:, : _longest(negative)],
            "negative_prompt_embeds_mask": negative["mask"][:, : _longest(negative)],
        }

    def pipeline_call_arguments(self, guidance: float | None) -> dict[str, Any]:
        return {"true_cfg_scale": guidance}


def _text_pipeline(text: TextEncoder) -> Any:
    """The pipeline's way with prompts, around the language model without its last layer: of the logits, which are large, it reads none."""
    import diffusers

    language_model: Any = text.encoder
    return diffusers.QwenImagePipeline(scheduler=None, vae=None, text_encoder=language_model.model, tokenizer=text.tokenizer, transformer=None)


def _longest(text: Mapping[str, Tensor]) -> int:
    """Tokens of the longest prompt of a batch."""
    return int(text["mask"].sum(dim=1).max())


def _cropped(text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings up to the longest prompt of a batch, and its mask, if there is padding left."""
    prompt, mask = (text[name][:, : _longest(text)] for name in ("prompt", "mask"))
    return prompt, None if bool(mask.all()) else mask

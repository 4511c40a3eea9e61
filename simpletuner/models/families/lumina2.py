"""Lumina Image 2.0: a flow-matching transformer that reads a Gemma's states, of a prompt that follows an instruction.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.flow import flow_matching
from simpletuner.models.latents import LatentSpec
from simpletuner.models.text import TextEncoder, both_ways_shapes, count_tokens, encode_both_ways, width_of
from simpletuner.models.usual import UsualFamily, both_ways_inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.models.streaming import Settle
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 256
SHIFT = 6.0
"""Of the sampler that the model was published with."""
AXES_LENS = (300, 512, 512)
"""Positions that the released model knows: of text, of rows, of columns."""


class Lumina2(UsualFamily):
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is not distilled from guidance"}
    flavours: ClassVar = {"2.0": "Alpha-VLLM/Lumina-Image-2.0"}
    billions: ClassVar = dict.fromkeys(flavours, 2.6)
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 4.0}
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("LuminaFeedForward",),
        "TransformerBlock": ("Lumina2TransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    masks_attention = True
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    tiny_autoencoder = "madebyollin/taef1"
    pipeline_class = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    original_layout = "lumina2"
    vae_has_shift = True
    released_latents = LatentSpec(channels=16, stride_px=8)
    released_text_width = 2304

    @property
    def step_px(self) -> int:
        return self.vae_stride * self._patch

    @property
    def longest_px(self) -> int:
        return min(self.denoiser_config.get("axes_lens", AXES_LENS)[1:]) * self.step_px

    # Text.

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> list[TextEncoder]:
        known = self.denoiser_config.get("axes_lens", AXES_LENS)[0] - 1  # the picture takes the position after the text
        if self.text_tokens > known:
            raise ConfigError(
                f"tokenizer_max_length {self.text_tokens} is too long for {self.source_name()}: it knows positions of {known} tokens",
                hint=f"Leave tokenizer_max_length out, or set it to {known} at most.",
            )
        return super().load_text_encoders(device, dtype, settles)

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D) and `mask` (B, T) after the pipeline's instruction to the Gemma; `negative` and `negative_mask` without it."""
        import diffusers

        return encode_both_ways(diffusers.Lumina2Pipeline, encoders[0], prompts, self.text_tokens)

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        return both_ways_shapes(self.text_tokens, width_of(encoders[0], self.released_text_width))

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        import diffusers

        pipeline: Any = diffusers.Lumina2Pipeline(*[None] * 5)
        return count_tokens(encoders[0].tokenizer, [f"{pipeline.system_prompt} <Prompt Start> {prompt}" for prompt in prompts])

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Training.

    def prepare_denoiser(self, denoiser: nn.Module) -> nn.Module:
        _ask_the_host(denoiser)
        return denoiser

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // self._patch) * (latents.shape[-1] // self._patch))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        velocity: Tensor = denoiser(
            hidden_states=noised.latents.to(dtype),  # (B, C, h, w)
            timestep=1 - noised.time,  # (B,); this model has noise at 0 and data at 1, and the velocity the other way round
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            encoder_attention_mask=batch.text["mask"],  # (B, T); in main memory, where its lengths are read (see `_ask_the_host`)
            return_dict=False,
        )[0]
        return -velocity

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return both_ways_inputs(text, negative)

    @property
    def _patch(self) -> int:
        return int(self.denoiser_config.get("patch_size", 2))


def _ask_the_host(denoiser: nn.Module) -> None:
    """Keep the device from being waited for at each call, as diffusers (to 0.42 at least) does.

    The lengths of prompts are read off their mask wherever that is; so it stays in main memory, and the layers that attend by it bring it
    over. And the tables of rotary embeddings are copied anew each time, unless they are there.
    """

    def bring_mask(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, mask, *others = arguments
        return (states, mask.to(states.device, non_blocking=True), *others)

    def bring_tables(rope: Any, arguments: tuple[Any, ...]) -> None:
        device = arguments[0].device
        if device.type != "mps":  # where it computes them on the CPU
            rope.freqs_cis = [table.to(device) for table in rope.freqs_cis]

    layers: Any = denoiser.context_refiner
    for layer in layers:
        layer.register_forward_pre_hook(bring_mask)
    rope: Any = denoiser.rope_embedder
    rope.register_forward_pre_hook(bring_tables)

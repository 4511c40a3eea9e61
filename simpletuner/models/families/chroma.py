"""Chroma: a flow-matching transformer made from Flux.1 schnell, with a T5 whose padding is masked, and no CLIP and no told guidance.

Letters: B batch, C latent channels, h w latent pixels, N image tokens (h/2 x w/2), T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.models.flow import flow_matching, pack, positions, unpack
from simpletuner.models.latents import LatentSpec
from simpletuner.models.text import TextEncoder, count_tokens
from simpletuner.models.usual import UsualFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.types import Batch, Noised

TEXT_TOKENS = 512
SHIFT = 3.0
POSITIONAL_UNMASKED = 3
"""Arguments of a single block, up to its mask, that diffusers hands on under gradient checkpointing."""


class Chroma(UsualFamily):
    objective: ClassVar = "flow"
    idle: ClassVar = {"distilled_guidance": "the model is not told a guidance"}
    flavours: ClassVar = {
        "base": "lodestones/Chroma1-Base",
        "hd": "lodestones/Chroma1-HD",
        "flash": "lodestones/Chroma1-Flash",
    }
    billions: ClassVar = dict.fromkeys(flavours, 8.9)
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 4.0}
    flavour_defaults: ClassVar = {"flash": {"validation_guidance": 1.0, "validation_num_inference_steps": 16}}
    class_aliases: ClassVar = {
        "Attention": ("FluxAttention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        "JointTransformerBlock": ("ChromaTransformerBlock",),
        "SingleTransformerBlock": ("ChromaSingleTransformerBlock",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    delicate_layers = (*UsualFamily.delicate_layers, "distilled_guidance_layer*")
    masks_attention = True
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    text_parts = (("text_encoder", "tokenizer"),)
    t5_parts = text_parts[0]
    tiny_autoencoder = "madebyollin/taef1"
    pipeline_class = "ChromaPipeline"
    denoiser_class = "ChromaTransformer2DModel"
    original_layout = "chroma"
    text_prefixes: ClassVar = {"text_encoder": "text_encoders.t5xxl."}
    vae_has_shift = True
    released_latents = LatentSpec(channels=16, stride_px=8)

    @property
    def step_px(self) -> int:
        return self.vae_stride * 2

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), and `mask` (B, T): one for the prompt's tokens and the first of padding, which the model was trained to see."""
        import torch

        (text,) = encoders
        padded = {"padding": "max_length", "truncation": True, "max_length": self.text_tokens, "return_tensors": "pt"}
        inputs = text.tokenizer(list(prompts), **padded).to(next(text.encoder.parameters()).device)
        mask = inputs["attention_mask"]  # (B, T)
        with torch.no_grad():
            hidden = text.encoder(inputs["input_ids"], attention_mask=mask)[0]  # (B, T, D)
        seen = torch.arange(self.text_tokens, device=mask.device) <= mask.sum(dim=1, keepdim=True)
        return {"prompt": hidden, "mask": seen.to(mask)}

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[0].tokenizer, prompts)

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    # Training.

    def prepare_denoiser(self, denoiser: nn.Module) -> nn.Module:
        _mask_checkpointed_blocks(denoiser)
        _zeros_on_device(denoiser)
        return denoiser

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // 2) * (latents.shape[-1] // 2))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        import torch

        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        height, width = noised.latents.shape[-2:]
        image = pack(noised.latents.to(dtype))  # (B, N, 4 C)
        prompt = batch.text["prompt"].to(device, dtype)  # (B, T, D)
        # As truth values: numbers would be added to the attention's scores and mask nothing.
        mask = batch.text["mask"].to(device, non_blocking=True).bool()  # (B, T)
        velocity: Tensor = denoiser(
            hidden_states=image,
            encoder_hidden_states=prompt,
            timestep=noised.time.to(dtype),  # (B,), in [0, 1]; rounded to the model's dtype, as the pipeline does
            img_ids=positions(height // 2, width // 2, like=prompt),
            txt_ids=prompt.new_zeros(prompt.shape[1], 3),
            attention_mask=torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1),  # (B, T + N)
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    # Looking.

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt"],
            "prompt_attention_mask": text["mask"].bool(),
            "negative_prompt_embeds": negative["prompt"],
            "negative_prompt_attention_mask": negative["mask"].bool(),
        }


def _mask_checkpointed_blocks(denoiser: nn.Module) -> None:
    """Hand the mask on to the single blocks under gradient checkpointing too, where diffusers (to 0.42 at least) forgets it.

    Without it a run with gradient_checkpointing would train another network than the one that is sampled.
    """
    seen: dict[str, Tensor | None] = {}

    def remember(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["mask"] = named.get("attention_mask")

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (*arguments, seen["mask"]) if len(arguments) == POSITIONAL_UNMASKED else None

    denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    blocks: Any = denoiser.single_transformer_blocks
    for block in blocks:
        block.register_forward_pre_hook(add)


def _zeros_on_device(denoiser: nn.Module) -> None:
    """Make the zeros that stand for guidance on the device: diffusers (to 0.42 at least) makes them in main memory, and waits for their copy."""
    import torch

    embeddings: Any = denoiser.time_text_embed

    def there(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.zeros_like(arguments[0], device=embeddings.mod_proj.device),)

    embeddings.guidance_proj.register_forward_pre_hook(there)

"""Prompts to embeddings with CLIP: a start token, up to 75 of the prompt, an end token.

Letters: B batch, T text tokens (77), D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner.models.text import TextEncoder

if TYPE_CHECKING:
    from torch import Tensor, nn

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Suffixes of the modules that a plain LoRA adapts, as in the training scripts of diffusers."""
TOKENS = 77
"""Positions that every published CLIP text model has."""


def encode_last(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Encode to the last layer's normed states, (B, T, D), as Stable Diffusion 1 and 2 read them."""
    hidden: Tensor = text.encoder(token_ids(text, prompts))[0]
    return hidden


def encode_penultimate(text: TextEncoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode to the states before the last layer, (B, T, D), and the model's first output, as Stable Diffusion XL reads them.

    The first output is (B, P), the pooled and projected prompt, of a CLIPTextModelWithProjection.
    """
    output = text.encoder(token_ids(text, prompts), output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def encode_pooled(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Encode to the states of the end token, (B, P), as Flux reads them."""
    pooled: Tensor = text.encoder(token_ids(text, prompts)).pooler_output
    return pooled


def token_ids(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """The tokens of prompts, (B, T), cut or filled up to what the encoder has positions for."""
    device = next(text.encoder.parameters()).device
    inputs = text.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=text.tokenizer.model_max_length, return_tensors="pt")
    ids: Tensor = inputs["input_ids"].to(device)  # without a mask: the diffusers pipelines show these encoders the padding too
    return ids


def text_model(encoder: nn.Module) -> nn.Module:
    """The network of which adapter files speak as `text_model`: it lies in an encoder, or since transformers 5 is CLIPTextModel itself."""
    inside: nn.Module = getattr(encoder, "text_model", encoder)
    return inside

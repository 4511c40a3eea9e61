"""Prompts to embeddings with one T5-like encoder: a fixed number of tokens, padding zeroed.

Letters: B batch, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner.models.loading import load_network, stream_network
from simpletuner.models.source import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.models.streaming import Settle


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer and the frozen encoder that reads its tokens."""

    tokenizer: Any
    encoder: nn.Module


def no_text_encoder() -> TextEncoder:
    """What stands in the place of an encoder that is not loaded."""
    import torch

    return TextEncoder(None, torch.nn.Identity())


def width_of(config: Mapping[str, Any] | None, released: int) -> int:
    """D, from the configuration of a text encoder, of which the language model may be one part of two; `released` where there is none."""
    inner = {} if config is None else {**config, **(config.get("text_config") or {})}
    return int(inner.get("d_model") or inner.get("hidden_size") or released)


def pooled_width_of(config: Mapping[str, Any] | None, released: int) -> int:
    """P, from the configuration of a CLIP with a projection."""
    return int((config or {}).get("projection_dim") or width_of(config, released))


def load_text_encoder(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    encoder: str = "text_encoder",
    tokenizer: str = "tokenizer",
    settle: Settle | None = None,
) -> TextEncoder:
    """Load the classes that the model's own pipeline would, so that both read a prompt alike.

    Args:
        encoder, tokenizer: names of the two parts.
        settle: how the encoder is held, layer by layer; as its files are, in `dtype` on `device`, if not given.
    """
    network = load_encoder(source, device, dtype, encoder, settle)
    return TextEncoder(source.class_of(tokenizer).from_pretrained(source.part(tokenizer).folder()), network)


def load_encoder(source: Source, device: torch.device, dtype: torch.dtype, encoder: str, settle: Settle | None) -> nn.Module:
    """Load a text encoder alone, as `load_text_encoder` does."""
    kind, part = source.class_of(encoder), source.part(encoder)
    network: nn.Module = load_network(kind, part, dtype).to(device) if settle is None else stream_network(kind, part, settle)
    return network


def encode_masked(text: TextEncoder, prompts: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Encode prompts to `prompt` (B, T, D), zero where there is padding, and `mask` (B, T), one where there is none.

    Args:
        tokens: T; longer prompts lose their end, but not the end token.
    """
    import torch

    device = next(text.encoder.parameters()).device
    inputs = text.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt").to(device)
    with torch.no_grad():
        hidden = text.encoder(**inputs)[0]  # (B, T, D)
    mask = inputs["attention_mask"]  # (B, T)
    return {"prompt": hidden * mask[..., None], "mask": mask}


def encode_unmasked(text: TextEncoder, prompts: Sequence[str], tokens: int) -> Tensor:
    """Encode prompts to (B, T, D) with padding that is seen like any token, as models that were trained so want it.

    Args:
        tokens: T; longer prompts lose their end, but not the end token.
    """
    device = next(text.encoder.parameters()).device
    inputs = text.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    hidden: Tensor = text.encoder(inputs["input_ids"].to(device))[0]
    return hidden


def encode_both_ways(pipeline: type[Any], text: TextEncoder, prompts: Sequence[str], tokens: int, **call: Any) -> dict[str, Tensor]:
    """Encode prompts as a pipeline of diffusers does that puts words of its own before a prompt, but not before a negative one.

    Args:
        pipeline: its class.
        tokens: T.
        call: further arguments of its `encode_prompt`.

    Returns:
        `prompt` (B, T, D) and `mask` (B, T), one where there is no padding; `negative` and `negative_mask` likewise. An empty prompt is what
        guidance steers away from when a caption was dropped, so it is encoded as a negative one in both.
    """
    import torch

    parts = dict.fromkeys(("vae", "transformer", "scheduler"))
    device = next(text.encoder.parameters()).device
    with torch.no_grad():
        encoded = pipeline(text_encoder=text.encoder, tokenizer=text.tokenizer, **parts).encode_prompt(
            list(prompts), negative_prompt=list(prompts), device=device, max_sequence_length=tokens, **call
        )
    prompt, mask, negative, negative_mask = encoded
    empty = torch.tensor([not words.strip() for words in prompts], device=device)
    return {
        "prompt": torch.where(empty[:, None, None], negative, prompt),
        "mask": torch.where(empty[:, None], negative_mask, mask),
        "negative": negative,
        "negative_mask": negative_mask,
    }


def both_ways_shapes(tokens: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `encode_both_ways` gives of one prompt."""
    return {"prompt": (tokens, width), "mask": (tokens,), "negative": (tokens, width), "negative_mask": (tokens,)}


def fill_up(states: Sequence[Tensor], tokens: int) -> dict[str, Tensor]:
    """Bring prompts of several lengths, (tokens, D) each, to `prompt` (B, T, D), zero where there is padding, and `mask` (B, T), one where not."""
    import torch

    def filled(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, 0, 0, tokens - len(value)))

    mask = [filled(torch.ones(len(value), 1, dtype=torch.long, device=value.device))[:, 0] for value in states]
    return {"prompt": torch.stack([filled(value) for value in states]), "mask": torch.stack(mask)}


def unpadded(text: Mapping[str, Tensor]) -> list[Tensor]:
    """Undo `fill_up`: the states of each prompt, (tokens, D)."""
    return [states[: int(mask.sum())] for states, mask in zip(text["prompt"], text["mask"])]


def mask_padding(text: TextEncoder, prompts: Sequence[str], tokens: int) -> Tensor:
    """One for each token of prompts, zero where there is padding, (B, T)."""
    inputs = text.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    mask: Tensor = inputs["attention_mask"].to(next(text.encoder.parameters()).device)
    return mask


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt before truncation, end token included."""
    # verbose=False: the tokenizer would warn of every long prompt by itself, in other words than ours.
    return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

"""A tiny random Gemma 2 and a tokenizer that begins a text as its own does, for the families that read one."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tests.builders.auraflow import build_tokenizer

TEXT_WIDTH = 16


def build_gemma(vocabulary: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    ).eval()


def build_gemma_tokenizer(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a character, but for these sentences, which are one each; a start token and no end token.

    So a prompt of a few letters and the words that a pipeline puts before it fit into two dozen tokens.
    """
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(sentences)})
    beginning = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = beginning
    return tokenizer

"""The parts of the example's model that are not trained: a tokenizer of a few words, a random text encoder, the transformer's shape."""

from __future__ import annotations

import string
from typing import Any

import looks
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TOKENS = 16
"""The longest prompt, end token included."""
WIDTH = 192
TEXT_WIDTH = 96
SPECIAL = ("<pad>", "</s>", "<unk>")
WORDS = (
    *looks.NAMES,
    *looks.HUES,
    *("a", "an", "the", "of", "in", "on", "and", "with", "as", "at", "to", "by", "no", "not"),
    *("handwritten", "written", "handwriting", "drawn", "digit", "number", "numeral", "picture", "ink", "pen", "paper", "hand"),
    *("neon", "glowing", "light", "tube", "sign", "night", "dark", "bright", "blurry", "cropped", "ugly"),
)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, which spells what it does not know letter by letter."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *WORDS])
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))])
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS, padding_side="right"
    )


def new_text_encoder(seed: int) -> UMT5EncoderModel:
    """Make a text encoder with random weights: different prompts get different embeddings, and more it need not know."""
    torch.manual_seed(seed)
    settings = UMT5Config(
        vocab_size=len(new_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(settings).eval()


def transformer_settings() -> dict[str, Any]:
    """An AuraFlow for 16x16 latents: 16 image tokens, 4.9 million parameters."""
    return {
        "sample_size": 16,
        "patch_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "num_attention_heads": 3,
        "attention_head_dim": WIDTH // 3,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": WIDTH,
        "pos_embed_max_size": 16,
    }

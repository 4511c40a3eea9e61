"""A T5 that is not the model's own: which classes read its repository, which may be laid out as transformers' own are, all in one folder."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from simpletuner.errors import ConfigError

OPTION = "pretrained_t5_model_name_or_path"
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""What config.json calls a model's kind, to the class in transformers that has its encoder alone."""
WIDTH_KEYS = ("joint_attention_dim", "caption_channels")
"""Where a denoiser's config.json says how wide the embeddings are that it takes."""
USUAL_TOKENIZER = "T5Tokenizer"
"""Of tokenizers whose settings are from before they said so."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "*.model")
"""A tokenizer's own files in a folder that holds weights too."""


def encoder_class(config: Mapping[str, Any], location: str) -> str:
    """The class of the encoder, in transformers.

    Args:
        config: of the model, which may have a decoder as well.

    Raises:
        ConfigError: it is no T5.
    """
    kind = config.get("model_type")
    if kind not in ENCODERS:
        raise ConfigError(f"{OPTION} {location} is a {kind or 'model of no stated kind'}, no T5", hint=f"It takes {', '.join(ENCODERS)}.")
    return ENCODERS[kind]


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class of the tokenizer, in transformers: the fast one, which reads the files of the slow one as well."""
    name = str(config.get("tokenizer_class") or USUAL_TOKENIZER)
    return name if name.endswith(("Fast", "Backend")) else f"{name}Fast"


def is_of_tokenizer(name: str) -> bool:
    """Whether a file in a folder of everything belongs to the tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)


def check_width(config: Mapping[str, Any], denoiser_config: Mapping[str, Any], location: str) -> None:
    """Refuse an encoder whose embeddings the denoiser cannot take.

    Raises:
        ConfigError: says both widths.
    """
    width, key = config.get("d_model"), next((key for key in WIDTH_KEYS if denoiser_config.get(key)), None)
    if key and width and width != (wanted := denoiser_config[key]):
        raise ConfigError(
            f"the embeddings of {OPTION} {location} are {width} numbers wide, and the denoiser takes {wanted}",
            hint=f"Take an encoder of that width; for a denoiser with random weights, {key} in its config.json says it.",
        )

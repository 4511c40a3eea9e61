"""A tiny AuraFlow without a VAE, and a tiny T5 to read its prompts that lies in a folder of its own, as transformers' own repositories do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from tests.builders.auraflow import build_tokenizer

WIDTH = 32


def build_pixel_auraflow(folder: Path, channels: int = 1, width: int = WIDTH) -> Path:
    """Write configurations alone, of a denoiser of some 60k parameters for pictures of up to 32 x 32 pixels; there are no weights.

    Args:
        width: of the text embeddings that it takes.
    """
    with torch.device("meta"):
        transformer = AuraFlowTransformer2DModel(
            sample_size=32,
            patch_size=8,
            in_channels=channels,
            out_channels=channels,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=width,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        )
    transformer.save_config(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "AuraFlowPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "LlamaTokenizerFast"],
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_foreign_t5(folder: Path, seed: int = 0, width: int = WIDTH) -> Path:
    """Write an encoder of random weights, its tokenizer, and things that are of neither, all into one folder."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
        T5EncoderModel(config).save_pretrained(folder)
    (folder / "README.md").write_text("# A T5\n")
    return folder

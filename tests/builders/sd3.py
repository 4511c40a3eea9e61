"""A tiny random Stable Diffusion 3 in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.builders.auraflow import build_tokenizer, build_vae
from tests.builders.flux import T5_WIDTH, build_t5
from tests.builders.stable_diffusion import TEXT_WIDTH, build_clip_tokenizer, clip_config


def build_tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusion3Pipeline of random weights into `folder` and give the folder back; pictures of up to 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = build_tokenizer()
        vae = build_vae()
        vae.register_to_config(shift_factor=0.1)
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=CLIPTextModelWithProjection(clip_config()).eval(),
            tokenizer=build_clip_tokenizer(folder / "words"),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
            tokenizer_2=build_clip_tokenizer(folder / "words"),
            text_encoder_3=build_t5(len(t5)),
            tokenizer_3=t5,
            transformer=SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * TEXT_WIDTH,
                pos_embed_max_size=8,
            ).eval(),
        )
    pipeline.save_pretrained(folder)
    return folder

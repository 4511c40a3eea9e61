"""A tiny random Lumina Image 2.0 in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.builders.gemma import TEXT_WIDTH, build_gemma, build_gemma_tokenizer


def build_tiny_lumina2(folder: Path, seed: int = 0) -> Path:
    """Write a Lumina2Pipeline of random weights into `folder` and give the folder back; pictures in steps of 16 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_gemma_tokenizer([Lumina2Pipeline(*[None] * 5).system_prompt, " <Prompt Start> "])
        pipeline = Lumina2Pipeline(
            tokenizer=tokenizer,
            text_encoder=build_gemma(len(tokenizer)),
            vae=build_vae(),
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=24,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(48, 16, 16),
                cap_feat_dim=TEXT_WIDTH,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_vae() -> AutoencoderKL:
    """With 4 latent channels and stride 8, which the pipeline takes every VAE to have."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()

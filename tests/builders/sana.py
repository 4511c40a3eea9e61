"""A tiny random Sana in diffusers layout, made offline in a second."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.builders.gemma import TEXT_WIDTH, build_gemma, build_gemma_tokenizer

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
SCALING_FACTOR = 0.41407


def build_tiny_sana(folder: Path, seed: int = 0) -> Path:
    """Write a SanaPipeline of random weights into `folder` and give the folder back; pictures in steps of 32 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_gemma_tokenizer(INSTRUCTION)
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=build_gemma(len(tokenizer)),
            vae=build_vae(),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=TEXT_WIDTH,
                sample_size=16,
                patch_size=1,
            ).eval(),
            scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_vae() -> AutoencoderDC:
    """With 4 latent channels and stride 4."""
    levels = 3
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        scaling_factor=SCALING_FACTOR,
    ).eval()

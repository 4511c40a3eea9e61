"""Tiny random PixArt models in diffusers layout, Sigma and Alpha, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.builders.auraflow import build_tokenizer, build_vae
from tests.builders.flux import T5_WIDTH, build_t5


def build_tiny_pixart(folder: Path, seed: int = 0) -> Path:
    """Write a PixArtSigmaPipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    return _build(folder, seed, PixArtSigmaPipeline, sample_size=16)


def build_tiny_pixart_alpha(folder: Path, seed: int = 0) -> Path:
    """The same of an Alpha that is told sizes, as those for 1024 pixels are."""
    return _build(folder, seed, PixArtAlphaPipeline, sample_size=128)


def _build(folder: Path, seed: int, pipeline: type, sample_size: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        made = pipeline(
            tokenizer=tokenizer,
            text_encoder=build_t5(len(tokenizer)),
            vae=build_vae(),
            transformer=PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                cross_attention_dim=24,
                sample_size=sample_size,
                patch_size=2,
                caption_channels=T5_WIDTH,
            ).eval(),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        )
    made.save_pretrained(folder)
    return folder

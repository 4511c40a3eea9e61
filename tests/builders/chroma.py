"""A tiny random Chroma in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.builders.auraflow import build_tokenizer, build_vae
from tests.builders.flux import T5_WIDTH, build_t5


def build_tiny_chroma(folder: Path, seed: int = 0) -> Path:
    """Write a ChromaPipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = build_tokenizer()
        vae = build_vae()
        vae.register_to_config(shift_factor=0.1)
        pipeline = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=vae,
            text_encoder=build_t5(len(t5)),
            tokenizer=t5,
            transformer=ChromaTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ).eval(),
        )
    pipeline.save_pretrained(folder)
    return folder

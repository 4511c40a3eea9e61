"""A tiny random Flux in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.builders.auraflow import build_tokenizer, build_vae
from tests.builders.stable_diffusion import TEXT_WIDTH, build_clip_tokenizer, clip_config

T5_WIDTH = 32


def build_tiny_flux(folder: Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a FluxPipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = build_tokenizer()
        vae = build_vae()
        vae.register_to_config(shift_factor=0.1)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=vae,
            text_encoder=CLIPTextModel(clip_config()).eval(),
            tokenizer=build_clip_tokenizer(folder / "words"),
            text_encoder_2=build_t5(len(t5)),
            tokenizer_2=t5,
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)).eval()

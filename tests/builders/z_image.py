"""A tiny random Z-Image in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.builders.auraflow import build_vae
from tests.builders.flux2 import KLEIN_TEMPLATE, TEXT_WIDTH, build_chat_tokenizer, language_model


def build_tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """Write a ZImagePipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_chat_tokenizer(KLEIN_TEMPLATE)
        vae = build_vae()
        vae.register_to_config(shift_factor=0.1)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=Qwen3Model(Qwen3Config(num_hidden_layers=3, head_dim=8, **language_model(len(tokenizer)))).eval(),
            tokenizer=tokenizer,
            transformer=build_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 16, 16],
    )
    with torch.no_grad():  # zeros otherwise, which would hide what they are put in place of
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return transformer.eval()

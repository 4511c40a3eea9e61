"""Tiny random Stable Diffusion models in diffusers layout: 1.x and XL, made offline in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.builders.auraflow import build_vae

TEXT_WIDTH = 16
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build_tiny_sd1(folder: Path, seed: int = 0, **schedule: Any) -> Path:
    """Write a StableDiffusionPipeline of random weights into `folder` and give the folder back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=build_vae(),
            text_encoder=CLIPTextModel(clip_config()).eval(),
            tokenizer=build_clip_tokenizer(folder / "words"),
            unet=build_unet(cross_attention_dim=TEXT_WIDTH),
            scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **{**SCHEDULE, **schedule}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_sdxl(folder: Path, seed: int = 0, **schedule: Any) -> Path:
    """Write a StableDiffusionXLPipeline of random weights into `folder` and give the folder back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(),
            text_encoder=CLIPTextModel(clip_config()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
            tokenizer=build_clip_tokenizer(folder / "words"),
            tokenizer_2=build_clip_tokenizer(folder / "words"),
            unet=unet,
            scheduler=EulerDiscreteScheduler(**{**SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1, **schedule}),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_sdxl_refiner(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionXLImg2ImgPipeline of random weights, laid out as the refiner is, into `folder` and give the folder back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=build_vae(),
            text_encoder=None,
            text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
            tokenizer=None,
            tokenizer_2=build_clip_tokenizer(folder / "words"),
            unet=build_unet(
                cross_attention_dim=TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=5 * 8 + TEXT_WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        **options,
    ).eval()


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def build_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a byte, with and without the mark of a word's end, between a start and an end token; 77 in all."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)

"""A tiny random Qwen-Image in diffusers layout, made offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.builders.auraflow import build_tokenizer
from tests.builders.flux2 import TEXT_WIDTH, language_model


def build_tiny_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Write a QwenImagePipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer()
        config = Qwen2_5_VLConfig(
            text_config={
                **language_model(len(tokenizer)),
                "num_hidden_layers": 2,
                "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH},
        )
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
            vae=build_vae(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_vae() -> AutoencoderKLQwenImage:
    """With 4 latent channels and stride 4."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.5, 0.1, 0.3, 0.9],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    ).eval()


def build_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, but for a part of the template, so that as many come before a prompt as the pipeline cuts away."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    pipeline = QwenImagePipeline(*[None] * 5)
    before = pipeline.prompt_template_encode.split("{}")[0]
    spare = pipeline.prompt_template_encode_start_idx - 1
    tokenizer.add_special_tokens({"additional_special_tokens": [before[:-spare], "<|im_end|>\n<|im_start|>assistant\n"]})
    return tokenizer

"""Tiny random Flux.2 models in diffusers layout, made offline in a second: klein with a Qwen3, dev with a Mistral3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.builders.auraflow import build_tokenizer

TEXT_WIDTH = 16
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "user\n", "assistant\n", SYSTEM_MESSAGE)
"""One token each, so that a prompt of a few letters and all around it fit into two dozen tokens."""
KLEIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEV_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content[0].text }}<|im_end|>{% endfor %}"


def build_tiny_flux2(folder: Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a Flux2KleinPipeline of random weights into `folder` and give the folder back; pictures in steps of 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_chat_tokenizer(KLEIN_TEMPLATE)
        # The pipeline reads the states after 9, 18 and 27 layers.
        encoder = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, tie_word_embeddings=True, head_dim=8, **language_model(len(tokenizer)))).eval()
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=build_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=build_transformer(guidance_embeds=False),
            is_distilled=is_distilled,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_flux2_dev(folder: Path, seed: int = 0) -> Path:
    """Write a Flux2Pipeline likewise. Its tokenizer stands where the released model has a processor around one, which needs torchvision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_chat_tokenizer(DEV_TEMPLATE)
        config = Mistral3Config(
            # The pipeline reads the states after 10, 20 and 30 layers.
            text_config=MistralConfig(num_hidden_layers=30, head_dim=8, **language_model(len(tokenizer))),
            vision_config=PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32),
        )
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=build_vae(),
            text_encoder=Mistral3ForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=build_transformer(guidance_embeds=True),
        )
    pipeline.save_pretrained(folder)
    return folder


def language_model(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    }


def build_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def build_vae() -> AutoencoderKLFlux2:
    """With 4 latent channels and stride 4; what its batch norm has learned differs from channel to channel."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.2, 2.0, 16))
    return vae.eval()


def build_chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = template
    return tokenizer

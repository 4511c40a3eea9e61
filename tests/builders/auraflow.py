"""A tiny random AuraFlow in diffusers layout, made offline in a second, for every test that needs a real pipeline."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_WIDTH = 32
SCALING_FACTOR = 0.5


def build_tiny_auraflow(folder: Path, seed: int = 0, patch_size: int = 2, positions: int = 64) -> Path:
    """Write a pipeline of random weights into `folder` and give the folder back.

    Args:
        patch_size: latent pixels to a token, along a side.
        positions: tokens of the largest square picture.

    Transformer of some 50k parameters (one joint and one single block, patch 2, an 8 x 8 grid of positions), VAE with 4 latent
    channels and stride 4, UMT5 encoder of width 32, one token a character. Pictures may be up to 64 x 64 pixels, in steps of 8.
    The same seed gives the same bytes; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        pipeline = AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id),
            vae=build_vae(),
            transformer=build_transformer(patch_size, positions),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_transformer(patch_size: int = 2, positions: int = 64) -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=positions,
    ).eval()


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    ).eval()


def build_text_encoder(vocabulary: int, pad_id: int, eos_id: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        dropout_rate=0.1,  # as the real one has: an encoder left in training mode is then seen by a test
    )
    return UMT5EncoderModel(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, `<unk>` for what is not printable ASCII, `</s>` at the end; pads on the right."""
    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {token: number for number, token in enumerate((*special, *string.digits, *string.ascii_letters, *string.punctuation, " "))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # the T5 encoders take no token_type_ids
        model_max_length=256,
    )

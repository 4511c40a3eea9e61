"""The tables of layer names, against the code by which diffusers itself reads models in their original layout."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as diffusers_reads
from torch import nn

from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.targets import adaptable, layout_of

FLUX_WIDTH = 3072
"""Which diffusers' conversion of Flux takes for granted."""
FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24, "in_channels": 8, "joint_attention_dim": 8}
FLUX2 = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 8, "joint_attention_dim": 8}
SD3 = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 8}
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 2, "cross_attention_dim": 8, "attention_head_dim": 2}
BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
MODELS = {
    "auraflow": lambda: AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=4, num_attention_heads=2),
    "flux": lambda: FluxTransformer2DModel(pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(16, 56, 56), **FLUX),
    "chroma": lambda: ChromaTransformer2DModel(
        approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=2, axes_dims_rope=(16, 56, 56), **FLUX
    ),
    "flux2": lambda: Flux2Transformer2DModel(timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), **FLUX2),
    "sd3": lambda: SD3Transformer2DModel(pooled_projection_dim=8, dual_attention_layers=(0,), pos_embed_max_size=8, sample_size=16, **SD3),
    "lumina2": lambda: Lumina2Transformer2DModel(num_layers=2, num_refiner_layers=2, cap_feat_dim=8),
    "z_image": lambda: ZImageTransformer2DModel(
        n_layers=2, n_refiner_layers=2, dim=16, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[2, 2, 4], axes_lens=[8, 8, 8]
    ),
    "sd": lambda: UNet2DConditionModel(**UNET, **BLOCKS),
    "sdxl": lambda: UNet2DConditionModel(**UNET, **BLOCKS, **XL),
}
CONVERSIONS = {
    "chroma": diffusers_reads.convert_chroma_transformer_checkpoint_to_diffusers,
    "auraflow": diffusers_reads.convert_auraflow_transformer_checkpoint_to_diffusers,
    "flux": diffusers_reads.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": diffusers_reads.convert_flux2_transformer_checkpoint_to_diffusers,
    "lumina2": diffusers_reads.convert_lumina2_to_diffusers,
    "sd3": diffusers_reads.convert_sd3_transformer_checkpoint_to_diffusers,
    "z_image": diffusers_reads.convert_z_image_transformer_checkpoint_to_diffusers,
}
REORDERED = {
    **{name: {"norm_out.linear"} for name in ("auraflow", "flux", "chroma", "flux2")},
    "sd3": {"norm_out.linear", "transformer_blocks.1.norm1_context.linear"},  # the last block's, of two
}
"""Layers whose rows lie in another order there, which our tables leave out."""


def shape_of(name: str) -> nn.Module:
    """A model without numbers: its names and shapes are all that is asked for."""
    with torch.device("meta"):
        model: nn.Module = MODELS[name]()
    return model


class Original(dict):
    """A model in its original layout of which only the adapted layers are there: for anything else a conversion gets something, and no one looks."""

    def __missing__(self, key):
        return torch.zeros(4, 2)

    def pop(self, key, default=None):
        return super().pop(key, torch.zeros(4, 2))


def original_of(layout: Layout) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights by our tables' original names, and by the names in diffusers; every row has a number of its own."""
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    at = 0
    for name, layers in layout.originals.items():
        rows = layout.rows(layers)
        ours[name] = torch.arange(at, at + sum(rows), dtype=torch.float64)[:, None]
        theirs |= dict(zip(layers, ours[name].split(rows)))
        at += sum(rows)
    return ours, theirs


@pytest.mark.parametrize("name", CONVERSIONS)
def test_diffusers_converts_a_model_in_our_original_names_to_the_names_that_we_gave_them(name):
    model = shape_of(name)
    layout = layout_of(model, "transformer", name)
    ours, theirs = original_of(layout)
    biases = {f"{key}.bias": value[:, 0] for key, value in ours.items()}

    found = CONVERSIONS[name](Original({**{f"{key}.weight": value for key, value in ours.items()}, **biases}))

    for layer, rows in theirs.items():
        assert torch.equal(found[f"{layer}.weight"].double(), rows), layer
    assert set(adaptable(model)) - set(theirs) == REORDERED.get(name, set()) & set(adaptable(model))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_converts_a_unet_in_our_original_names_to_the_names_that_we_gave_them(name):
    model = shape_of(name)
    layout = layout_of(model, "unet", name)
    ours, theirs = original_of(layout)
    checkpoint = {f"model.diffusion_model.{key}.weight": value for key, value in ours.items()}
    checkpoint |= {key.replace(".weight", ".bias"): value for key, value in checkpoint.items()}

    found = diffusers_reads.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))

    assert theirs.keys() == adaptable(model).keys()
    for layer, rows in theirs.items():
        assert torch.equal(found[f"{layer}.weight"], rows), layer

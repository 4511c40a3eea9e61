"""Which layers the adapters of other trainers change, by the names that those layers have here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from simpletuner.importers.importer import Imported

Reach = Literal["attention", "transformers", "blocks", "convolutions", "everything"]
"""What is adapted: attention alone; transformer blocks in U-Nets; all blocks but their 3 x 3 convolutions; all blocks; all layers."""

UNETS = ("sd1x", "sd2x", "sdxl")
WITH_TRAINED_TEXT = (*UNETS, "sd3", "flux")
"""Families whose CLIP text encoders a LoRA can be put on."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMERS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
BLOCKS = (*TRANSFORMERS, "time_emb_proj", "conv_shortcut")
CONVOLUTIONS = (*BLOCKS, "conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv")
IN_UNETS: Mapping[Reach, tuple[str, ...]] = {
    "attention": ATTENTION,
    "transformers": TRANSFORMERS,
    "blocks": BLOCKS,
    "convolutions": CONVOLUTIONS,
    "everything": (*CONVOLUTIONS, "conv_in", "conv_out", "linear_1", "linear_2"),
}
"""Ends of layers' names for a plain LoRA on a U-Net."""
IN_FLUX: Mapping[Reach, str] = {"attention": "all", "transformers": "ai-toolkit", "blocks": "ai-toolkit", "convolutions": "ai-toolkit"}
"""Sets of targets by their names in `flux_lora_target`."""
TRANSFORMER_BLOCKS = r"(?:.*\.)?(?:(?:single_|joint_)?transformer_blocks|layers|noise_refiner|context_refiner)\."
IN_TRANSFORMERS: Mapping[str, str] = {
    "attention": TRANSFORMER_BLOCKS + r".*(?:attn|attention)",
    "transformers": TRANSFORMER_BLOCKS,
    "blocks": TRANSFORMER_BLOCKS,
    "convolutions": TRANSFORMER_BLOCKS,
    "everything": ".*",
}
"""Patterns of layers' names for a LyCORIS adapter on a transformer."""
CLASSES: Mapping[str, tuple[str, ...]] = {
    "attention": ("Attention",),
    "transformers": ("Transformer2DModel",),
    "blocks": ("Transformer2DModel", "ResnetBlock2D"),
    "convolutions": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
}
"""Classes of U-Nets for a LyCORIS adapter."""


def adapt(found: Imported, reach: Reach, rank: int, alpha: float, dropout: float = 0.0, trains_text: bool = False) -> None:
    """Put a LoRA on layers: a plain one where their names can be listed, one by the LyCORIS library where they follow a pattern.

    Args:
        trains_text: whether the other trainer adapts the CLIP text encoders too.
    """
    family, config = found.config["model_family"], found.config
    if family in UNETS or (family in WITH_TRAINED_TEXT and trains_text) or (family == "flux" and reach in IN_FLUX):
        config |= {"model_type": "lora", "lora_type": "standard", "lora_rank": rank, "lora_alpha": alpha}
        config |= {"lora_dropout": dropout} if dropout else {}
        if family in UNETS:
            config["peft_lora_target_modules"] = list(IN_UNETS[reach])
        elif family == "flux" and reach in IN_FLUX:
            config["flux_lora_target"] = IN_FLUX[reach]
        else:
            found.note("which layers the LoRA adapts: with trained text encoders those of a plain LoRA of the family (docs/families.md)")
        if trains_text and family in WITH_TRAINED_TEXT:
            config["train_text_encoder"] = True
        return
    settings = {"algo": "lora", "linear_dim": rank, "linear_alpha": alpha, **({"dropout": dropout} if dropout else {})}
    adapt_by_lycoris(found, reach, settings)


def adapt_by_lycoris(found: Imported, reach: str, settings: Mapping[str, Any]) -> None:
    """Use an adapter of the LyCORIS library.

    Args:
        reach: a Reach, or a pattern of layers' names.
        settings: the algorithm and its numbers, under the names of lycoris_config.json.
    """
    is_unet = found.config["model_family"] in UNETS
    by_class = is_unet and reach in CLASSES
    preset: dict[str, Any] = {"target_module": list(CLASSES[reach])} if by_class else {"target_name": [IN_TRANSFORMERS.get(reach, reach)]}
    if is_unet and reach == "blocks":
        preset["enable_conv"] = False
    found.config |= {"model_type": "lora", "lora_type": "lycoris"}
    found.lycoris = {**settings, "multiplier": 1.0, "apply_preset": preset}

"""What other software calls a denoiser's layers: the names of the original layout, of kohya's scripts and of ComfyUI.

A model that diffusers split (q, k and v of one fused weight) is one layer there. So every name stands for the layers whose weights,
one above the other, are the weight that it names. The pairs of names are those of diffusers' own single-file conversions, which the
tests run against them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from simpletuner.adapters.original_names import COMFYUI_PREFIXES, KOHYA_BY_DIFFUSERS, REORDERED, TABLES, TEXT_PREFIXES, UNCHANGED, UNETS
from simpletuner.errors import ConfigError

Names = dict[str, tuple[str, ...]]
"""A name in a file, to the layers of the denoiser whose weights it changes, from the top."""


@dataclass(frozen=True)
class Layout:
    """What the formats need to know of a denoiser, or of the network in a text encoder that has its layers."""

    folder: str
    """Its place in diffusers layout: transformer, unet, or text_encoder.text_model."""
    original: str | None
    """The row of `original_names.TABLES`, or the kind of U-Net; None where no original layout is known."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of the weight of every Linear and Conv."""

    @property
    def part(self) -> str:
        """The part of the pipeline that it is, or lies in."""
        return self.folder.partition(".")[0]

    @cached_property
    def originals(self) -> Names:
        """Names of the original layout. Layers that lie there in another order are left out."""
        if self.original in UNCHANGED:
            return {layer: (layer,) for layer in self.shapes}
        pairs = self._unet_pairs() if self.original in UNETS else self._table_pairs()
        names: dict[str, list[str]] = {}
        for layer, name in pairs:
            names.setdefault(name, []).append(layer)
        return {name: tuple(layers) for name, layers in names.items()}

    @cached_property
    def places(self) -> Mapping[str, str]:
        """The original name of each layer that has one."""
        return {layer: name for name, layers in self.originals.items() for layer in layers}

    def is_fused(self, layer: str) -> bool:
        """Whether a layer is only a part of one in the original layout."""
        return len(self.originals[self.places[layer]]) > 1

    def rows(self, layers: tuple[str, ...]) -> list[int]:
        """How many rows each of these layers has in the weight that they make up together."""
        return [self.shapes[layer][0] for layer in layers]

    def is_reordered(self, layer: str) -> bool:
        """Whether a layer's rows are a shift and a scale in the original layout, and a scale and a shift here."""
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer, count=1)
        is_marked = any(name in (pattern, layer) and original.startswith(REORDERED) for name, original in TABLES.get(self.original or "", ()))
        return is_marked and self.shapes[layer][0] == 2 * self.shapes[layer][1]

    def _table_pairs(self) -> list[tuple[str, str]]:
        """Layers and their names, parts of a fused one in their order."""
        rows = TABLES.get(self.original or "", ())
        found: list[tuple[int, int, str, str]] = []
        for layer in self.shapes:
            number = (re.findall(r"(?<=\.)\d+(?=\.)", layer) or [""])[0]
            pattern = layer.replace(f".{number}.", ".*.", 1) if number else layer
            for position, (name, original) in enumerate(rows):
                if name in (pattern, layer) and not self.is_reordered(layer):
                    found.append((int(number or 0), position, layer, original.removeprefix(REORDERED).replace("*", number)))
                    break
        return [(layer, original) for _, _, layer, original in sorted(found)]

    def _unet_pairs(self) -> list[tuple[str, str]]:
        """The U-Net's blocks are numbered through in the original: an entry each resnet, and one each change of size."""
        per_block = len({layer.split(".")[3] for layer in self.shapes if layer.startswith("down_blocks.0.resnets.")})
        return [(layer, name) for layer in self.shapes if (name := _unet_name(layer, per_block, self.shapes))]


def kohya_names(layout: Layout) -> Names:
    """Names of kohya's scripts (sd-scripts and musubi-tuner, 2026): of the original layout, or where they took the model from it, of diffusers."""
    check_known(layout, "kohya")
    if layout.original in TEXT_PREFIXES:
        return _text_names(layout, TEXT_PREFIXES[layout.original][:1])
    if layout.original in KOHYA_BY_DIFFUSERS:
        return {f"lora_unet_{underscored(layer)}": (layer,) for layer in layout.shapes}
    return {f"lora_unet_{underscored(name)}": layers for name, layers in layout.originals.items()}


def comfyui_names(layout: Layout) -> Names:
    """Names that ComfyUI knows (comfy/lora.py, 2026): the original ones, and for most models also those of diffusers.

    A layer that is fused or reordered in the original is found by its name in diffusers: ComfyUI changes only its rows.
    """
    check_known(layout, "comfyui")
    if layout.original in TEXT_PREFIXES:
        return {**_text_names(layout, TEXT_PREFIXES[layout.original]), **diffusers_names(layout)}
    names: Names = {}
    for name, layers in layout.originals.items():
        names[f"diffusion_model.{name}"] = names[f"lora_unet_{underscored(name)}"] = layers
    for prefix in COMFYUI_PREFIXES[layout.original or ""]:
        for layer in layout.shapes:
            if layer in layout.places or layout.is_reordered(layer):
                names[prefix + (underscored(layer) if prefix.endswith("_") else layer)] = (layer,)
    return names


def diffusers_names(layout: Layout) -> Names:
    """Names of diffusers and PEFT."""
    return {f"{layout.folder}.{layer}": (layer,) for layer in layout.shapes}


def lycoris_names(layout: Layout) -> Names:
    """Names that the LyCORIS library gives when it wraps the model of diffusers."""
    return {f"lycoris_{underscored(layer)}": (layer,) for layer in layout.shapes}


def all_text_names(layout: Layout) -> Names:
    """Every name by which a file from elsewhere may mean a layer of this text encoder."""
    assert layout.original in TEXT_PREFIXES
    inside = layout.folder.partition(".")[2]
    # Since transformers 5 some encoders are what lay inside them before, and files that were written so have no word for it.
    prefixes = (f"{layout.part}.", f"{layout.part}.base_model.model.", f"{layout.part}.base_model.model.{inside}.")
    found = {prefix + layer: (layer,) for prefix in prefixes for layer in layout.shapes}
    return {**found, **_text_names(layout, TEXT_PREFIXES[layout.original]), **diffusers_names(layout)}


def _text_names(layout: Layout, prefixes: Sequence[str]) -> Names:
    inside = layout.folder.partition(".")[2]
    return {f"{prefix}{inside}_{underscored(layer)}": (layer,) for prefix in prefixes for layer in layout.shapes}


def all_names(layout: Layout) -> Names:
    """Every name by which a file from elsewhere may mean a layer of this denoiser."""
    prefixes = ("", f"{layout.folder}.base_model.model.", "base_model.model.", "diffusion_model.", "lora_transformer_", "lora_unet_")
    names: Names = {}
    for prefix in prefixes:
        names |= {prefix + (underscored(layer) if prefix.endswith("_") else layer): (layer,) for layer in layout.shapes}
    if layout.original is not None:
        names |= {**kohya_names(layout), **comfyui_names(layout)}
    return {**names, **diffusers_names(layout), **lycoris_names(layout)}


def underscored(name: str) -> str:
    return name.replace(".", "_")


def check_known(layout: Layout, wanted: str) -> None:
    """Refuse a format for which the model's names are not known here."""
    if layout.original is None:
        raise ConfigError(
            f"format {wanted}: its readers load no adapters of this model",
            hint="Use --format diffusers for plain LoRA, or --format lycoris.",
        )


def _unet_name(layer: str, per_block: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The original name of a layer of UNet2DConditionModel with `per_block` resnets in each block of the way down."""
    block, *rest = layer.split(".")
    if layer in UNETS_OUTER:
        return UNETS_OUTER[layer]
    if block == "mid_block":
        kind, number, *inner = rest
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(number)}"
        return f"{place}.{_inner(inner)}"
    if block not in ("down_blocks", "up_blocks"):
        return None
    index, kind, number, *inner = rest
    stage, step = int(index), int(number)
    if block == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(stage + 1) * (per_block + 1)}.0.op"
        return f"input_blocks.{1 + stage * (per_block + 1) + step}.{int(kind == 'attentions')}.{_inner(inner)}"
    if kind == "upsamplers":
        has_attention = any(name.startswith(f"up_blocks.{stage}.attentions.") for name in shapes)
        return f"output_blocks.{stage * (per_block + 1) + per_block}.{1 + has_attention}.conv"
    return f"output_blocks.{stage * (per_block + 1) + step}.{int(kind == 'attentions')}.{_inner(inner)}"


def _inner(names: list[str]) -> str:
    """A name inside a block: attention is called alike, a resnet's layers are numbered."""
    name = ".".join(names)
    return RESNET.get(name, name)


RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNETS_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

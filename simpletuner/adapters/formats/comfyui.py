"""The layout for ComfyUI: `diffusion_model.` and the original name of a layer; `transformer.` and the name in diffusers for what is fused there.

ComfyUI applies an adapter of a part of a fused weight to the rows of that part, so nothing needs to be put together, unless it knows no name
for the part. Of a bias it knows the whole alone. U-Nets are written as kohya's scripts write them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from simpletuner.adapters.changes import Changes
from simpletuner.adapters.formats.kohya import write as write_kohya
from simpletuner.adapters.formats.shared import fused_biases, put_together, refuse, rename, with_alpha
from simpletuner.adapters.key_maps import Layout, Names, comfyui_names
from simpletuner.adapters.original_names import TEXT_PREFIXES, UNETS
from simpletuner.errors import ConfigError

KNOWN = ("lora", "loha", "lokr", "glora", "oft", "full")


def name_layers(layout: Layout) -> Names:
    return comfyui_names(layout)


def write(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """
    Raises:
        ConfigError: ComfyUI knows no such algorithm, or a layer is not among those that it finds.
    """
    refuse(changes, KNOWN, "comfyui", "ComfyUI", "Bake it into a pipeline with `simpletuner merge`.")
    if layout.original in UNETS or layout.original in TEXT_PREFIXES:
        return write_kohya(changes, layout)
    known = comfyui_names(layout)
    whole: Names = {}
    named: Changes = {}
    for layer, parts in changes.items():
        if f"transformer.{layer}" in known and (layout.is_reordered(layer) or layout.is_fused(layer)):
            if rest := {part: value for part, value in parts.items() if part != "diff_b"}:
                named[f"transformer.{layer}"] = rest
        elif layer in layout.places:
            whole[f"diffusion_model.{layout.places[layer]}"] = layout.originals[layout.places[layer]]
        if layer not in layout.places and (f"transformer.{layer}" not in known or "diff_b" in parts):
            what = "the bias of layer" if f"transformer.{layer}" in known else "layer"
            raise ConfigError(
                f"ComfyUI does not find {what} {layer} of this model", hint="Leave it out of the adapter's targets, or use `simpletuner merge`."
            )
    tensors = rename(with_alpha({**named, **put_together(changes, whole, layout, "comfyui")}))
    for name, layers in layout.originals.items():
        if f"diffusion_model.{name}" not in whole and (biases := fused_biases(layers, changes, layout)) is not None:
            tensors[f"diffusion_model.{name}.diff_b"] = biases
    return tensors


def ignored(keys: Iterable[str], layout: Layout) -> list[str]:
    """Keys by which ComfyUI finds a layer and of which it makes nothing: a bias of which it is told a part."""
    names = comfyui_names(layout)
    biases = {key: names.get(key.removesuffix(".diff_b"), ()) for key in keys if key.endswith(".diff_b")}
    return [key for key, layers in biases.items() if len(layers) == 1 and (layout.is_reordered(layers[0]) or layout.is_fused(layers[0]))]

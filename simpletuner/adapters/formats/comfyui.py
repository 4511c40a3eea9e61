"""The layout for ComfyUI: `diffusion_model.` and the original name of a layer; `transformer.` and the name in diffusers for what is fused there.

ComfyUI applies an adapter of a part of a fused weight to the rows of that part, so nothing needs to be put together. U-Nets are written
as kohya's scripts write them.
"""

from __future__ import annotations

from torch import Tensor

from simpletuner.adapters.changes import Changes
from simpletuner.adapters.formats.kohya import write as write_kohya
from simpletuner.adapters.formats.shared import refuse, rename, with_alpha
from simpletuner.adapters.key_maps import Layout, Names, comfyui_names
from simpletuner.adapters.original_names import UNETS
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
    if layout.original in UNETS:
        return write_kohya(changes, layout)
    known, names = comfyui_names(layout), {}
    for layer in changes:
        is_whole = layer in layout.places and not layout.is_fused(layer)
        names[layer] = f"diffusion_model.{layout.places[layer]}" if is_whole else f"transformer.{layer}"
        if names[layer] not in known:
            raise ConfigError(
                f"ComfyUI knows no layer {layer} of this model", hint="Leave it out of the adapter's targets, or use `simpletuner merge`."
            )
    return rename(with_alpha(changes), names)

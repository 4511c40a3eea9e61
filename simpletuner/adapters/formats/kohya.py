"""The layout of kohya's scripts, `lora_unet_...`, which the WebUIs and ComfyUI read too; fused layers of the original layout are fused."""

from __future__ import annotations

from torch import Tensor

from simpletuner.adapters.changes import Changes
from simpletuner.adapters.formats.shared import put_together, refuse, rename, with_alpha
from simpletuner.adapters.key_maps import Layout, Names, kohya_names
from simpletuner.errors import ConfigError

KNOWN = ("lora", "loha", "lokr", "glora", "oft", "full")
"""What the scripts, with the LyCORIS library as their network module, and the WebUIs read."""


def name_layers(layout: Layout) -> Names:
    return kohya_names(layout)


def write(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """
    Raises:
        ConfigError: an algorithm is not known there, or cannot be put together for fused layers.
    """
    refuse(changes, KNOWN, "kohya", "its readers", "Use --format lycoris, or `simpletuner merge`.")
    names = kohya_names(layout)
    homeless = [layer for layer in changes if layer not in {layer for layers in names.values() for layer in layers}]
    if homeless:
        raise ConfigError(
            f"format kohya has no place for {', '.join(homeless[:3])}: their rows lie in another order in the original layout",
            hint="Use --format comfyui or lycoris.",
        )
    found = put_together(changes, names, layout, "kohya")
    return rename(with_alpha(found))

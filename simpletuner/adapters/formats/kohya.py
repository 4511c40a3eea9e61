"""The layout of kohya's scripts, `lora_unet_...`, which the WebUIs and ComfyUI read too; fused layers of the original layout are fused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simpletuner.adapters.changes import Changes, algorithm_of
from simpletuner.adapters.formats.shared import fuse, refuse, rename, with_alpha
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
    found: Changes = {}
    for name, layers in names.items():
        adapted = [layer for layer in layers if layer in changes]
        if adapted and len(layers) > 1:
            _check_fusable(name, layers, adapted, changes)
            found[name] = fuse(layers, changes, layout)
        elif adapted:
            found[name] = changes[adapted[0]]
    return rename(with_alpha(found), {name: name for name in found})


def _check_fusable(name: str, layers: Sequence[str], adapted: Sequence[str], changes: Changes) -> None:
    doras = [layer for layer in adapted if "dora_scale" in changes[layer]]
    wrong = next((layer for layer in adapted if algorithm_of(changes[layer]) != "lora"), doras[0] if doras and len(doras) < len(layers) else None)
    if wrong is not None:
        what = "DoRA" if wrong in doras else algorithm_of(changes[wrong])
        raise ConfigError(
            f"format kohya cannot hold {what} of {wrong}: there it is a part of {name} ({len(layers)} layers in one), and {what} of the parts "
            f"is no {what} of the whole" + (", unless all of them have it" if wrong in doras else ""),
            hint="Formats comfyui and lycoris hold it as it is; `simpletuner merge` bakes it into a pipeline.",
        )

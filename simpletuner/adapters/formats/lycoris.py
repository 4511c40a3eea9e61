"""The LyCORIS library's own layout: its name of each layer in diffusers, its names of tensors. What `create_lycoris_from_weights` reads."""

from __future__ import annotations

from torch import Tensor

from simpletuner.adapters.changes import Changes, is_by_inputs
from simpletuner.adapters.formats.shared import refuse, rename, with_alpha, with_one_scale
from simpletuner.adapters.key_maps import Layout, Names, lycoris_names
from simpletuner.errors import ConfigError

KNOWN = ("lora", "loha", "lokr", "glora", "tlora", "oft", "full")


def name_layers(layout: Layout) -> Names:
    return lycoris_names(layout)


def write(changes: Changes, layout: Layout, keeps_precision: bool = False) -> dict[str, Tensor]:
    """
    Args:
        keeps_precision: whether tensors stay as they were read; otherwise they become float32 at most, with scales where the library
            applies them once.
    """
    names = {layers[0]: name for name, layers in lycoris_names(layout).items()}
    if keeps_precision:
        return rename(with_alpha(changes, keeps_precision), names)
    refuse(
        changes, KNOWN, "lycoris", "the library", "It cannot load its own files of ia3; bake the adapter into a pipeline with `simpletuner merge`."
    )
    if any(is_by_inputs(parts) for parts in changes.values()):
        raise ConfigError(
            "format lycoris cannot hold DoRA over inputs (wd_on_out false), which the library cannot load back",
            hint="Use --format kohya or comfyui, or bake it into a pipeline with `simpletuner merge`.",
        )
    return rename(with_alpha({layer: with_one_scale(parts) for layer, parts in changes.items()}), names)

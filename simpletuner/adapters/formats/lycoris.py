"""The LyCORIS library's own layout: its name of each layer in diffusers, its names of tensors. What `create_lycoris_from_weights` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.adapters.changes import Changes, Parts, rank_of, scale_of
from simpletuner.adapters.formats.shared import refuse, rename, with_alpha
from simpletuner.adapters.key_maps import Layout, Names, lycoris_names

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
    return rename(with_alpha({layer: _with_one_scale(parts) for layer, parts in changes.items()}), names)


def _with_one_scale(parts: Parts) -> Parts:
    """Fold the scale into a factor where the library applies it once in a forward pass but twice when it merges (see `lycoris_file.FOLDED`)."""
    factor = next((name for name in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if name in parts), None)
    if factor is None or scale_of(parts) == 1:
        return parts
    return {**parts, factor: (parts[factor].double() * scale_of(parts)).float(), "alpha": torch.tensor(float(rank_of(parts) or 1))}

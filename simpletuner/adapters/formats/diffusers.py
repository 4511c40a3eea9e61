"""The layout of diffusers and PEFT: `transformer.<layer>.lora_A.weight`, scales folded in, so that a reader needs no alpha."""

from __future__ import annotations

import json
from collections import Counter

from torch import Tensor

from simpletuner.adapters.changes import Changes
from simpletuner.adapters.formats.shared import folded, refuse
from simpletuner.adapters.key_maps import Layout, Names, diffusers_names
from simpletuner.errors import ConfigError


def name_layers(layout: Layout) -> Names:
    return diffusers_names(layout)


def write(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """
    Raises:
        ConfigError: it is no plain LoRA.
    """
    refuse(changes, ("lora",), "diffusers", "load_lora_weights", "Use --format lycoris or comfyui, or `simpletuner merge`.")
    if any("lora_mid.weight" in parts for parts in changes.values()):
        raise ConfigError("format diffusers cannot hold a LoRA with a middle part (use_tucker)", hint="Use --format kohya, comfyui or lycoris.")
    found: dict[str, Tensor] = {}
    for layer, parts in changes.items():
        own, name = folded(parts), f"{layout.folder}.{layer}"
        found[f"{name}.lora_A.weight"] = own["lora_down.weight"].contiguous()
        found[f"{name}.lora_B.weight"] = own["lora_up.weight"].contiguous()
        if "dora_scale" in own:
            found[f"{name}.lora_magnitude_vector"] = own["dora_scale"].reshape(-1).contiguous()
    return found


def settings(changes: Changes, layout: Layout) -> str:
    """PEFT's settings for the header, as diffusers writes them: ranks, and alphas equal to them."""
    ranks = {layer: int(parts["lora_down.weight"].shape[0]) for layer, parts in changes.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {layer: own for layer, own in sorted(ranks.items()) if own != rank}
    values = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_dora": any("dora_scale" in parts for parts in changes.values()),
        "target_modules": sorted(ranks),
    }
    return json.dumps({f"{layout.folder}.{key}": value for key, value in values.items()}, indent=2, sort_keys=True)

"""The layout of diffusers and PEFT: `transformer.<layer>.lora_A.weight`, scales folded in, so that a reader needs no alpha."""

from __future__ import annotations

import json
from collections import Counter

from torch import Tensor

from simpletuner.adapters.changes import Changes, algorithm_of, is_by_inputs
from simpletuner.adapters.formats.shared import folded, refuse, rename, single, with_one_scale
from simpletuner.adapters.key_maps import Layout, Names, diffusers_names
from simpletuner.adapters.original_names import LOKR_IN_DIFFUSERS
from simpletuner.errors import ConfigError


def name_layers(layout: Layout) -> Names:
    return diffusers_names(layout)


def write(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """
    Raises:
        ConfigError: it is no plain LoRA, and no LoKr that the model's pipeline reads.
    """
    if is_lokr(changes) and layout.original in LOKR_IN_DIFFUSERS:
        return _write_lokr(changes, layout)
    other = f"It reads LoKr, without DoRA and without LoRA beside it, for {' and '.join(LOKR_IN_DIFFUSERS)} alone. "
    way_out = "Use --format lycoris or comfyui, or `simpletuner merge`."
    refuse(changes, ("lora",), "diffusers", "load_lora_weights", (other if _has_lokr(changes) else "") + way_out)
    if any(is_by_inputs(parts) for parts in changes.values()):
        raise ConfigError("format diffusers cannot hold DoRA over inputs (wd_on_out false): PEFT's is over outputs", hint=way_out)
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


def is_lokr(changes: Changes) -> bool:
    """Whether this is LoKr throughout, and nothing that PEFT's LoKr has not."""
    return all(algorithm_of(parts) == "lokr" and not {"dora_scale", "lokr_t2"} & parts.keys() for parts in changes.values())


def _has_lokr(changes: Changes) -> bool:
    return any(algorithm_of(parts) == "lokr" for parts in changes.values())


def _write_lokr(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """Factors without alpha: the scale is in one of them."""
    found = {layer: single(with_one_scale(parts)) for layer, parts in changes.items()}
    return rename({f"{layout.folder}.{layer}": {part: value for part, value in parts.items() if part != "alpha"} for layer, parts in found.items()})


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
    return json.dumps({f"{layout.part}.{key}": value for key, value in values.items()}, indent=2, sort_keys=True)

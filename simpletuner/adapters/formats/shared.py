"""What the layouts have in common: scales made explicit or folded in, and LoRAs of the parts of a fused layer put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.adapters.changes import Changes, Parts, algorithm_of, rank_of, scale_of
from simpletuner.adapters.key_maps import Layout
from simpletuner.errors import ConfigError

WITH_RANK = ("lora", "loha", "lokr", "glora", "tlora")
"""Algorithms whose product is scaled by alpha / rank."""


def refuse(changes: Changes, known: Iterable[str], wanted: str, reader: str, hint: str) -> None:
    """Refuse algorithms that the readers of a format do not know."""
    other = sorted({name for parts in changes.values() if (name := algorithm_of(parts)) not in known})
    if other:
        raise ConfigError(f"format {wanted} cannot hold {', '.join(other)}: {reader} reads {', '.join(known)} alone", hint=hint)


def with_alpha(changes: Changes, keeps_precision: bool = False) -> Changes:
    """Give each product an alpha, as much as its rank where it had none: some readers take a missing one for 1."""
    found: Changes = {}
    for layer, parts in changes.items():
        rank = rank_of(parts) if algorithm_of(parts) in WITH_RANK else None
        found[layer] = {**({"alpha": torch.tensor(float(rank))} if rank else {}), **(parts if keeps_precision else single(parts))}
    return found


def single(parts: Parts) -> dict[str, Tensor]:
    """Tensors in float32 at most; our own files hold some in float64 so that training can go on exactly."""
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in parts.items()}


def folded(parts: Parts) -> dict[str, Tensor]:
    """A LoRA without alpha, its scale multiplied into `up`."""
    others = {name: value for name, value in single(parts).items() if name not in ("alpha", "lora_up.weight")}
    up = parts["lora_up.weight"]
    return {**others, "lora_up.weight": up if scale_of(parts) == 1 else (up.double() * scale_of(parts)).float()}


def rename(changes: Changes, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Put each layer's tensors under its name in the file."""
    return {f"{names[layer]}.{part}": value.contiguous() for layer, parts in changes.items() for part, value in parts.items()}


def fuse(layers: Sequence[str], changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """LoRAs of the parts of a fused layer as one LoRA of it: their downs one above the other, their ups along the diagonal.

    A part without a change gets zeros; the rank is the sum of the ranks, so the change is exactly the same. DoRA's lengths, a number for
    each row, follow each other if every part has them.
    """
    own = {layer: folded(changes[layer]) for layer in layers if layer in changes}
    rank = sum(parts["lora_down.weight"].shape[0] for parts in own.values())
    like = next(iter(own.values()))["lora_up.weight"]
    up, at, row = like.new_zeros(sum(layout.rows(tuple(layers))), rank), 0, 0
    for layer, rows in zip(layers, layout.rows(tuple(layers))):
        if layer in own:
            width = own[layer]["lora_down.weight"].shape[0]
            up[row : row + rows, at : at + width] = own[layer]["lora_up.weight"].flatten(1)
            at += width
        row += rows
    down = torch.cat([parts["lora_down.weight"].flatten(1) for parts in own.values()])
    found = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(rank))}
    if any("dora_scale" in parts for parts in own.values()):
        found["dora_scale"] = torch.cat([own[layer]["dora_scale"] for layer in layers])
    return found

"""Change a denoiser's weights by an adapter file, as a reader does that knows layers by certain names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.changes import Changes, Parts, changed_bias, changed_weight
from simpletuner.adapters.key_maps import Names
from simpletuner.adapters.reading import group
from simpletuner.adapters.targets import adaptable


@dataclass(frozen=True, slots=True)
class Applied:
    """What a reader made of a file."""

    layers: frozenset[str]
    """Layers of the denoiser that it changed."""
    unused: tuple[str, ...]
    """Keys that meant nothing to it."""


@torch.no_grad()
def apply_file(denoiser: nn.Module, found: Mapping[str, Tensor], names: Names) -> Applied:
    """Change weights in place by a file's tensors; names that stand for several layers change them as one.

    Args:
        names: what the reader looks for, as in `key_maps`.
    """
    groups, unused = group(found, names)
    modules = adaptable(denoiser)
    for name, parts in groups.items():
        _change([modules[layer] for layer in names[name]], parts)
    return Applied(frozenset(layer for name in groups for layer in names[name]), tuple(unused))


@torch.no_grad()
def apply_changes(denoiser: nn.Module, changes: Changes) -> None:
    """Bake an adapter into the weights of its layers, in place and in their own precision."""
    modules = adaptable(denoiser)
    for layer, parts in changes.items():
        _change([modules[layer]], parts)


def _change(modules: list[Any], parts: Parts) -> None:
    """Change the weights of layers that lie one above the other in the reader's model."""
    weight = torch.cat([module.weight.data for module in modules])
    after = changed_weight(weight, parts)
    for module, rows in zip(modules, after.split([module.weight.shape[0] for module in modules])):
        module.weight.data.copy_(rows)
    if "diff_b" in parts and all(module.bias is not None for module in modules):
        bias = changed_bias(torch.cat([module.bias.data for module in modules]), parts)
        assert bias is not None
        for module, rows in zip(modules, bias.split([module.weight.shape[0] for module in modules])):
            module.bias.data.copy_(rows)

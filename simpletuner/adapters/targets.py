"""Which modules of a denoiser an adapter's targets mean, and a clear word when they mean none."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.key_maps import Layout
from simpletuner.errors import ConfigError, choose, nearest

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
SHOWN = 12
"""Module names listed in an error before the rest is only counted."""


def adaptable(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv by its name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, ADAPTABLE)}


def grouped(denoiser: nn.Module) -> list[str]:
    """Names of convolutions that keep groups of channels apart, which the LyCORIS library (to 4.1 at least) takes for whole ones and breaks on."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1]


def layout_of(denoiser: nn.Module, folder: str, original: str | None) -> Layout:
    """What the file formats need to know of a denoiser, before anything is put on it."""

    def shape(module: Any) -> tuple[int, ...]:
        # A quantised weight may be packed into another shape.
        return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)

    return Layout(folder, original, {name: shape(module) for name, module in adaptable(denoiser).items()})


def owner_classes(denoiser: nn.Module) -> set[str]:
    """Class names of the modules that are, or hold, a Linear or Conv; the denoiser itself and mere lists left out."""
    return {
        type(module).__name__
        for name, module in denoiser.named_modules()
        if name and not isinstance(module, CONTAINERS) and any(isinstance(inner, ADAPTABLE) for inner in module.modules())
    }


def resolve_class(target: str, denoiser: nn.Module, aliases: Mapping[str, Sequence[str]], source: str) -> tuple[str, ...]:
    """Give the classes of this denoiser that a user's class name means.

    A name means itself, what the family lists for it, and, for a bare layer such as Linear, its quantised relatives.

    Raises:
        ConfigError: there is no such module; lists those there are.
    """
    present = owner_classes(denoiser)
    wanted = {target, *aliases.get(target, ())}
    wanted |= {
        type(module).__name__ for module in adaptable(denoiser).values() if target in {parent.__name__ for parent in type(module).__mro__[:-2]}
    }
    found = tuple(sorted(wanted & present))
    if not found:
        known = present | {alias for alias, classes in aliases.items() if present & set(classes)}
        raise ConfigError(
            f"target_module {target!r} in {source} matches no module of {type(denoiser).__name__}",
            hint=choose(target, known, "module classes with something to adapt"),
        )
    return found


def match_pattern(pattern: str, denoiser: nn.Module, use_fnmatch: bool, source: str) -> list[str]:
    """Give the names of the Linear and Conv modules that a pattern means: a regular expression from the start, or a glob.

    Raises:
        ConfigError: it is no regular expression, or matches nothing.
    """
    names = list(adaptable(denoiser))
    try:
        found = [name for name in names if name == pattern or (fnmatch.fnmatch(name, pattern) if use_fnmatch else re.match(pattern, name))]
    except re.error as error:
        raise ConfigError(
            f"target_name {pattern!r} in {source} is no regular expression: {error}",
            hint="Set use_fnmatch to true in apply_preset for patterns with * alone.",
        ) from error
    if not found:
        raise ConfigError(
            f"target_name {pattern!r} in {source} matches no Linear or Conv of {type(denoiser).__name__}",
            hint=names_hint(pattern, names),
        )
    return found


def match_suffix(suffix: str, names: Iterable[str]) -> list[str]:
    """Give the module names that are `suffix` or end in it after a dot."""
    return [name for name in names if name == suffix or name.endswith("." + suffix)]


def names_hint(wanted: str, names: Sequence[str]) -> str:
    """Say which module names there are, with block numbers folded together and the nearest first."""
    folded = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    best = nearest(wanted, folded)
    listed = [best, *(name for name in folded if name != best)] if best else folded
    return f"There are: {', '.join(listed[:SHOWN])}{f' and {len(listed) - SHOWN} more' if len(listed) > SHOWN else ''}."


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is something else than plain floating-point numbers."""
    weight: Any = module.weight
    # Tensors of quanto and torchao, and those of bitsandbytes, which look like plain ones.
    return hasattr(weight, "__tensor_flatten__") or hasattr(weight, "quant_state") or not weight.is_floating_point()


def plain_weight(module: Any) -> torch.Tensor:
    """The weight that a layer multiplies with, quantised or not; of some quantisers the layer itself gives it."""
    given: Any = getattr(module, "plain_weight", None)
    weight: torch.Tensor = given() if given is not None else module.weight.dequantize() if is_quantised(module) else module.weight
    return weight


def is_low_precision(module: nn.Module) -> bool:
    """Whether a layer's weight is held in 16 bits or fewer."""
    weight: Any = module.weight
    return is_quantised(module) or torch.finfo(weight.dtype).bits < 32

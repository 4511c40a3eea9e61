"""Read an adapter file of any layout, whoever wrote it, as changes of this denoiser's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.adapters import weights
from simpletuner.adapters.changes import EVERY_PART, SPELLINGS, Changes, Parts, algorithm_of, is_by_inputs
from simpletuner.adapters.fits import check_fit
from simpletuner.adapters.key_maps import Layout, Names, all_names, all_text_names
from simpletuner.adapters.peft_settings import with_settings
from simpletuner.errors import ConfigError

SHOWN = 3
"""Keys named in an error before the rest is only counted."""
OLD_ATTENTION = re.compile(r"(?:\.processor)?\.(to_\w+?)_lora\.(down|up)\.weight$")
"""How diffusers called LoRA tensors of attention before it took to PEFT."""
TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.")


def read_changes(path: Path, layout: Layout, model: str, *, leaves_text: bool = False) -> Changes:
    """Read a file, or the adapter file in a folder, in any layout that is known here.

    Args:
        layout: of the denoiser that it is to change.
        model: what to call that denoiser in errors.
        leaves_text: whether layers of text encoders are left to `read_text_changes`.

    Raises:
        ConfigError: it is of another model, has layers of text encoders, or cannot be split as this denoiser is.
    """
    found = weights.read(path)
    text = [key for key in found if key.startswith(TEXT_ENCODERS)]
    if text and not leaves_text:
        raise ConfigError(
            f"{path} also adapts text encoders ({shown(text)}), which are not trained here",
            hint="Set train_text_encoder, if the family has a place for it; or remove those tensors from the file: the rest can be used.",
        )
    found = {key: value for key, value in found.items() if key not in text}
    file, names = weights.file_of(path), all_names(layout)
    said = weights.metadata_of(file)
    of = next((said[key] for key in ("base_model", "modelspec.architecture", "ss_base_model_version", "model_family") if said.get(key)), None)
    groups, unused = group(found, names)
    if unused or not groups:
        raise ConfigError(
            f"{path} is no adapter for {model}: {len(unused)} of its {len(found)} tensors belong to no layer of it ({shown(unused)})"
            + (f"; it says that it is for {of}" if of else ""),
            hint="Train on the base that the adapter was made for, or leave init_lora out.",
        )
    check_fit(file, groups, names, layout, model, of)
    changes: Changes = {}
    for name, parts in groups.items():
        for layer, own in split(name, parts, names[name], layout).items():
            changes[layer] = {**changes.get(layer, {}), **_tidy(own, layout.shapes[layer])}
    return with_settings({layer: parts for layer, parts in changes.items() if not _is_nothing(parts)}, file, layout.part)


def adapts_text(path: Path) -> bool:
    """Whether a file, or the adapter file in a folder, has layers of text encoders."""
    return any(key.startswith(TEXT_ENCODERS) for key in weights.names(path))


def read_text_changes(path: Path, layouts: Sequence[Layout]) -> list[Changes]:
    """Read what a file of any layout changes in text encoders, one after the other.

    Raises:
        ConfigError: it changes layers of text encoders that none of these has.
    """
    unused = {key: value for key, value in weights.read(path).items() if key.startswith(TEXT_ENCODERS)}
    total, found = len(unused), []
    for layout in layouts:
        names = all_text_names(layout)
        groups, others = group(unused, names)
        unused = {key: unused[key] for key in others}
        check_fit(weights.file_of(path), groups, names, layout, layout.part, None)
        changes = {names[name][0]: _tidy(parts, layout.shapes[names[name][0]]) for name, parts in groups.items()}
        found.append(with_settings(changes, weights.file_of(path), layout.part))
    if unused:
        raise ConfigError(
            f"{path} adapts other layers of text encoders than {', '.join(layout.part for layout in layouts)} can be given: "
            f"{len(unused)} of {total} tensors belong to none ({shown(list(unused))})",
            hint="Remove those tensors from the file; the rest can be used.",
        )
    return found


def _tidy(parts: Parts, shape: Sequence[int]) -> Parts:
    """Give DoRA's lengths of rows a column, as the library has them, where PEFT's are flat; and make alpha one float32 number."""
    found = dict(parts)
    if "dora_scale" in parts and not is_by_inputs(parts):
        found["dora_scale"] = parts["dora_scale"].reshape(-1, *(1 for _ in shape[1:]))
    if "alpha" in parts and parts["alpha"].numel() == 1:
        found["alpha"] = torch.tensor(float(parts["alpha"]))
    return found


def _is_nothing(parts: Parts) -> bool:
    """Whether this is a layer of which only the bias of others that are fused with it was told."""
    return parts.keys() == {"diff_b"} and not parts["diff_b"].any()


def group(found: Mapping[str, Tensor], names: Names) -> tuple[dict[str, Parts], list[str]]:
    """Sort a file's tensors by the names in it.

    Returns:
        The tensors by name and the library's word for each, and the keys that are no known name with a known word.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, value in found.items():
        name, part = take_apart(key)
        if name in names and part:
            groups.setdefault(name, {})[SPELLINGS.get(part, part)] = value
        else:
            unused.append(key)
    return dict(groups), unused


def take_apart(key: str) -> tuple[str, str]:
    """Part a key into a layer's name and a tensor's; the latter is empty if no algorithm has such a tensor."""
    key = OLD_ATTENTION.sub(lambda match: f".{match[1]}{'.0' if match[1] == 'to_out' else ''}.lora.{match[2]}.weight", key)
    part = max((part for part in EVERY_PART if key.endswith("." + part)), key=len, default="")
    return (key[: -len(part) - 1], part) if part else (key, "")


def split(name: str, parts: Parts, layers: Sequence[str], layout: Layout) -> Changes:
    """Give each layer its share of an adapter of a fused weight.

    Of a LoRA every layer gets its rows of `up` and all of `down`, or, where the file was made of separate LoRAs, its own rank again.

    Raises:
        ConfigError: the algorithm cannot be split by rows.
    """
    if len(layers) == 1:
        return {layers[0]: parts}
    rows = layout.rows(tuple(layers))
    if algorithm_of(parts) == "full":
        return {layer: {part: value.split(rows)[number] for part, value in parts.items()} for number, layer in enumerate(layers)}
    if algorithm_of(parts) != "lora" or "lora_mid.weight" in parts or is_by_inputs(parts):
        raise ConfigError(
            f"{name} adapts {', '.join(layers)} as one layer by {algorithm_of(parts)}, which cannot be divided among them",
            hint="Only plain LoRA files with fused layers can be continued; merge this one into the base, and train on that.",
        )
    ups, down, rank = parts["lora_up.weight"].split(rows), parts["lora_down.weight"], parts["lora_down.weight"].shape[0]
    alpha = parts.get("alpha", torch.tensor(float(rank))).float()
    changed = [number for number, up in enumerate(ups) if up.any()]  # the others have no adapter, or one that does nothing
    share = rank // max(1, len(changed))
    columns = [slice(place * share, (place + 1) * share) for place in range(len(changed))]
    is_separate = share * len(changed) == rank and all(
        ups[number].count_nonzero() == ups[number][:, own].count_nonzero() for number, own in zip(changed, columns)
    )
    found: Changes = {}
    for number, own in zip(changed, columns):
        tensors: dict[str, Tensor] = {"lora_up.weight": ups[number], "lora_down.weight": down, "alpha": alpha}
        if is_separate:
            tensors = {"lora_up.weight": ups[number][:, own].contiguous(), "lora_down.weight": down[own], "alpha": alpha / len(changed)}
        if "dora_scale" in parts:
            tensors["dora_scale"] = parts["dora_scale"].split(rows)[number]
        found[layers[number]] = tensors
    return found


def shown(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

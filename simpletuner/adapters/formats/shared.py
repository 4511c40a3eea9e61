"""What the layouts have in common: scales made explicit or folded in, and LoRAs of the parts of a fused layer put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.adapters.changes import Changes, Parts, algorithm_of, is_by_inputs, rank_of, scale_of
from simpletuner.adapters.key_maps import Layout, Names
from simpletuner.errors import ConfigError

WITH_RANK = ("lora", "loha", "lokr", "glora", "tlora")
"""Algorithms whose product is scaled by alpha / rank."""
OF_ALL = ("DoRA", "full")
"""Kinds of changes that can be put together if each part of a fused layer has one."""
WRITTEN_AS_IT_IS = (torch.float32, torch.bfloat16, torch.float16)


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
    """Tensors in float32 at most; our own files hold some in float64 so that training can go on exactly, others' some in 8 bits."""
    return {name: value if value.dtype in WRITTEN_AS_IT_IS else value.float() for name, value in parts.items()}


def folded(parts: Parts) -> dict[str, Tensor]:
    """A LoRA without alpha, its scale multiplied into `up`."""
    others = {name: value for name, value in single(parts).items() if name not in ("alpha", "lora_up.weight")}
    up = parts["lora_up.weight"]
    return {**others, "lora_up.weight": up if scale_of(parts) == 1 else (up.double() * scale_of(parts)).float()}


def with_one_scale(parts: Parts) -> Parts:
    """Fold the scale into a factor where the library applies it once in a forward pass but twice when it merges (see `lycoris_file.FOLDED`)."""
    factor = next((name for name in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if name in parts), None)
    if factor is None or scale_of(parts) == 1:
        return parts
    return {**parts, factor: (parts[factor].double() * scale_of(parts)).float(), "alpha": torch.tensor(float(rank_of(parts) or 1))}


def rename(changes: Changes, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Put each layer's tensors under its name in the file, or under the one that it has."""
    return {f"{names[layer] if names else layer}.{part}": value.contiguous() for layer, parts in changes.items() for part, value in parts.items()}


def put_together(changes: Changes, names: Names, layout: Layout, wanted: str) -> Changes:
    """The changes by a format's own names of layers; those of parts of a fused layer become one.

    Raises:
        ConfigError: they cannot.
    """
    found: Changes = {}
    for name, layers in names.items():
        adapted = [layer for layer in layers if layer in changes]
        if adapted and len(layers) > 1:
            _check_fusable(name, layers, adapted, changes, wanted)
            found[name] = _sum_of_all(layers, changes, layout) if algorithm_of(changes[adapted[0]]) == "full" else fuse(layers, changes, layout)
        elif adapted:
            found[name] = changes[adapted[0]]
    return found


def _check_fusable(name: str, layers: Sequence[str], adapted: Sequence[str], changes: Changes, wanted: str) -> None:
    """Refuse what is more than low-rank products that can stand side by side, unless it is said of every row of the fused layer."""
    kinds = {layer: _kind(changes[layer]) for layer in adapted}
    is_of_all = len(adapted) == len(layers) and any(set(kinds.values()) == {kind} for kind in OF_ALL)
    if is_of_all or set(kinds.values()) == {"lora"}:
        return
    wrong = next(layer for layer in adapted if kinds[layer] != "lora")
    raise ConfigError(
        f"format {wanted} cannot hold {kinds[wrong]} of {wrong}: there it is a part of {name} ({len(layers)} layers in one), and {kinds[wrong]} of "
        f"the parts is no {kinds[wrong]} of the whole" + (", unless all of them have it" if kinds[wrong] in OF_ALL else ""),
        hint="Format lycoris holds it as it is, and for many models comfyui; `simpletuner merge` bakes it into a pipeline.",
    )


def _kind(parts: Parts) -> str:
    algorithm = algorithm_of(parts)
    if "dora_scale" not in parts:
        return algorithm
    if algorithm != "lora":
        return f"{algorithm} with DoRA"
    return "DoRA over inputs" if is_by_inputs(parts) else "DoRA"


def _sum_of_all(layers: Sequence[str], changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """Whole changes of the parts of a fused layer, one above the other."""
    found = {"diff": torch.cat([changes[layer].get("diff", torch.zeros(layout.shapes[layer])) for layer in layers])}
    return {**found, **({"diff_b": biases} if (biases := fused_biases(layers, changes, layout)) is not None else {})}


def fused_biases(layers: Sequence[str], changes: Changes, layout: Layout) -> Tensor | None:
    """What is added to the bias of a fused layer, with zeros for parts that say nothing; None if none does."""
    said = [changes[layer]["diff_b"] for layer in layers if "diff_b" in changes.get(layer, {})]
    if not said:
        return None
    rows = layout.rows(tuple(layers))
    return torch.cat([changes.get(layer, {}).get("diff_b", said[0].new_zeros(count)) for layer, count in zip(layers, rows)])


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

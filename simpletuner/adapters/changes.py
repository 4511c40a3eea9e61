"""What an adapter does to a layer's weight, computed from the tensors in its file alone; no library that trained it is asked.

So an exported file can be applied as a reader applies it, and a weight with the adapter baked in can be written.
Formulas: LoRA (Hu et al. 2021), LoHa and LoKr (Yeh et al. 2023), GLoRA (Chavan et al. 2023), OFT (Qiu et al. 2023), BOFT (Liu et al. 2023),
DoRA (Liu et al. 2024), (IA)^3 (Liu et al. 2022), T-LoRA (Soboleva et al. 2025); the order of indices is that of the LyCORIS library's files.

Letters: O outputs and I inputs of a layer (of a convolution: channels, then kernel), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.errors import ConfigError

Parts = Mapping[str, Tensor]
"""The tensors of one layer's adapter by the library's names: `lora_up.weight`, `lokr_w1`, `alpha`, ..."""
Changes = dict[str, Parts]
"""The tensors of a whole adapter, layer by layer."""

SPELLINGS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}
"""What PEFT and older files of diffusers call some tensors, and the library."""
PARTS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "tlora": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    "oft": ("oft_blocks", "rescale"),
    "ia3": ("weight", "on_input"),
    "full": ("diff", "diff_b"),
}
"""Algorithms and their tensors; any may come with `alpha`, and with `dora_scale`."""
EVERY_PART = ("alpha", "dora_scale", *(part for parts in PARTS.values() for part in parts), *SPELLINGS)


def algorithm_of(parts: Parts) -> str:
    """Name the algorithm by its tensors.

    Raises:
        ConfigError: it is none of those known here.
    """
    for name, known in PARTS.items():
        if any(part in parts for part in known):
            return name
    raise ConfigError(f"tensors named {', '.join(sorted(parts))} belong to no adapter known here", hint=f"Known are {', '.join(PARTS)}.")


def rank_of(parts: Parts) -> int | None:
    """The rank by which alpha is divided; None where alpha has no effect."""
    ranks = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "a2.weight": 0, "q_layer.weight": 0}
    return next((parts[name].shape[dim] for name, dim in ranks.items() if name in parts), None)


def scale_of(parts: Parts) -> float:
    """The factor alpha / rank before the product of the tensors."""
    rank = rank_of(parts)
    return float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0


def is_by_inputs(parts: Parts) -> bool:
    """Whether DoRA's lengths are of the weight's columns, (1, I, ...), as the library has them with `wd_on_out` false; else they are of its rows."""
    lengths = parts.get("dora_scale")
    return lengths is not None and lengths.dim() > 1 and lengths.shape[0] == 1 and lengths.numel() > 1


def change_shape(parts: Parts, shape: Sequence[int]) -> tuple[int, int]:
    """The shape of the change that these tensors give, (O, I times the kernel); computed without numbers.

    Args:
        shape: of the layer's weight, for algorithms that change whatever there is.

    Raises:
        RuntimeError, KeyError: the tensors do not fit each other, or one is lacking.
    """
    algorithm, inputs = algorithm_of(parts), math.prod(shape[1:])
    if algorithm == "oft":
        return parts["oft_blocks"].shape[-3] * parts["oft_blocks"].shape[-2], inputs
    if algorithm == "ia3":
        count = parts["weight"].numel()
        return (shape[0], count * math.prod(shape[2:])) if bool(parts["on_input"]) else (count, inputs)
    empty = {name: torch.empty(value.shape, device="meta") for name, value in parts.items()}
    rows, columns = _DELTAS[algorithm](empty, torch.empty(tuple(shape), device="meta")).flatten(1).shape
    return rows, columns


def changed_weight(weight: Tensor, parts: Parts) -> Tensor:
    """The weight of a layer, (O, I, ...), as the adapter at strength 1 makes it, in float32."""
    before, tensors = weight.float(), {name: value.float() for name, value in parts.items()}
    algorithm = algorithm_of(parts)
    if algorithm == "oft":
        return _rotated(before, tensors)
    if algorithm == "ia3":
        scale = 1 + tensors["weight"].reshape(-1)
        return before * (scale.reshape(-1, *(1 for _ in before.shape[2:])) if bool(parts["on_input"]) else _over_rows(scale, before))
    after = before + scale_of(parts) * _DELTAS[algorithm](tensors, before).reshape(before.shape)
    if "dora_scale" in parts:
        side = 1 if is_by_inputs(parts) else 0
        turned, lengths = after.transpose(0, side), tensors["dora_scale"]
        after = (turned * _over_rows(lengths, turned) / _over_rows(_row_norms(turned), turned)).transpose(0, side)
    return after


def changed_bias(bias: Tensor | None, parts: Parts) -> Tensor | None:
    """The bias of a layer with the adapter; only `full` changes it."""
    return bias if bias is None or "diff_b" not in parts else bias.float() + parts["diff_b"].float()


def _over_rows(values: Tensor, weight: Tensor) -> Tensor:
    """One number an output, shaped to be multiplied with the weight."""
    return values.reshape(-1, *(1 for _ in weight.shape[1:]))


def _row_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1) + torch.finfo(weight.dtype).eps


def _lora(t: Parts, weight: Tensor) -> Tensor:
    up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"]
    if "lora_mid.weight" in t:
        return torch.einsum("m n ..., o m, n i -> o i ...", t["lora_mid.weight"], up, down.flatten(1))
    return up @ down.flatten(1)


def _loha(t: Parts, weight: Tensor) -> Tensor:
    return _factor(t, "hada_w1", "hada_t1") * _factor(t, "hada_w2", "hada_t2")


def _lokr(t: Parts, weight: Tensor) -> Tensor:
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else _factor(t, "lokr_w2", "lokr_t2")
    return torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())


def _factor(t: Parts, name: str, core: str) -> Tensor:
    """A B, or a Tucker product with the core between them."""
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return torch.einsum("i j ..., j r, i p -> p r ...", t[core], b, a) if core in t else a @ b.flatten(1)


def _glora(t: Parts, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    own = torch.einsum("m n ..., o m, n i -> o i ...", t["bm.weight"], b1, b2) if "bm.weight" in t else (b1 @ b2).reshape(weight.shape)
    return own + torch.einsum("o i ..., i j -> o j ...", weight, a1 @ a2)


def _tlora(t: Parts, weight: Tensor) -> Tensor:
    """P diag(lambda) Q of all ranks, less what it was at the start: the weight's own largest singular directions."""
    p, values, q = tlora_start(weight, t["q_layer.weight"].shape[0])
    return (t["p_layer.weight"].flatten(1) * t["lambda_layer"]) @ t["q_layer.weight"].flatten(1) - (p * values) @ q


def tlora_start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a T-LoRA of a weight starts from: P (O, r), the diagonal (r,) and Q (r, I) of the weight's largest singular directions."""
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _full(t: Parts, weight: Tensor) -> Tensor:
    return t["diff"] if "diff" in t else torch.zeros_like(weight)  # of the bias alone


_DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "tlora": _tlora, "full": _full}


def _rotated(weight: Tensor, t: Parts) -> Tensor:
    """The weight with blocks of its rows rotated: once each (OFT), or in stages between which rows change places (BOFT)."""
    blocks = t["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    limit, size = float(t.get("alpha", torch.tensor(0.0))) * weight.shape[0], float(skew.norm()) + 1e-8
    if 0 < limit < size:
        skew = skew * (limit / size)
    eye = torch.eye(skew.shape[-1])
    rotations = (eye + skew) @ torch.linalg.inv(eye - skew)
    if blocks.dim() == 3:
        turned = torch.einsum("k n m, k n ... -> k m ...", rotations, weight.reshape(blocks.shape[0], blocks.shape[1], *weight.shape[1:]))
        after = turned.reshape(weight.shape)
    else:
        after = weight
        for stage, rotation in enumerate(rotations):  # (blocks, b, b)
            stride = 2**stage * (rotation.shape[-1] // 2)
            after = after.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, rotation.shape[-1]))
            after = torch.einsum("b i j, b j ... -> b i ...", rotation, after).flatten(0, 1)
            after = after.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return after * t["rescale"].reshape(-1, *(1 for _ in weight.shape[1:])) if "rescale" in t else after

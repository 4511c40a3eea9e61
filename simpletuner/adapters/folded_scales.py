"""Scales of LyCORIS' modules in their files: which tensors take them up, and how nothing is lost by it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules import LycorisBaseModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor

SCALED = {
    LokrModule: ("lokr_w1", "lokr_w1_a"),
    LohaModule: ("hada_w1_a",),
    LoConModule: ("lora_up.weight",),
    GLoRAModule: ("a2.weight", "b2.weight"),
}
"""Tensors that a change of alpha multiplies, those that a module has of them."""
FOLDED = (LokrModule, LohaModule)
"""Modules of the algorithms whose scale is folded into a factor when they are saved (see `lycoris_file.FOLDED`)."""


def is_folded(lora: LycorisBaseModule) -> bool:
    """Whether a module's scale is folded into one of its tensors when it is saved."""
    return isinstance(lora, FOLDED) and lora.scale != 1


def fold(factor: Tensor, scale: float) -> Tensor:
    """Multiply a factor by the scale; in float64 unless float32 gives the same number back."""
    wide = factor.double() * scale
    single = wide.float()
    return single if torch.equal((single.double() / scale).float(), factor) else wide


def scale_ratio(lora: LycorisBaseModule, found: Mapping[str, Tensor]) -> tuple[float, float]:
    """The scale that a file's tensors were saved for, and the one they are read for; (1, 1) where it is the same."""
    is_whole = isinstance(lora, LokrModule) and lora.use_w1 and lora.use_w2
    if type(lora) not in SCALED or is_whole:
        return 1.0, 1.0
    alpha = found[f"{lora.lora_name}.alpha"].float()
    if torch.equal(alpha, torch.tensor(float(lora.scale * lora.lora_dim))):
        return 1.0, 1.0
    return alpha.item() / lora.lora_dim, lora.scale

"""An adapter as pictures see it, and one read from a file of any layout, which is only looked at and never trained.

Letters: B batch, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simpletuner.adapters.changes import Changes, Parts, algorithm_of, changed_bias, changed_weight, scale_of
from simpletuner.adapters.targets import adaptable, is_quantised


class Effect(Protocol):
    """What changes a denoiser's answers, as far as rendering is concerned; every `Adapter` is one."""

    trains_base: ClassVar[bool]

    def set_strength(self, strength: float) -> None: ...

    def train(self, mode: bool) -> None: ...

    def at_time(self, time: Tensor) -> None: ...


class FileEffect:
    """An adapter whose change is added to the answers of layers, so that their weights stay as they are: quantised or not, bit for bit at strength 0.

    Of a plain LoRA it holds the two matrices; of any other algorithm the change itself, which is as large as the weight.
    """

    trains_base: ClassVar[bool] = False

    def __init__(self, changes: Changes) -> None:
        """
        Args:
            changes: as `read_changes` gives them; none is the base model.
        """
        self._changes = changes
        self._strength = 1.0

    @torch.no_grad()
    def attach(self, denoiser: nn.Module) -> None:
        """Hang the changes on a denoiser that is quantised and on its device already."""
        modules = adaptable(denoiser)
        for layer, parts in self._changes.items():
            modules[layer].register_forward_hook(partial(self._after, _change_of(modules[layer], parts)))

    def _after(self, change: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        if self._strength == 0:
            return answer
        return answer + (self._strength * change(inputs[0])).to(answer.dtype)

    def set_strength(self, strength: float) -> None:
        self._strength = strength

    def train(self, mode: bool) -> None:
        """There is nothing to train, and no dropout."""

    def at_time(self, time: Tensor) -> None:
        """It is the same at all times."""


def _change_of(module: Any, parts: Parts) -> Callable[[Tensor], Tensor]:
    """What a layer's adapter adds to its answer, by the layer's input."""
    weight, device = module.weight, module.weight.device
    dtype = torch.float32 if weight.dtype not in (torch.bfloat16, torch.float16) else weight.dtype
    if isinstance(module, nn.Linear) and algorithm_of(parts) == "lora" and "dora_scale" not in parts:
        down, up = (parts[f"lora_{name}.weight"].to(device, dtype) for name in ("down", "up"))
        return partial(_low_rank, down.flatten(1), up.flatten(1), scale_of(parts))
    plain = (weight.dequantize() if is_quantised(module) else weight).float().cpu()
    delta = (changed_weight(plain, parts) - plain).to(device, dtype)
    bias = None
    if module.bias is not None and "diff_b" in parts:
        after = changed_bias(module.bias.float().cpu(), parts)
        assert after is not None
        bias = (after - module.bias.float().cpu()).to(device, dtype)
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x.to(dtype), delta, bias)
    return lambda x: module._conv_forward(x.to(dtype), delta, bias)


def _low_rank(down: Tensor, up: Tensor, scale: float, x: Tensor) -> Tensor:
    """(B, ..., I) to (B, ..., O)."""
    return F.linear(F.linear(x.to(down.dtype), down), up) * scale

"""An adapter as pictures see it, and one read from a file of any layout, which is only looked at and never trained.

Letters: B batch, I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simpletuner.adapters.changes import Changes, Parts, algorithm_of, changed_bias, changed_weight, scale_of, tlora_start
from simpletuner.adapters.ranks import RankRule, Ranks
from simpletuner.adapters.targets import adaptable, plain_weight


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

    def __init__(self, changes: Changes, rule: RankRule | None = None) -> None:
        """
        Args:
            changes: as `read_changes` gives them; none is the base model.
            rule: how a T-LoRA's ranks follow the time; without one all are used.
        """
        self._changes = changes
        self._strength = 1.0
        self._ranks = Ranks(rule) if rule else None

    @torch.no_grad()
    def attach(self, denoiser: nn.Module, device: torch.device | None = None) -> None:
        """Hang the changes on a denoiser that is in its final precision.

        Args:
            device: where its layers compute, if not where their weights are now.
        """
        modules: Mapping[str, Any] = adaptable(denoiser)
        for layer, parts in self._changes.items():
            masks = self._ranks if algorithm_of(parts) == "tlora" else None
            where = device or modules[layer].weight.device
            change = _masked_change_of(modules[layer], parts, masks, where) if masks else _change_of(modules[layer], parts, where)
            modules[layer].register_forward_hook(partial(self._after, change))

    def _after(self, change: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        if self._strength == 0:
            return answer
        return answer + (self._strength * change(inputs[0])).to(answer.dtype)

    def set_strength(self, strength: float) -> None:
        self._strength = strength

    def train(self, mode: bool) -> None:
        """There is nothing to train, and no dropout."""

    def at_time(self, time: Tensor) -> None:
        """Only a T-LoRA with a rule is not the same at all times."""
        if self._ranks is not None:
            self._ranks.at_time(time)


def _change_of(module: Any, parts: Parts, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a layer's adapter adds to its answer, by the layer's input."""
    weight = module.weight
    dtype = torch.float32 if weight.dtype not in (torch.bfloat16, torch.float16) else weight.dtype
    if isinstance(module, nn.Linear) and algorithm_of(parts) == "lora" and "dora_scale" not in parts:
        down, up = (parts[f"lora_{name}.weight"].to(device, dtype) for name in ("down", "up"))
        return partial(_low_rank, down.flatten(1), up.flatten(1), scale_of(parts))
    plain = _plain(module)
    delta = (changed_weight(plain, parts) - plain).to(device, dtype)
    bias = None
    if module.bias is not None and "diff_b" in parts:
        after = changed_bias(module.bias.float().cpu(), parts)
        assert after is not None
        bias = (after - module.bias.float().cpu()).to(device, dtype)
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x.to(dtype), delta, bias)
    return lambda x: module._conv_forward(x.to(dtype), delta, bias)


def _plain(module: Any) -> Tensor:
    """A layer's weight in float32 on the CPU."""
    weight: Tensor = plain_weight(module).float().cpu()
    return weight


def _masked_change_of(module: Any, parts: Parts, masks: Ranks, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a T-LoRA adds to a layer's answer: P m l Q - P0 m l0 Q0 with the mask m of the time; in float32, as the two are large and nearly equal."""
    weight = _plain(module)
    q, p = (parts[f"{name}_layer.weight"].float().flatten(1) for name in ("q", "p"))
    rank = len(q)
    p0, l0, q0 = tlora_start(weight, rank)
    down, up = torch.cat([q, q0]).to(device), torch.cat([p, p0], 1).to(device)  # (2 r, I), (O, 2 r)
    values = torch.cat([parts["lambda_layer"].float().flatten(), -l0]).to(device) * scale_of(parts)

    def change(x: Tensor) -> Tensor:
        mask = masks.of(rank, len(x), x.device)
        scaled = values[None] if mask is None else values * mask.repeat(1, 2)  # (1 or B, 2 r)
        if isinstance(module, nn.Linear):
            inner = F.linear(x.float(), down)
            return F.linear(inner * scaled.view(len(scaled), *[1] * (x.dim() - 2), -1), up)
        inner = module._conv_forward(x.float(), down.view(-1, *weight.shape[1:]), None)
        return torch.einsum("b r ..., o r -> b o ...", inner * scaled.view(*scaled.shape, *[1] * (x.dim() - 2)), up)

    return change


def _low_rank(down: Tensor, up: Tensor, scale: float, x: Tensor) -> Tensor:
    """(B, ..., I) to (B, ..., O)."""
    return F.linear(F.linear(x.to(down.dtype), down), up) * scale

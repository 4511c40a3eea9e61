"""Modules of the LyCORIS library, changed so that a run can be repeated, resumed, and compared with its base.

`full` takes the weight off the layer that it adapts, so that no base is left to compare with. `dylora` draws its ranks from Python's own
generator, which is no part of a run's state, also when pictures are made; and its file is scaled otherwise than it was trained.

Letters: O outputs and I inputs of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.wrapper import network_module_dict
from torch import Tensor, nn


class SteadyFull(FullModule):
    """A change of the whole weight, and of the bias, beside a layer that stays as it is."""

    def __init__(self, lora_name: str, org_module: nn.Module, *arguments: Any, **settings: Any) -> None:
        super().__init__(lora_name, org_module, *arguments, **settings)
        self.float()
        self._org_weight, self.org_bias = [None], None  # copies of the base, which is still there

    def apply_to(self, **named: Any) -> None:
        LycorisBaseModule.apply_to(self, **named)

    def restore(self) -> None:
        LycorisBaseModule.restore(self)

    def custom_state_dict(self) -> dict[str, Tensor]:
        return {"diff": self.weight, **({} if self.bias is None else {"diff_b": self.bias})}

    def take(self, parts: Mapping[str, Tensor]) -> None:
        """Read what `custom_state_dict` gave."""
        self.weight.copy_(parts["diff"])
        if self.bias is not None:
            self.bias.copy_(parts["diff_b"])

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        base: Tensor = self.org_forward(x, *arguments, **named)
        if self.module_dropout and self.training and torch.rand(1) < self.module_dropout:
            return base
        bias = None if self.bias is None else (self.bias * self.multiplier).to(x.dtype)
        added: Tensor = self.op(x, (self.weight * self.multiplier).to(x.dtype), bias, **self.kw_dict)
        return base + added


class SteadyDyLora(DyLoraModule):
    """A LoRA that trains with as many blocks of ranks as torch's generator draws, and answers with all of them."""

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        base: Tensor = self.org_forward(x, *arguments, **named)
        if self.module_dropout and self.training and torch.rand(1) < self.module_dropout:
            return base
        block = int(torch.randint(self.block_count, (1,))) if self.training else self.block_count - 1
        down, up, scale = self.get_weight(block * self.block_size)  # (r, I) and (O, r); blocks before the last are not trained by this call
        rank, kernel = down.shape[0], self.shape[2:]
        inner = self.op(x, down.view(rank, -1, *kernel).to(x.dtype), None, **self.kw_dict)
        added: Tensor = self.op(inner, up.view(-1, rank, *(1 for _ in kernel)).to(x.dtype), None)
        return base + added * (float(scale) * self.multiplier)

    def custom_state_dict(self) -> dict[str, Tensor]:
        """A LoRA of all ranks. Training divides alpha by the blocks, and readers of the file by the ranks."""
        return {**super().custom_state_dict(), "alpha": self.alpha.float() * self.block_size}

    def take(self, parts: Mapping[str, Tensor]) -> None:
        """Read a LoRA, whatever its alpha."""
        scale = float(parts["alpha"]) / self.lora_dim / (float(self.alpha) / self.block_count)
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
        for number, (own_up, own_down) in enumerate(zip(self.up_list, self.down_list)):
            rows = slice(number * self.block_size, (number + 1) * self.block_size)
            own_up.copy_(up[:, rows] if scale == 1 else up[:, rows] * scale)
            own_down.copy_(down[rows])


STEADY: dict[str, type] = {"full": SteadyFull, "dylora": SteadyDyLora}


@contextmanager
def steady_modules() -> Iterator[None]:
    """Let the library make these modules in place of its own, for the length of a block."""
    before = {name: network_module_dict[name] for name in STEADY}
    network_module_dict.update(STEADY)
    try:
        yield
    finally:
        network_module_dict.update(before)

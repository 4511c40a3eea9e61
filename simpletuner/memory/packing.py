"""Move a denoiser's blocks into slabs of main memory, and give them what they need to be streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.memory.parts import made_of, parts_of
from simpletuner.memory.ring import Block, Weight
from simpletuner.memory.slabs import aligned, allocate, plan_slabs


def frozen_weights(network: nn.Module, block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights of a block that can be streamed: its frozen matrices and kernels, with the modules that hold them.

    Biases and the like are too small to be worth a copy. What is trained stays where the optimizer has it, and what is shared with another
    block has no place of its own.
    """
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    return [
        (module, name)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and not parameter.requires_grad and uses[id(parameter)] == 1
    ]


@dataclass(slots=True, eq=False)
class _Moving:
    """A weight on its way into main memory."""

    module: nn.Module
    name: str
    parts: list[Tensor]
    """The plain tensors that it is made of, each in its slab once it is there."""
    sources: dict[int, Tensor]
    """The bytes of those that are there, by their numbers."""

    @property
    def parameter(self) -> nn.Parameter:
        """What its module has now."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found

    def put(self, number: int, data: Tensor) -> None:
        """Copy a part into bytes of a slab. The last one lets go of what the module had."""
        self.sources[number] = data
        self.parts[number] = like(self.parts[number], data).copy_(self.parts[number])
        if len(self.sources) == len(self.parts):
            self.module._parameters[self.name] = made_of(self.parameter, self.parts)


@torch.no_grad()
def pack_blocks(network: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device, folder: Path | None = None) -> list[Block]:
    """Move the frozen weights of blocks into main memory, from wherever they are, slab by slab: no more than one slab is there twice.

    Args:
        blocks: by their names.
        device: where they are to compute.
        folder: keeps the slabs in files there.

    Returns:
        Those that have any.

    Raises:
        MemoryLimitError: main memory, or the disk, is too small.
    """
    weights = {
        name: [_Moving(module, key, parts_of(module._parameters[key]), {}) for module, key in frozen_weights(network, block)]  # type: ignore[arg-type]
        for name, block in blocks.items()
    }
    parts = [(weight, number) for moving in weights.values() for weight in moving for number in range(len(weight.parts))]
    sizes = [weight.parts[number].numel() * weight.parts[number].element_size() for weight, number in parts]
    slabs, places = plan_slabs(sizes)
    for slab, slab_bytes in enumerate(slabs):
        data = allocate(slab_bytes, is_pinned=device.type == "cuda" and folder is None, folder=folder)
        for (weight, number), size, place in zip(parts, sizes, places):
            if place.slab == slab:
                weight.put(number, data[place.start : place.start + size])
    return [_block(name, blocks[name], moving, device) for name, moving in weights.items() if moving]


def _block(name: str, module: nn.Module, weights: Sequence[_Moving], device: torch.device) -> Block:
    """Give a block weights on the device too, and take their memory away again."""
    sources = [weight.sources[number] for weight in weights for number in range(len(weight.parts))]
    *starts, size = accumulate((aligned(source.numel()) for source in sources), initial=0)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    left = iter([memory[start : start + source.numel()] for start, source in zip(starts, sources)])
    made = []
    for weight in weights:
        views = [like(part, next(left)) for part in weight.parts]
        on_device = made_of(weight.parameter, views)
        assert [part.data_ptr() for part in parts_of(on_device)] == [view.data_ptr() for view in views], "a weight that copies what it is made of"
        made.append(Weight(weight.module, weight.name, weight.parameter, on_device))
    storage = memory.untyped_storage()
    unversioned = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
    storage.resize_(0)
    return Block(name, module, made, sources, starts, unversioned)


def like(part: Tensor, data: Tensor) -> Tensor:
    """Bytes seen as a tensor of the same dtype, shape and order of axes as another."""
    strides = torch.empty_like(part, device="meta").stride()
    return data.view(part.dtype).as_strided(part.size(), strides)

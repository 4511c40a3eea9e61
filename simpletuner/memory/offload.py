"""Offload: which blocks of a frozen denoiser wait in main memory until they compute, and where each layer rests.

All of it goes through one ring. The group offload of diffusers is made for sampling: under gradient checkpointing it brings block after block
back onto the accelerator on the way back and takes none away, and what is trained inside the blocks it moves off with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError
from simpletuner.memory.packing import frozen_weights, pack_blocks
from simpletuner.memory.parts import bytes_of
from simpletuner.memory.ring import CudaLane, Lane, Ring, Weight
from simpletuner.memory.slabs import ALIGNMENT_BYTES, aligned
from simpletuner.options.memory import size_in_bytes

if TYPE_CHECKING:
    from simpletuner.options.memory import Memory

ROOM = 2
"""Blocks on the accelerator at a time: one that computes and one that comes."""
GAPS_BYTES = 3 * ALIGNMENT_BYTES
"""The most that is left free between the parts of a quantised weight, which are four at most."""

WeightBytes = Callable[[str, Tensor], int]
"""A parameter's name and the parameter, to the bytes that it has in its final precision."""


def own_bytes(name: str, weight: Tensor) -> int:
    return bytes_of(weight)


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a denoiser is built of, by their names, in the order in which it lists them.

    Of the classes that a model of diffusers names as its repeated ones; where it names none, the items of its outermost lists.
    """
    kinds = set(getattr(network, "_repeated_blocks", None) or ())
    found: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(module).__name__ in kinds if kinds else name.rpartition(".")[0] in lists:
            found[name] = module
        elif isinstance(module, nn.ModuleList):
            lists.append(name)
    return found


def is_asked_for(options: Memory) -> bool:
    return bool(options.blocks_to_swap or options.max_resident_weights or options.enable_group_offload)


def places(options: Memory, streamed: int) -> int:
    """Places on the accelerator for blocks that are streamed. Of few blocks one is away in any case, or nothing would be saved."""
    asked = ROOM * options.group_offload_blocks_per_group if options.enable_group_offload else ROOM
    return max(min(streamed, 1), min(asked, streamed - 1))


def spread(count: int, of: int) -> list[int]:
    """Numbers of `count` out of `of` blocks, evenly spaced, so that each copy has the blocks in between to be done in."""
    return [(2 * number + 1) * of // (2 * count) for number in range(count)]


def streamed_blocks(network: nn.Module, options: Memory, weight_bytes: WeightBytes = own_bytes) -> list[str]:
    """Name the blocks that are streamed; none if none is to be.

    Args:
        network: may be on the meta device, and not quantised yet.
        weight_bytes: the bytes of each weight, where they are still to change.

    Raises:
        ConfigError: it has not so many, or even with all of them streamed the rest is too large.
    """
    blocks = list(repeated_blocks(network))
    if not is_asked_for(options):
        return []
    if not blocks:
        raise ConfigError(f"{type(network).__name__} has no repeated blocks that could be offloaded", hint="Leave the offload out.")
    if options.enable_group_offload:
        return blocks
    if options.blocks_to_swap > len(blocks):
        raise ConfigError(
            f"blocks_to_swap {options.blocks_to_swap}: {type(network).__name__} has {len(blocks)} blocks", hint=f"Give at most {len(blocks)}."
        )
    count = options.blocks_to_swap or _count_for(network, blocks, options, weight_bytes)
    return [blocks[number] for number in spread(count, len(blocks))]


def _count_for(network: nn.Module, blocks: Sequence[str], options: Memory, weight_bytes: WeightBytes) -> int:
    """The fewest blocks that have to be streamed for `max_resident_weights`."""
    asked = options.max_resident_weights
    assert asked is not None
    found = footprints(network, blocks, options, weight_bytes)
    least = min(footprint.resident_bytes for footprint in found)
    if least > size_in_bytes(asked):
        raise ConfigError(
            f"max_resident_weights {asked}: of {type(network).__name__} at least {in_words(least)} must be on the accelerator",
            hint="Raise it, or quantise with base_model_precision.",
        )
    return next(count for count, footprint in enumerate(found) if footprint.resident_bytes <= size_in_bytes(asked))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a base takes where."""

    resident_bytes: int
    """On the accelerator, at most."""
    waiting_bytes: int
    """In main memory."""


def footprints(network: nn.Module, blocks: Sequence[str], options: Memory, weight_bytes: WeightBytes = own_bytes) -> list[Footprint]:
    """What a base would take if none of its blocks, one, and so on up to all were streamed. Shapes suffice.

    Args:
        blocks: all of its blocks, by name.
    """
    total = base_bytes(network, weight_bytes)
    sizes = [_streamed_bytes(network, name, weight_bytes) for name in blocks]
    found = []
    for count in range(len(blocks) + 1):
        chosen = [sizes[number] for number in spread(count, len(blocks))]
        waiting = sum(map(sum, chosen))
        place = max((sum(aligned(size) + GAPS_BYTES for size in block) for block in chosen), default=0)
        found.append(Footprint(total - waiting + places(options, count) * place, waiting))
    return found


def base_bytes(network: nn.Module, weight_bytes: WeightBytes = own_bytes) -> int:
    """Bytes of a network's frozen weights and of its buffers."""
    frozen = sum(weight_bytes(name, parameter) for name, parameter in network.named_parameters() if not parameter.requires_grad)
    return frozen + sum(bytes_of(buffer) for buffer in network.buffers())


def _streamed_bytes(network: nn.Module, block: str, weight_bytes: WeightBytes) -> list[int]:
    """Bytes of each weight of a block that can be streamed."""
    names = {module: name for name, module in network.named_modules()}
    found = frozen_weights(network, network.get_submodule(block))
    return [weight_bytes(f"{names[module]}.{name}", getattr(module, name)) for module, name in found]


def placement(network: nn.Module, options: Memory, device: torch.device, weight_bytes: WeightBytes = own_bytes) -> Callable[[str], torch.device]:
    """Give what says of a layer or weight, by its name, where a loader puts it, so that what is streamed is never on the accelerator as a whole.

    Args:
        network: the denoiser, without an adapter; may be on the meta device.
        weight_bytes: the bytes of each weight in its final precision, which decide where `max_resident_weights` is set.

    Raises:
        ConfigError: as `streamed_blocks`.
    """
    names = tuple(f"{name}." for name in streamed_blocks(network, options, weight_bytes))
    return lambda name: torch.device("cpu") if f"{name}.".startswith(names) else device


def check_offload(network: nn.Module, options: Memory, device: torch.device) -> None:
    """Refuse what can be refused of a denoiser without numbers.

    Raises:
        ConfigError: fewer blocks than are to be swapped, or a device without main memory beside its own.
    """
    if not is_asked_for(options):
        return
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"weights cannot be offloaded from {device.type}: its memory is main memory", hint="Leave the offload out.")
    if not options.max_resident_weights:  # weights may still become smaller
        streamed_blocks(network, options)


class Offload:
    """A denoiser on its device, as far as it is to be there; the rest of it comes block by block."""

    def __init__(self, denoiser: nn.Module, options: Memory, device: torch.device) -> None:
        """Move a denoiser. Its adapter, if it is to have one, is on it and has read from the weights what it must.

        Args:
            denoiser: in its final precision, frozen but for the adapter; its weights may be anywhere.

        Raises:
            ConfigError: as `streamed_blocks`.
            MemoryLimitError: main memory, or the disk, is too small.
        """
        self._denoiser, self._options, self._device = denoiser, options, device
        self.ring: Ring | None = None
        """None if nothing is streamed."""
        names = streamed_blocks(denoiser, options)
        if names:
            self._stream(names)
        else:
            denoiser.to(device)

    def more_room(self) -> bool:
        """Have more blocks streamed, as many again as are already; whether there were any left. For when memory runs out."""
        streamed = {block.name for block in self.ring.blocks} if self.ring else set()
        rest = [name for name in repeated_blocks(self._denoiser) if name not in streamed and self._has_weights(name)]
        if not rest:
            return False
        count = min(len(rest), max(1, len(streamed), (len(rest) + len(streamed)) // 4))
        self._stream([rest[number] for number in spread(count, len(rest))])
        return True

    def said(self) -> list[str]:
        """What is streamed, in words, and what of the options is so in any case."""
        one_by_one = "enable_model_cpu_offload: text encoders, VAE and denoiser are loaded one after the other in any case"
        return [*self._said_of_blocks(), *([one_by_one] if self._options.enable_model_cpu_offload else [])]

    def _said_of_blocks(self) -> list[str]:
        if self.ring is None:
            return []
        count, of = len(self.ring.blocks), len(repeated_blocks(self._denoiser))
        blocks = "1 block waits" if count == 1 else f"{count} of {of} blocks wait"
        where = "on a disk" if self._options.group_offload_to_disk_path else "in main memory"
        said = [f"{blocks} {where} ({in_words(self.waiting_bytes)}); {in_words(self.resident_bytes)} of the base are on the {self._device.type}"]
        if self._device.type == "cpu":
            said.append("offload saves nothing here: the model computes on the CPU, whose memory is main memory")
        elif count == self.ring.room:
            said.append("a block that waits alone is never away: let more of them wait")
        return said

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the weights that rest in main memory."""
        return sum(block.bytes for block in self.ring.blocks) if self.ring else 0

    @property
    def resident_bytes(self) -> int:
        """The most bytes of the base that are on the device at a time: what stays, and the places of those that come."""
        came = self.ring.room * self.ring.place_bytes if self.ring else 0
        return base_bytes(self._denoiser) - self.waiting_bytes + came

    def _has_weights(self, name: str) -> bool:
        return bool(frozen_weights(self._denoiser, self._denoiser.get_submodule(name)))

    def _stream(self, names: Sequence[str]) -> None:
        """Stream these blocks besides those that are streamed already."""
        known = {block.name: block for block in self.ring.blocks} if self.ring else {}
        if self.ring is not None:
            self.ring.close()
        modules = repeated_blocks(self._denoiser)
        new = pack_blocks(self._denoiser, {name: modules[name] for name in names}, self._device, self._options.group_offload_to_disk_path)
        known |= {block.name: block for block in new}
        self._move_rest([weight for block in known.values() for weight in block.weights])
        lane = CudaLane(self._device) if self._device.type == "cuda" else Lane()
        blocks = [known[name] for name in modules if name in known]
        self.ring = Ring(self._denoiser, blocks, places(self._options, len(blocks)), lane) if blocks else None

    def _move_rest(self, streamed: Sequence[Weight]) -> None:
        """Move all else, each kind of weight by its own rules."""
        for weight in streamed:
            weight.module._parameters[weight.name] = None
        self._denoiser.to(self._device)
        for weight in streamed:
            weight.show(weight.host)


def in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

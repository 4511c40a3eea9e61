"""Ways for blocks to come to a device that find out what the real one would hide."""

from __future__ import annotations

from simpletuner.memory.ring import Block, Lane

POISON = 255
"""In every byte of a float, of any width, it is no number."""


class StrictLane(Lane):
    """Copies as late as it may, and leaves no numbers behind: whoever reads weights before they are waited for, or after they are gone, gets NaN."""

    def __init__(self) -> None:
        self.filled: list[str] = []
        """Names of the blocks that were copied, in order."""
        self._late: set[Block] = set()

    def fill(self, block: Block, size: int) -> None:
        storage = block.memory.untyped_storage()
        assert size >= block.memory.numel()
        storage.resize_(size)  # at the first time alone: a crash would tell less than a NaN
        block.memory.fill_(POISON)
        self.filled.append(block.name)
        self._late.add(block)

    def wait(self, block: Block) -> None:
        if block in self._late:
            self._late.remove(block)
            super().fill(block, block.memory.untyped_storage().nbytes())

    def empty(self, block: Block) -> None:
        self._late.discard(block)
        block.memory.fill_(POISON)

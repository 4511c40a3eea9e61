"""A batch that goes through the denoiser in parts, with the randomness of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from simpletuner.types import Batch

WHOLE = slice(None)
"""All samples of a batch."""


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch, without copying."""

    if rows == WHOLE:
        return batch

    def some(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in tensors.items()}

    return replace(
        batch,
        samples=batch.samples[rows],
        prompts=batch.prompts[rows],
        latents=some(batch.latents),
        text=some(batch.text),
        mask=None if batch.mask is None else batch.mask[rows],
        references=tuple(some(one) for one in batch.references),
    )


@contextmanager
def drawn_as_whole(count: int, rows: slice) -> Iterator[None]:
    """Have dropouts draw for a part of a batch what they would have drawn for these samples in all `count` of it.

    Both passes must be inside, since checkpointing draws again in the backward pass; and each part starts from the seed of the whole.
    """
    if rows == WHOLE:
        yield
        return
    dropout = F.dropout

    def of_whole(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        samples = rows.stop - rows.start
        if not training or p == 0 or input.shape[0] % samples:
            return dropout(input, p, training, inplace)
        each = input.shape[0] // samples  # of some layers' inputs the first axis holds the tokens of all samples
        kept = dropout(input.new_ones(count * each, *input.shape[1:]), p)
        return input * kept[rows.start * each : rows.stop * each]

    # In place of PyTorch's own: a TorchFunctionMode is not there while a backward pass runs, nor is it in the engine's threads.
    F.dropout = of_whole
    try:
        yield
    finally:
        F.dropout = dropout


def parts_of(count: int, at_once: int) -> list[slice]:
    """The rows of each part of `count` samples, of at most so many; one that is the whole is `WHOLE`."""
    if at_once >= count:
        return [WHOLE]
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]

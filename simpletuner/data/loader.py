"""Cached tensors to batches, from any position of the stream, read ahead of whoever trains on them.

Which caption a sample shows, in which version, and whether it is dropped, is a function of the seed, the sample, and how often it
was drawn before: without repeats that is the epoch, with them each draw of an epoch chooses anew.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.data.crops import drawn_crop
from simpletuner.data.sampler import Sampler
from simpletuner.data.variation import Expansion, Variation
from simpletuner.errors import DatasetError
from simpletuner.randomness import seed_from
from simpletuner.types import Batch, Sample

UNUSABLE_BATCHES = 100
"""Batches without any usable image after which a run ends; images are found to be unusable while training with on-demand caching only."""
READERS = 4
"""Threads that read ahead, at most: enough to hide the latency of a network disk."""


class LatentSource(Protocol):
    """Where latents come from; a LatentCache is one."""

    def read_batch(self, samples: Sequence[Sample]) -> Sequence[Mapping[str, Tensor] | None]:
        """Tensors of samples of one dataset and one bucket, of pictures `mean` and `std`, (C, h, w) each; None is an image to be left out."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What goes along with the pictures of a dataset: its masks, or one of its sets of references."""

    is_mask: bool
    of: Callable[[Sample], Sample]
    """A picture's companion, cut as that is."""
    rows: LatentSource
    """Of companions: `mask` (1, h, w), or `mean` and `std` of a reference."""
    digest: str
    """Identity of all its files."""


class TextSource(Protocol):
    """Where embeddings come from; an EmbedCache is one."""

    def read(self, prompt: str) -> Mapping[str, Tensor]:
        """A prompt's tensors, without a batch axis."""


@dataclass(frozen=True, slots=True)
class Readable:
    """One sample of a batch, with all that was read for it."""

    sample: Sample
    draw: int
    tensors: Sequence[Mapping[str, Tensor]]
    """Latents, then what goes along."""


def as_it_is(batch: Batch, number: int) -> Batch:
    return batch


class Loader:
    """The stream of batches of a run."""

    def __init__(
        self,
        sampler: Sampler,
        latents: LatentSource,
        embeds: TextSource,
        *,
        caption_dropout: float,
        seed: int,
        variations: Mapping[str, Variation] = MappingProxyType({}),
        besides: Mapping[str, Sequence[Beside]] = MappingProxyType({}),
        mask_probability: float = 1.0,
        prefetch: int = 4,
    ) -> None:
        """
        Args:
            caption_dropout: probability that a draw is trained with the empty prompt.
            variations: dataset id to the versions of its captions; of other datasets they are shown as they are.
            besides: dataset id to what goes along with its pictures.
            mask_probability: that a draw is trained with its mask, where it has one.
            prefetch: batches read ahead by threads; 0 reads when asked. The batches are the same.
        """
        self._sampler, self._latents, self._embeds = sampler, latents, embeds
        self._caption_dropout, self._seed, self._variations = caption_dropout, seed, variations
        self._besides, self._mask_probability = besides, mask_probability
        self._prefetch = prefetch

    def iterate(
        self, position: int = 0, stride: int = 1, count: int | None = None, make_ready: Callable[[Batch, int], Batch] = as_it_is
    ) -> Generator[Batch, None, None]:
        """Give the batches at position, position + stride, position + 2 stride, ...

        What goes wrong while reading ahead is raised here, at the batch it belongs to. Closing the generator stops the threads.

        Args:
            position: in the stream of all processes: with n of them, process r takes every n-th batch from its r-th on.
            stride: the number of processes.
            count: batches to give; without end if not given.
            make_ready: what is done with each before it is asked for; called from several threads, with the number of batches before it.
        """
        numbers = islice(count_from(), count)

        def read(number: int) -> Batch:
            return make_ready(self.batch_at(position + number * stride), number)

        if not self._prefetch:
            yield from map(read, numbers)
            return
        pool = ThreadPoolExecutor(min(self._prefetch, READERS), thread_name_prefix="batch-reader")
        try:
            ahead: deque[Future[Batch]] = deque(pool.submit(read, one) for one in islice(numbers, self._prefetch))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(read, one) for one in islice(numbers, 1))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch_at(self, position: int) -> Batch:
        """The batch at one position of the stream. Safe to call from several threads."""
        readable = self._readable(position)
        return self._batch(readable, tuple(self._prompt(row.sample, row.draw) for row in readable))

    def batch_of(self, sample: Sample) -> Batch | None:
        """One held-out sample, without mask, and with the same caption in every run; None if its image is unusable."""
        references = [beside for beside in self._besides.get(sample.backend, ()) if not beside.is_mask]
        readable = self._read([sample], [0], references)
        prompt = prompt_of(sample, 0, 0.0, 0, self._variations.get(sample.backend))
        return self._batch(readable, (prompt,)) if readable else None

    def _batch(self, readable: Sequence[Readable], prompts: tuple[str, ...]) -> Batch:
        samples = tuple(row.sample for row in readable)
        text = self._stack([self._embeds.read(prompt) for prompt in prompts])
        latents, *others = (self._stack(column) for column in zip(*(row.tensors for row in readable)))
        masks = [other["mask"] for other in others if "mask" in other]  # of a dataset with masks, one
        references = tuple(other for other in others if "mask" not in other)
        return Batch(samples, prompts, latents, text, masks[0] if masks else None, references)

    def _readable(self, position: int) -> list[Readable]:
        """The samples of a batch without those that turned out to be unusable; of the next batch, if none is left."""
        for one in range(position, position + UNUSABLE_BATCHES):
            plan = self._sampler.at(one)
            samples = tuple(drawn_crop(sample, draw, self._seed) for sample, draw in zip(plan.samples, plan.draws))
            if kept := self._read(samples, plan.draws, self._besides.get(plan.group, ())):
                return kept
        raise DatasetError(f"{UNUSABLE_BATCHES} batches in a row hold no usable image", hint="Start the same command again: it skips them now.")

    def _read(self, samples: Sequence[Sample], draws: Sequence[int], besides: Sequence[Beside]) -> list[Readable]:
        """Latents of samples of one dataset and one bucket, and what goes along; without those of which something is unusable."""
        columns = [self._latents.read_batch(samples), *(self._read_beside(samples, draws, beside) for beside in besides)]
        return [Readable(sample, draw, row) for sample, draw, *row in zip(samples, draws, *columns) if all(part is not None for part in row)]

    def _read_beside(self, samples: Sequence[Sample], draws: Sequence[int], beside: Beside) -> Sequence[Mapping[str, Tensor] | None]:
        """What goes along with these samples; a mask that is left out of a draw counts everything."""
        rows = beside.rows.read_batch([beside.of(sample) for sample in samples])
        if not beside.is_mask:
            return rows
        return [
            row if row is None or self._is_masked(sample, draw) else {"mask": torch.ones_like(row["mask"])}
            for row, sample, draw in zip(rows, samples, draws)
        ]

    def _is_masked(self, sample: Sample, draw: int) -> bool:
        return seed_from("mask", self._seed, sample.id, draw) < self._mask_probability * 2**63

    def locate(self, position: int) -> tuple[int, int]:
        """Tell which epoch a position lies in, and which batch of it that is."""
        return self._sampler.locate(position)

    def windowed_position(self, step: int) -> int | None:
        """Where the stream stands after so many optimizer steps, if datasets take part by steps; None if none does."""
        return self._sampler.windowed_position(step)

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch, over all processes."""
        return self._sampler.batches_per_epoch(epoch)

    def digest(self) -> str:
        """Identity of everything that this loader's batches depend on, besides the encoders."""
        parts: list[object] = [self._sampler.digest(), self._seed, self._caption_dropout]
        trained = set(self._sampler.names)  # what is held out has no part in them
        parts += [item for item in sorted(self._variations.items(), key=lambda item: item[0]) if item[0] in trained]
        for name in sorted(trained & self._besides.keys()):
            parts += [(name, one.digest, self._mask_probability if one.is_mask else None) for one in self._besides[name]]
        return hashlib.blake2b(repr(tuple(parts)).encode(), digest_size=16).hexdigest()

    def _prompt(self, sample: Sample, draw: int) -> str:
        return prompt_of(sample, draw, self._caption_dropout, self._seed, self._variations.get(sample.backend))

    def _stack(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def prompt_of(sample: Sample, draw: int, caption_dropout: float, seed: int, variation: Variation | None = None) -> str:
    """The prompt that a sample is trained with at its draw number `draw`, counted from 0 over the whole run."""
    if seed_from("caption dropout", seed, sample.id, draw) < caption_dropout * 2**63:
        return ""
    caption = sample.captions[seed_from("caption", seed, sample.id, draw) % len(sample.captions)]
    if variation is None:
        return caption
    numbers = variation.numbers
    return variation.version(caption, numbers[seed_from("caption version", seed, sample.id, draw) % len(numbers)])


def prompts_of(expansions: Iterable[Expansion], caption_dropout: float) -> dict[str, str]:
    """Every prompt that batches of these datasets can ever ask for, each once, with the caption of which it is a version."""
    prompts: dict[str, str] = {}
    for expansion in expansions:
        for prompt, caption in expansion.prompts.items():
            prompts.setdefault(prompt, caption)
    if caption_dropout > 0:
        prompts.setdefault("", "")
    return prompts

"""The VAE cache: the posterior of every image's latents, made once, read at each step.

What an entry depends on is its key: the image's bytes, its resized size and crop, and the VAE. Nothing else is, so that an
edited image, another crop or another VAE makes new entries and leaves the others alone. An image that was never read whole
has no key yet: it is read, and encoded only if its bytes turn out to be new.

A latent must not depend on which images were encoded along with it, or a fill that was interrupted would end with other
bytes than one that was not. Measured for AutoencoderKL in float32 on CPUs: images in batches of 2 and more come out bit for
bit alike, a batch of 1 differs by 1e-6, since oneDNN has other convolutions for it. A lone image is therefore encoded as a
pair with itself, unless the batch size is 1. On accelerators no such promise exists.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.console import Bar
from simpletuner.data.buckets import by_bucket
from simpletuner.data.contents import SetAside
from simpletuner.data.row_encoder import Row, RowEncoder, is_finite
from simpletuner.data.store import DamagedEntry, NewEntry, Store, key_of
from simpletuner.data.write_behind import WriteBehind
from simpletuner.errors import DatasetError
from simpletuner.types import Sample

CODE_VERSION = 1
"""Part of every key; raised whenever pixels come to be read, resized or encoded otherwise than before."""
DECODERS = 8
"""Threads that read images, at most; PIL lets go of the interpreter while it decodes and resizes."""
NAMED = 100
"""Images that an error names; of more it gives the count."""


class Images(Protocol):
    """Where images come from; an ImageReader is one."""

    def content(self, sample: Sample) -> str:
        """Digest of an image's bytes; empty if it was never read."""

    def open(self, sample: Sample) -> tuple[str, Callable[[], Tensor]]:
        """Read an image: the digest of its bytes, and a call that decodes them to (3, H, W) in [-1, 1]. Called from many threads.

        Both raise SetAside if the image is to be skipped, DatasetError or OSError if it cannot be read.
        """

    def save(self) -> None:
        """Write down what was learned."""


@dataclass(frozen=True, slots=True)
class Made:
    """An image on its way to the encoder."""

    sample: Sample
    key: str
    pixels: Tensor
    """(3, H, W)."""


Decoding = list[tuple[Sample, Callable[[], Made | None]]]
"""Samples of one bucket, each with a call that waits for it; None is one whose latents are there already."""


class Claims:
    """The keys that are there or being made, by store: what two samples share is made once. Safe to use from many threads."""

    def __init__(self, held: Mapping[str, set[str]]) -> None:
        """
        Args:
            held: the keys that are there, by identity of the store.
        """
        self._held = held
        self._lock = threading.Lock()

    def are_taken(self, store: Store, key: str) -> bool:
        """Whether an entry is there or somebody else makes it; if not, the caller is to make it."""
        with self._lock:
            is_taken = key in self._held[store.identity]
            self._held[store.identity].add(key)
            return is_taken


class LatentCache:
    """Latents of samples: from disk where they are, from the VAE where not. Holds no VAE: `encode` may bring one back."""

    def __init__(
        self,
        store: Store | Callable[[Sample], Store | None] | None,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        fingerprint: str,
        images: Images,
        batch_size: int,
        *,
        warn: Callable[[str], None],
        is_ondemand: bool = False,
        noun: str = "latents",
    ) -> None:
        """
        Args:
            store: where latents are kept, for all samples or by sample; None keeps none and encodes at each reading.
            encode: (B, 3, H, W) in [-1, 1] to raw `mean` and `std`, (B, C, h, w) each.
            fingerprint: identity of the VAE.
            batch_size: images encoded at once.
            warn: told of entries that had to be made again, and of a batch size that did not fit.
            noun: what the entries are called.
            is_ondemand: entries are expected to be missing and are kept when first read.
        """
        self._store_of = store if callable(store) else lambda _: store
        self._encode, self._fingerprint, self._images = encode, fingerprint, images
        self._warn, self._is_ondemand, self._noun = warn, is_ondemand, noun
        self._skipped: set[str] = set()
        hint = "Set vae_enable_tiling, vae_dtype bf16, or a lower resolution."
        self._encoder: RowEncoder[Tensor] = RowEncoder(self._encode_alike, batch_size, warn, noun="images", option="vae_batch_size", hint=hint)

    def key(self, sample: Sample) -> str:
        """The key of a sample's latents; its bytes must have been read."""
        content = self._images.content(sample)
        assert content, f"{sample.id} was never read"
        resized, crop = sample.geometry.resized, sample.geometry.crop
        window = f"{crop.left},{crop.top},{crop.width},{crop.height}"
        return key_of(kind="latents", version=CODE_VERSION, vae=self._fingerprint, image=content, resized=str(resized), crop=window)

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that have to be encoded, or read to find out: one sample a key and store, none where nothing is kept."""
        return self._look(samples)[0]

    def used(self, samples: Sequence[Sample]) -> dict[str, set[str]]:
        """The keys of samples that were read, by identity of the store."""
        used: dict[str, set[str]] = {}
        for sample in samples:
            store = self._store_of(sample)
            if store is not None and self._images.content(sample):
                used.setdefault(store.identity, set()).add(self.key(sample))
        return used

    def _look(self, samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, set[str]]]:
        """Those that are missing, and the keys that are there, by identity of the store."""
        held: dict[str, set[str]] = {}
        found: dict[tuple[str, str | Sample], Sample] = {}
        for sample in samples:
            store = self._store_of(sample)
            if store is None:
                continue
            if store.identity not in held:
                held[store.identity] = store.keys()
            key = self.key(sample) if self._images.content(sample) else sample
            if key not in held[store.identity]:
                found.setdefault((store.identity, key), sample)
        return list(found.values()), held

    def fill(self, samples: Sequence[Sample], bar: Bar | None = None) -> None:
        """Encode and keep what is missing; images are decoded ahead of the encoder and entries written behind it.

        An image that turns out to be damaged, or of another size, is left out: the index knows of it when this returns.

        Raises:
            UnusableImages: some images cannot be read or encoded; all of them are named, and all others are cached.
            MemoryLimitError: one image is too much for the VAE, or the disk is full; what was made is kept.
        """
        samples, held = self._look(samples)
        for store in {self._store_of(sample) for sample in samples}:
            if store is not None:
                store.sweep()
        problems: dict[Sample, str] = {}
        try:
            with WriteBehind(self._encoder.batch_size) as writer, closing(self._decoded(samples, Claims(held))) as batches:
                for batch in batches:
                    for made, row in self._rows(batch, problems, {}):
                        kept_in = self._store_of(made.sample)
                        assert kept_in is not None
                        writer.put(kept_in, made.key, row, self._describe(made.sample))
                    if bar is not None:
                        bar.advance(len(batch))
        finally:
            self._images.save()
        if problems:
            raise UnusableImages(problems, len(samples))

    def read(self, sample: Sample) -> Row:
        """The latents of one sample whose image can be used."""
        [row] = self.read_batch([sample])
        assert row is not None, f"{sample.id} was set aside"
        return row

    def read_batch(self, samples: Sequence[Sample]) -> list[Row | None]:
        """The latents of samples of one bucket: `mean` and `std`, float32, (C, h, w) each.

        What is missing or damaged is encoded together, and kept. None stands for an image that turned out to be unusable.

        Raises:
            UnusableImages: an image has to be encoded and cannot be read, or the VAE's answer is unusable.
        """
        rows = {sample: self._stored(sample) for sample in samples}
        absent = [sample for sample, row in rows.items() if row is None]
        if absent:
            rows |= self._make(absent)
        return [rows[sample] for sample in samples]

    def _stored(self, sample: Sample) -> Row | None:
        store = self._store_of(sample)
        if store is None or not self._images.content(sample):
            return None
        try:
            return store.get(self.key(sample))
        except KeyError:
            if not self._is_ondemand:
                self._warn(f"the cached {self._noun} of {sample.id} is gone and made again")
        except DamagedEntry as error:
            self._warn(f"the cached {self._noun} of {sample.id} is damaged and made again: {error}")
        return None

    def _make(self, samples: Sequence[Sample]) -> dict[Sample, Row | None]:
        problems: dict[Sample, str] = {}
        unfit: dict[Sample, str] = {}
        # What was never read may be there all the same: it is only now that its key can be known.
        unread = {sample for sample in samples if not self._images.content(sample)}
        made = self._rows([(sample, partial(self._prepare, sample, Store.has if sample in unread else None)) for sample in samples], problems, unfit)
        if problems:
            raise UnusableImages(problems, len(samples))
        for sample, problem in unfit.items():
            if sample.id not in self._skipped:
                self._skipped.add(sample.id)
                self._warn(f"{sample.id} is skipped, {problem}")
        self._keep(made)
        rows: dict[Sample, Row | None] = {one.sample: row for one, row in made}
        there = [sample for sample in samples if sample not in rows and sample not in unfit]
        rows |= {sample: self._stored(sample) for sample in there}
        damaged = [sample for sample in there if rows[sample] is None]
        if damaged:
            rows |= self._make(damaged)  # they have been read now, so that their entries are not looked for again
        return {sample: rows.get(sample) for sample in samples}

    def _keep(self, made: Sequence[tuple[Made, Row]]) -> None:
        """Write what was made, of one store together."""
        entries: dict[str, tuple[Store, list[NewEntry]]] = {}
        for one, row in made:
            store = self._store_of(one.sample)
            if store is not None:
                entries.setdefault(store.identity, (store, []))[1].append((one.key, row, self._describe(one.sample)))
        for store, several in entries.values():
            store.put_many(several)

    def _prepare(self, sample: Sample, is_done: Callable[[Store, str], bool] | None) -> Made | None:
        """Read and decode one image; None if its entry turns out to be there.

        Args:
            is_done: tells of a store and a key whether nothing needs to be made.
        """
        _, pixels = self._images.open(sample)
        store = self._store_of(sample)
        if store is None:
            return Made(sample, "", pixels())
        key = self.key(sample)
        return None if is_done is not None and is_done(store, key) else Made(sample, key, pixels())

    def _decoded(self, samples: Sequence[Sample], claims: Claims) -> Generator[Decoding, None, None]:
        """Batches of one bucket each, while a bounded number of images behind them is being decoded."""
        size = self._encoder.batch_size
        workers = min(DECODERS, os.cpu_count() or 1)
        ahead = 1 + math.ceil(workers / size)  # batches; fewer would let a worker or the encoder wait
        waiting: deque[Decoding] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="image-reader")
        try:
            for bucket in by_bucket(samples).values():
                for start in range(0, len(bucket), size):
                    batch = bucket[start : start + size]
                    waiting.append([(sample, pool.submit(self._prepare, sample, claims.are_taken).result) for sample in batch])
                    if len(waiting) > ahead:
                        yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, batch: Decoding, problems: dict[Sample, str], unfit: dict[Sample, str]) -> list[tuple[Made, Row]]:
        """Encode those of a batch that have to be; what cannot be read goes to `problems`, what is to be skipped to `unfit`."""
        ready: list[Made] = []
        for sample, decode in batch:
            try:
                made = decode()
            except SetAside as error:
                unfit[sample] = error.message
            except DatasetError as error:
                problems[sample] = error.message
            except OSError as error:
                problems[sample] = str(error)
            else:
                ready += [] if made is None else [made]
        if not ready:
            return []
        answers = self._encoder.rows(torch.stack([made.pixels for made in ready]))
        rows = [{name: tensor.float() for name, tensor in row.items()} for row in answers]
        for made, row in zip(ready, rows):
            if not is_finite(row):
                problems[made.sample] = "the VAE's answer is not finite; vae_dtype fp32 or bf16 does not overflow"
        return [(made, row) for made, row in zip(ready, rows) if made.sample not in problems]

    def _encode_alike(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Encode a batch (B, 3, H, W), a lone image as a pair; see the head of this file."""
        if len(pixels) > 1 or self._encoder.batch_size == 1:
            return self._encode(pixels)
        pair = self._encode(pixels.repeat(2, 1, 1, 1))  # (2, 3, H, W)
        return {name: tensor[:1] for name, tensor in pair.items()}

    def _describe(self, sample: Sample) -> dict[str, str]:
        return {"kind": self._noun, "sample": sample.id, "bucket": str(sample.geometry.bucket), "vae": key_of(vae=self._fingerprint)}


class UnusableImages(DatasetError):
    """Images that cannot become latents, all of them at once."""

    def __init__(self, problems: Mapping[Sample, str], total: int) -> None:
        """
        Args:
            problems: what is wrong with each.
            total: images that were tried.
        """
        self.samples = tuple(problems)
        """The first sample of each unusable image; copies of it are just as unusable."""
        named = "".join(f"\n  {sample.id}: {problem}" for sample, problem in list(problems.items())[:NAMED])
        more = f"\n  and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        super().__init__(
            f"{len(problems)} of {total} images cannot be used:{named}{more}",
            hint="Mend these files or take them out of the dataset. All others are cached.",
        )

"""The VAE cache: the posterior of every image's latents, made once, read at each step.

What an entry depends on is its key: the image's bytes, its resized size and crop, and the VAE. Nothing else is, so that an
edited image, another crop or another VAE makes new entries and leaves the others alone.

A latent must not depend on which images were encoded along with it, or a fill that was interrupted would end with other
bytes than one that was not. Measured for AutoencoderKL in float32 on CPUs: images in batches of 2 and more come out bit for
bit alike, a batch of 1 differs by 1e-6, since oneDNN has other convolutions for it. A lone image is therefore encoded as a
pair with itself, unless the batch size is 1. On accelerators no such promise exists.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.console import Bar
from simpletuner.data.buckets import by_bucket
from simpletuner.data.row_encoder import Row, RowEncoder, is_finite
from simpletuner.data.store import DamagedEntry, Store, WriteBehind, key_of
from simpletuner.errors import DatasetError
from simpletuner.types import Sample

CODE_VERSION = 1
"""Part of every key; raised whenever pixels come to be read, resized or encoded otherwise than before."""
DECODERS = 8
"""Threads that read images, at most; PIL lets go of the interpreter while it decodes and resizes."""
NAMED = 100
"""Images that an error names; of more it gives the count."""

Decoding = list[tuple[Sample, Callable[[], Tensor]]]
"""Samples of one bucket, each with a call that waits for its pixels, (3, H, W)."""


class LatentCache:
    """Latents of samples: from disk where they are, from the VAE where not. Holds no VAE: `encode` may bring one back."""

    def __init__(
        self,
        store: Store | Callable[[Sample], Store | None] | None,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        fingerprint: str,
        read_pixels: Callable[[Sample], Tensor],
        batch_size: int,
        *,
        warn: Callable[[str], None],
        is_ondemand: bool = False,
    ) -> None:
        """
        Args:
            store: where latents are kept, for all samples or by sample; None keeps none and encodes at each reading.
            encode: (B, 3, H, W) in [-1, 1] to raw `mean` and `std`, (B, C, h, w) each.
            fingerprint: identity of the VAE.
            read_pixels: a sample to (3, H, W) in [-1, 1]; raises DatasetError or OSError if it cannot.
            batch_size: images encoded at once.
            warn: told of entries that had to be made again, and of a batch size that did not fit.
            is_ondemand: entries are expected to be missing and are kept when first read.
        """
        self._store_of = store if callable(store) else lambda _: store
        self._encode, self._fingerprint, self._read_pixels = encode, fingerprint, read_pixels
        self._warn, self._is_ondemand = warn, is_ondemand
        hint = "Set vae_enable_tiling or vae_enable_slicing, a smaller vae_dtype, or a lower resolution."
        self._encoder: RowEncoder[Tensor] = RowEncoder(self._encode_alike, batch_size, warn, "vae_batch_size", hint)

    def key(self, sample: Sample) -> str:
        """The key of a sample's latents."""
        resized, crop = sample.geometry.resized, sample.geometry.crop
        window = f"{crop.left},{crop.top},{crop.width},{crop.height}"
        return key_of(kind="latents", version=CODE_VERSION, vae=self._fingerprint, image=sample.content, resized=str(resized), crop=window)

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that have to be encoded: one sample a key and folder, none where nothing is kept."""
        held: dict[Path, set[str]] = {}
        found: dict[tuple[Path, str], Sample] = {}
        for sample in samples:
            store = self._store_of(sample)
            if store is None:
                continue
            if store.folder not in held:
                held[store.folder] = store.keys()
            key = self.key(sample)
            if key not in held[store.folder]:
                found.setdefault((store.folder, key), sample)
        return list(found.values())

    def fill(self, samples: Sequence[Sample], bar: Bar | None = None) -> None:
        """Encode and keep what is missing; images are decoded ahead of the encoder and entries written behind it.

        Raises:
            UnusableImages: some images cannot be used; all of them are named, and all others are cached.
            MemoryLimitError: one image is too much for the VAE, or the disk is full; what was made is kept.
        """
        samples = self.missing(samples)
        for store in {self._store_of(sample) for sample in samples}:
            if store is not None:
                store.sweep()
        problems: dict[Sample, str] = {}
        with WriteBehind(self._encoder.batch_size) as writer, closing(self._decoded(samples)) as batches:
            for batch in batches:
                for sample, row in self._rows(batch, problems):
                    kept_in = self._store_of(sample)
                    assert kept_in is not None
                    writer.put(kept_in, self.key(sample), row, self._describe(sample))
                if bar is not None:
                    bar.advance(len(batch))
        if problems:
            raise UnusableImages(problems, len(samples))

    def read(self, sample: Sample) -> Row:
        """The latents of one sample: `mean` and `std`, float32, (C, h, w) each."""
        return self.read_batch([sample])[0]

    def read_batch(self, samples: Sequence[Sample]) -> list[Row]:
        """The latents of samples of one bucket; what is missing or damaged is encoded together, and kept.

        Raises:
            UnusableImages: an image has to be encoded again and cannot be.
        """
        found = [self._stored(sample) for sample in samples]
        absent = [sample for sample, row in zip(samples, found) if row is None]
        made = iter(self._make(absent))
        return [next(made) if row is None else row for row in found]

    def _stored(self, sample: Sample) -> Row | None:
        store = self._store_of(sample)
        if store is None:
            return None
        try:
            return store.get(self.key(sample))
        except KeyError:
            if not self._is_ondemand:
                self._warn(f"the cached latents of {sample.id} are gone and are made again")
        except DamagedEntry as error:
            self._warn(f"the cached latents of {sample.id} are damaged and are made again: {error}")
        return None

    def _make(self, samples: Sequence[Sample]) -> list[Row]:
        if not samples:
            return []
        problems: dict[Sample, str] = {}
        rows = self._rows([(sample, partial(self._read_pixels, sample)) for sample in samples], problems)
        if problems:
            raise UnusableImages(problems, len(samples))
        for sample, row in rows:
            store = self._store_of(sample)
            if store is not None:
                store.put(self.key(sample), row, self._describe(sample))
        return [row for _, row in rows]

    def _decoded(self, samples: Sequence[Sample]) -> Generator[Decoding, None, None]:
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
                    waiting.append([(sample, pool.submit(self._read_pixels, sample).result) for sample in batch])
                    if len(waiting) > ahead:
                        yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, batch: Decoding, problems: dict[Sample, str]) -> list[tuple[Sample, Row]]:
        """Encode those of a batch that can be read; the others go to `problems`."""
        samples, pixels = [], []
        for sample, decode in batch:
            try:
                pixels.append(decode())
                samples.append(sample)
            except DatasetError as error:
                problems[sample] = error.message
            except OSError as error:
                problems[sample] = str(error)
        if not samples:
            return []
        rows = [{name: tensor.float() for name, tensor in row.items()} for row in self._encoder.rows(torch.stack(pixels))]
        for sample, row in zip(samples, rows):
            assert row.keys() == {"mean", "std"}, "the VAE answers mean and std"
            if not is_finite(row):
                problems[sample] = "the VAE's answer is not finite; vae_dtype fp32 or bf16 does not overflow"
        return [(sample, row) for sample, row in zip(samples, rows) if sample not in problems]

    def _encode_alike(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Encode a batch (B, 3, H, W), a lone image as a pair; see the head of this file."""
        if len(pixels) > 1 or self._encoder.batch_size == 1:
            return self._encode(pixels)
        pair = self._encode(pixels.repeat(2, 1, 1, 1))  # (2, 3, H, W)
        return {name: tensor[:1] for name, tensor in pair.items()}

    def _describe(self, sample: Sample) -> dict[str, str]:
        return {"kind": "latents", "sample": sample.id, "bucket": str(sample.geometry.bucket), "vae": key_of(vae=self._fingerprint)}


class UnusableImages(DatasetError):
    """Images that cannot become latents, all of them at once."""

    def __init__(self, problems: Mapping[Sample, str], total: int) -> None:
        """
        Args:
            problems: what is wrong with each.
            total: images that were tried.
        """
        self.samples = tuple(problems)
        """The first sample of each unusable image; others with the same `content` are just as unusable."""
        named = "".join(f"\n  {sample.id}: {problem}" for sample, problem in list(problems.items())[:NAMED])
        more = f"\n  and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        super().__init__(
            f"{len(problems)} of {total} images cannot be used:{named}{more}",
            hint="Mend these files or take them out of the dataset. All others are cached.",
        )

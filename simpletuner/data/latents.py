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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

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


class LatentCache:
    """Latents of samples: from disk where they are, from the VAE where not. Holds no VAE: `encode` may bring one back."""

    def __init__(
        self,
        store: Store | None | Callable[[Sample], Store | None],
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
        """Those that have to be encoded: one sample a key, none where nothing is kept."""
        held: dict[Store, set[str]] = {}
        found: dict[tuple[Store, str], Sample] = {}
        for sample in samples:
            store = self._store_of(sample)
            if store is None:
                continue
            if store not in held:
                held[store] = store.keys()
            key = self.key(sample)
            if key not in held[store]:
                found.setdefault((store, key), sample)
        return list(found.values())

    def fill(self, samples: Sequence[Sample], bar: Bar | None = None) -> None:
        """Encode and keep what is missing; images are decoded ahead of the encoder and entries written behind it.

        Raises:
            DatasetError: some images cannot be used; all of them are named, and all others are cached.
            MemoryLimitError: one image is too much for the VAE, or the disk is full; what was made is kept.
        """
        samples = self.missing(samples)
        for store in {self._store_of(sample) for sample in samples}:
            if store is not None:
                store.sweep()
        problems: dict[str, str] = {}
        with WriteBehind(self._encoder.batch_size) as writer, closing(self._decoded(samples)) as batches:
            for batch in batches:
                rows = self._rows(batch, problems)
                for sample, row in rows:
                    kept_in = self._store_of(sample)
                    assert kept_in is not None
                    writer.put(kept_in, self.key(sample), row, self._describe(sample))
                if bar is not None:
                    bar.advance(len(batch))
        if problems:
            raise _unusable(problems, len(samples))

    def read(self, sample: Sample) -> Row:
        """The latents of one sample: `mean` and `std`, float32, (C, h, w) each."""
        return self.read_batch([sample])[0]

    def read_batch(self, samples: Sequence[Sample]) -> list[Row]:
        """The latents of samples of one bucket; what is missing or damaged is encoded together, and kept.

        Raises:
            DatasetError: an image that is needed cannot be used.
        """
        found = [self._stored(sample) for sample in samples]
        absent = [sample for sample, row in zip(samples, found) if row is None]
        if not absent:
            return [row for row in found if row is not None]
        problems: dict[str, str] = {}
        made = {sample: row for sample, row in self._rows([(sample, lambda sample=sample: self._read_pixels(sample)) for sample in absent], problems)}
        if problems:
            raise _unusable(problems, len(samples))
        for sample, row in made.items():
            store = self._store_of(sample)
            if store is not None:
                store.put(self.key(sample), row, self._describe(sample))
        return [made[sample] if row is None else row for sample, row in zip(samples, found)]

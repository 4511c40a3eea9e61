"""What the bytes of images say that their headers do not: learned when an image is first read whole, kept in the index.

The index looks at headers only. Whoever makes latents reads each image whole anyway, so that is when its digest becomes
known, and when damage behind the header shows. Both are written down within a second and never looked for again, until the
file changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.data.backend import DataBackend
from simpletuner.data.faults import RULES, Header, look
from simpletuner.data.images import read_pixels
from simpletuner.data.index import COMMIT_SECONDS, digest, open_index, record
from simpletuner.errors import DatasetError
from simpletuner.types import Geometry, Sample, Size

if TYPE_CHECKING:
    from torch import Tensor


class SetAside(DatasetError):
    """An image is not what its header said. The index knows better now: the next look skips it, or gives it its true size."""


class ContentBook:
    """Digests and faults of images, by sample. Safe to use from many threads; several processes may keep one each."""

    def __init__(self, index_folder: Path) -> None:
        """
        Args:
            index_folder: where `discover` keeps the index of each dataset.
        """
        self._folder = index_folder
        self._contents: dict[str, dict[str, str]] = {}
        self._set_aside: dict[str, str] = {}
        self._unwritten: dict[str, list[tuple[str, str, str, Header]]] = {}
        self._written = time.monotonic()
        self._lock = threading.RLock()

    def content(self, sample: Sample) -> str:
        """The digest of an image's bytes; empty if they were never read."""
        return sample.content or self._contents.get(sample.backend, {}).get(sample.name, "")

    def problem(self, sample: Sample) -> str | None:
        """What is wrong with an image that was set aside in this run."""
        return self._set_aside.get(sample.id)

    @property
    def has_set_aside(self) -> bool:
        """Whether samples of this run turned out to be something else, so that datasets must be looked at again."""
        return bool(self._set_aside)

    def learn(self, sample: Sample, content: str, header: Header) -> None:
        """Note what the whole file says; an image of another size than its header said, or with a fault, is set aside."""
        size = Size(header.width, header.height)
        with self._lock:
            self._contents.setdefault(sample.backend, {})[sample.name] = content
            if header.fault is not None:
                self._set_aside[sample.id] = f"{header.fault}: {RULES[header.fault]}"
            elif size != sample.geometry.original:
                self._set_aside[sample.id] = f"it is {size} pixels, its header alone said {sample.geometry.original}"
            self._unwritten.setdefault(sample.backend, []).append((sample.name, sample.fingerprint, content, header))
            if time.monotonic() - self._written > COMMIT_SECONDS:
                self._write()

    def save(self) -> None:
        """Write down all that was learned and is not yet written.

        Raises:
            DatasetError: the index cannot be written.
            MemoryLimitError: the disk is full.
        """
        with self._lock:
            self._write()

    def catch_up(self, samples: Iterable[Sample]) -> None:
        """Take over the digests that other processes learned of these samples."""
        unknown: dict[str, set[tuple[str, str]]] = {}
        for sample in samples:
            if not self.content(sample):
                unknown.setdefault(sample.backend, set()).add((sample.name, sample.fingerprint))
        for backend, names in unknown.items():
            with open_index(self._folder / f"{backend}.sqlite") as index:
                learned = {name: content for name, fingerprint, content in index.contents() if (name, fingerprint) in names}
            self._contents.setdefault(backend, {}).update(learned)

    def _write(self) -> None:
        for backend, learned in self._unwritten.items():
            record(self._folder / f"{backend}.sqlite", learned)
        self._unwritten.clear()
        self._written = time.monotonic()


class ImageReader:
    """The images of a run, read whole when their latents are made."""

    def __init__(
        self, backends: Mapping[str, DataBackend], book: ContentBook, decode: Callable[[bytes, Geometry, str], Tensor] = read_pixels
    ) -> None:
        """
        Args:
            backends: by dataset id.
            decode: makes (C, H, W) of a file's bytes, as `images.read_pixels` does.
        """
        self._backends, self._book, self._decode = backends, book, decode

    def content(self, sample: Sample) -> str:
        return self._book.content(sample)

    def open(self, sample: Sample) -> tuple[str, Callable[[], Tensor]]:
        """Read an image's bytes.

        Returns:
            Their digest, and a call that decodes them to the training picture, (3, H, W) in [-1, 1].

        Raises:
            SetAside: the image cannot be used, or not as its header said; from here on or from the call.
            DatasetError: it cannot be read, or is not the one that the run began with.
        """
        if (problem := self._book.problem(sample)) is not None:
            raise SetAside(problem)
        data = self._backends[sample.backend].read(sample.name)
        content, known = digest(data), self._book.content(sample)
        if known and content != known:  # or its latents would be kept under the old picture's key
            raise DatasetError(f"{sample.id} was changed since the run began", hint="Start the same command again.")
        if not known:
            self._book.learn(sample, content, look(data, sample.name))
            if (problem := self._book.problem(sample)) is not None:
                raise SetAside(problem)

        def pixels() -> Tensor:
            try:
                return self._decode(data, sample.geometry, sample.id)
            except DatasetError as error:
                fault = "truncated" if "truncated" in error.message.lower() else "broken"
                self._book.learn(sample, content, Header(fault=fault))
                raise SetAside(f"{fault}: {RULES[fault]} ({error.message})", hint=error.hint) from error

        return content, pixels

    def save(self) -> None:
        """Write down what was learned of images."""
        self._book.save()

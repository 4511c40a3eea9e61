"""Entries that say where caches are kept: `text_embeds` and `image_embeds`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.data.backend import DatasetOptions, EntryOptions
from simpletuner.data.bucket import BucketOptions
from simpletuner.data.cache_place import BucketPlace, CachePlace, LocalPlace
from simpletuner.data.checks import validate
from simpletuner.data.entries import Findings
from simpletuner.data.keys import IDLE_CACHE
from simpletuner.errors import choose

CACHES = ("text_embeds", "image_embeds")
"""Values of `dataset_type` that are meant here; each is also the key by which a dataset names such an entry."""


class CacheOptions(EntryOptions):
    """Keys of an entry that says where a cache is kept."""

    cache_dir: str | None = None
    """The folder. In a bucket: below `aws_data_prefix`."""

    def problems(self) -> Iterator[str]:
        """Say what is wrong between these keys."""
        yield from ()


class TextEmbedsOptions(CacheOptions):
    """Keys of a `text_embeds` entry: where text embeddings are cached."""

    default: bool = False
    """Whether datasets that name none use this one."""
    caption_filter_list: tuple[Any, ...] | str = ()
    """What is taken out of captions, or replaced: a list, or the path of a .txt or .json file."""


class ImageEmbedsOptions(CacheOptions):
    """Keys of an `image_embeds` entry: where latents are cached, each dataset's in a folder of its own."""


class BucketCacheOptions(CacheOptions, BucketOptions):
    """Keys of a cache in a bucket."""

    shard_cache_gb: float = 50.0
    """Gigabytes of this machine's disk for copies of what is in the bucket; 0 keeps none."""

    def problems(self) -> Iterator[str]:
        yield from self.bucket_problems()
        if self.shard_cache_gb < 0:
            yield f"shard_cache_gb is {self.shard_cache_gb:g}; it must be 0 or more"
        if fault := folder_fault(self.cache_dir or ""):
            yield f"cache_dir is {self.cache_dir!r}, {fault}"


class BucketTextEmbedsOptions(BucketCacheOptions, TextEmbedsOptions):
    """Keys of a `text_embeds` entry in a bucket."""


class BucketImageEmbedsOptions(BucketCacheOptions, ImageEmbedsOptions):
    """Keys of an `image_embeds` entry in a bucket."""


KINDS: dict[tuple[str, str], type[CacheOptions]] = {
    ("text_embeds", "local"): TextEmbedsOptions,
    ("text_embeds", "aws"): BucketTextEmbedsOptions,
    ("image_embeds", "local"): ImageEmbedsOptions,
    ("image_embeds", "aws"): BucketImageEmbedsOptions,
}
"""`dataset_type` and `type` to the keys that such an entry may have."""


@dataclass(frozen=True, slots=True)
class CacheEntries:
    """All enabled entries about caches, and where each dataset's are by them."""

    texts: tuple[TextEmbedsOptions, ...]
    images: tuple[ImageEmbedsOptions, ...]
    cache_dir: Path
    """Of config.json."""
    family: str

    @property
    def default_text(self) -> TextEmbedsOptions | None:
        """The entry for whoever names none: the default one, else the first."""
        return next(iter([*(text for text in self.texts if text.default), *self.texts]), None)

    def text_place(self, written: DatasetOptions | None = None) -> CachePlace:
        """Where embeddings are cached: a dataset's, or those that belong to none."""
        wanted = written.text_embeds if written else None
        entry = next((text for text in self.texts if text.id == wanted), self.default_text)
        return self._place(entry, entry.cache_dir if entry else None, f"text/{self.family}")

    def latents_place(self, written: DatasetOptions) -> CachePlace:
        """Where what is made of a dataset's pictures is cached."""
        entry = next((image for image in self.images if image.id == written.image_embeds), None)
        own = f"{entry.cache_dir.rstrip('/')}/{written.id}" if entry and entry.cache_dir else None
        return self._place(entry, written.cache_dir_vae or own, f"vae/{self.family}/{written.id}")

    def _place(self, entry: CacheOptions | None, folder: str | None, usual: str) -> CachePlace:
        """
        Args:
            folder: as it is written, if it is.
            usual: below `cache_dir` of config.json, or in the bucket.
        """
        if isinstance(entry, BucketCacheOptions):
            facts = "\0".join([entry.aws_endpoint_url or "", entry.aws_bucket_name, entry.aws_data_prefix.strip("/")])
            root = self.cache_dir / "buckets" / f"{entry.aws_bucket_name}-{hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()}"
            return BucketPlace(entry, str(PurePosixPath((folder or usual).strip("/"))), root, round(entry.shard_cache_gb * 1e9))
        return LocalPlace(Path(folder).expanduser() if folder else self.cache_dir / usual)

    def check(self, datasets: Sequence[DatasetOptions], disabled: Collection[str], findings: Findings) -> None:
        """Say what is wrong with the entries that datasets name, and which entries none names.

        Args:
            disabled: ids of entries that are left out.
        """
        for written in datasets:
            findings.problems += [f"dataset {written.id!r}: {problem}" for problem in self._problems(written, disabled)]
        self._note_idle(datasets, findings)

    def _problems(self, written: DatasetOptions, disabled: Collection[str]) -> Iterator[str]:
        for key, wanted, entries in (("text_embeds", written.text_embeds, self.texts), ("image_embeds", written.image_embeds, self.images)):
            known = [entry.id for entry in entries]
            if wanted is not None and wanted in disabled:
                yield f"{key} is {wanted!r}, which is disabled"
            elif wanted is not None and wanted not in known:
                yield f"{key} is {wanted!r}; {choose(wanted, known, f'{key} entries')}"
        is_in_bucket = any(isinstance(image, BucketCacheOptions) and image.id == written.image_embeds for image in self.images)
        if is_in_bucket and (fault := folder_fault(written.cache_dir_vae or "")):
            yield f"cache_dir_vae is {written.cache_dir_vae!r}, {fault}"

    def _note_idle(self, datasets: Sequence[DatasetOptions], findings: Findings) -> None:
        usual = self.default_text
        for text in self.texts:
            if text is not usual and not text.caption_filter_list and all(dataset.text_embeds != text.id for dataset in datasets):
                findings.notes.append(f"dataset {text.id!r}: without effect: no dataset names it in text_embeds")
        for image in self.images:
            if all(dataset.image_embeds != image.id for dataset in datasets):
                findings.notes.append(f"dataset {image.id!r}: without effect: no dataset names it in image_embeds")


def read_caches(entries: Iterable[tuple[str, str, dict[str, Any]]], cache_dir: Path, family: str, findings: Findings) -> CacheEntries:
    """Check all entries about caches.

    Args:
        entries: label, kind and keys of everything that is enabled.
        cache_dir: of config.json.
    """
    texts: list[TextEmbedsOptions] = []
    images: list[ImageEmbedsOptions] = []
    for label, kind, entry in entries:
        if kind not in CACHES:
            continue
        place = str(entry.get("type", "local"))
        if (kind, place) not in KINDS:
            findings.problems.append(f"{label}: type is {place!r}; caches are kept in a folder, 'local', or in a bucket, 'aws'")
            continue
        written = validate(KINDS[kind, place], label, entry, IDLE_CACHE, findings)
        findings.problems += [f"{label}: {problem}" for problem in (written.problems() if written else ())]
        texts += [written] if isinstance(written, TextEmbedsOptions) else []
        images += [written] if isinstance(written, ImageEmbedsOptions) else []
    defaults = [repr(text.id) for text in texts if text.default]
    if len(defaults) > 1:
        findings.problems.append(f"text_embeds entries {', '.join(defaults)} all say 'default: true'; only one can be")
    return CacheEntries(tuple(texts), tuple(images), cache_dir, family)


def folder_fault(folder: str) -> str | None:
    """Say what is wrong with the name of a folder in a bucket, as it is written; empty if it is not."""
    parts = PurePosixPath(folder.strip("/")).parts
    if folder and not parts:
        return "which names no folder: give a name below aws_data_prefix, or leave it out"
    return "which leads out of the bucket's folder: it is a name below aws_data_prefix, without '..'" if ".." in parts else None

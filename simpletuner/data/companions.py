"""Which file of a conditioning dataset belongs to which picture, and how it is cut to fit that picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from posixpath import splitext

from simpletuner.console import Console
from simpletuner.data.conditioning import Conditioning
from simpletuner.data.discover import Discovery, candidates, listing, skip_notes
from simpletuner.data.faults import RULES
from simpletuner.data.geometry import cover, place
from simpletuner.data.index import Changes, Seen, open_index
from simpletuner.data.plan import ImageDataset
from simpletuner.errors import DatasetError
from simpletuner.types import Geometry, Sample, Size

BLURRED = (".jpg", ".jpeg", ".jpe", ".jfif")
SHAPE_TOLERANCE = 0.02
"""By which share two shapes, width over height, may differ and still be taken for one: both were rounded to whole pixels."""


@dataclass(frozen=True, slots=True)
class Companions:
    """The usable files of one conditioning dataset."""

    conditioning: Conditioning
    seen: Mapping[str, tuple[str, Seen]]
    """Name without suffix, to name and what is known of the file."""
    notes: tuple[str, ...]
    changes: Changes

    def problem(self, sample: Sample) -> str | None:
        """The rule (`faults.RULES`) by which a picture cannot be used with these."""
        found = self.seen.get(splitext(sample.name)[0])
        if found is None:
            return "no companion"
        if self.conditioning.kind == "reference_loose":
            return None
        header, size = found[1].header, sample.geometry.original
        return None if is_alike(Size(header.width, header.height), size) else "other shape"

    def of(self, sample: Sample) -> Sample:
        """The companion of a picture, resized and cropped as that is; a loose reference covers it, and is cut in the middle."""
        name, seen = self.seen[splitext(sample.name)[0]]
        size, geometry = Size(seen.header.width, seen.header.height), sample.geometry
        resized, crop = geometry.resized, geometry.crop
        if self.conditioning.kind == "reference_loose":
            resized = cover(size, geometry.bucket)
            crop = place(resized, geometry.bucket, "center", 0)
        return Sample(self.conditioning.id, name, seen.content, Geometry(size, resized, crop), ("",), fingerprint=seen.fingerprint)

    def digest(self, samples: Iterable[Sample]) -> str:
        """Identity of what goes along with these pictures."""
        digest = hashlib.blake2b(f"{self.conditioning.id} {self.conditioning.kind}".encode(), digest_size=16)
        for sample in samples:
            name, seen = self.seen[splitext(sample.name)[0]]
            digest.update(repr((name, seen.fingerprint)).encode())
        return digest.hexdigest()


def is_alike(one: Size, other: Size) -> bool:
    """Whether two pictures have the same shape, but for rounding."""
    across, down = one.width * other.height, other.width * one.height
    return abs(across - down) <= SHAPE_TOLERANCE * max(across, down)


def find_companions(conditioning: Conditioning, index_folder: Path, console: Console) -> Companions:
    """Look at the files of a conditioning dataset, reading only those that changed since last time.

    Raises:
        DatasetError: the place cannot be listed.
    """
    backend = conditioning.open()
    fetched = backend.prepare(lambda total: console.bar(f"fetch {conditioning.id}", total, "files")) if console.is_main else ()
    skipped: dict[str, list[str]] = {rule: [] for rule in RULES}
    files = candidates(sorted(backend.list(), key=lambda entry: entry.name), skipped)
    with open_index(index_folder / f"{conditioning.id}.sqlite") as index:
        changes, unreadable = index.refresh(files, backend, lambda total: console.bar(f"index {conditioning.id}", total))
        skipped["unreadable"] += unreadable
        closed = frozenset(unreadable)
        doubles: list[str] = []
        seen: dict[str, tuple[str, Seen]] = {}
        for name, one in index.images():
            if one.header.fault is not None:
                skipped[one.header.fault].append(name)
            elif name not in closed and seen.setdefault(splitext(name)[0], (name, one))[0] != name:
                doubles.append(name)
    notes = skip_notes({rule: names for rule, names in skipped.items() if names})
    if doubles:
        notes.append(f"{listing(doubles)} not used: another file has the same name but for the suffix")
    blurred = [name for name, _ in seen.values() if conditioning.kind == "segmentation" and splitext(name)[1].lower() in BLURRED]
    if blurred:
        notes.append(f"{listing(blurred)} JPEG, which is not black where it should be; save segmentations as PNG")
    return Companions(conditioning, seen, tuple(f"dataset {conditioning.id!r}: {note}" for note in (*fetched, *notes)), changes)


def paired(dataset: ImageDataset, discovery: Discovery, companions: Sequence[Companions]) -> Discovery:
    """What was found of a dataset, without the pictures that lack a companion.

    Raises:
        DatasetError: none is left.
    """
    kept: list[Sample] = []
    lacking: dict[str, list[str]] = {}
    for sample in discovery.samples:
        problem = next((rule for one in companions if (rule := one.problem(sample)) is not None), None)
        if problem is None:
            kept.append(sample)
        else:
            lacking.setdefault(problem, []).append(sample.name)
    if not lacking:
        return discovery
    notes = [f"dataset {dataset.id!r}: {note}" for note in skip_notes(lacking)]
    if not kept:
        of = " and ".join(f"{one.conditioning.id!r} ({one.conditioning.open().place})" for one in companions)
        raise DatasetError(
            f"dataset {dataset.id!r}: none of its {len(discovery.samples)} images goes with {of}:\n  " + "\n  ".join(notes),
            hint="The file for a/cat.jpg is a/cat.png, or of any other suffix, in each of the two folders.",
        )
    skipped = {**discovery.skipped, **{rule: tuple(names) for rule, names in lacking.items()}}
    return replace(discovery, samples=tuple(kept), skipped=skipped, notes=(*discovery.notes, *notes))

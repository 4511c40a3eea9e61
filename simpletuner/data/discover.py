"""A dataset to its samples: what is there, what is left out by which rule, and what changed since last time."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend, Entry
from simpletuner.data.captions import captions_of, sidecar_of
from simpletuner.data.faults import FOREIGN_SUFFIXES, RULES, SUFFIXES, TRAITS
from simpletuner.data.geometry import fit, refusal
from simpletuner.data.index import Changes, Index, Seen, open_index
from simpletuner.data.plan import ImageDataset
from simpletuner.errors import DatasetError
from simpletuner.randomness import seed_from
from simpletuner.types import Geometry, Sample, Size

NAMES_SHOWN = 3
HINTS = {
    "too small": "Lower minimum_image_size, or set it to 0 to keep them all.",
    "aspect": "Widen minimum_aspect_ratio and maximum_aspect_ratio.",
    "no caption": "Put a .txt file of the same name beside each image, or set caption_strategy to filename or instanceprompt.",
    "unsupported": "Convert them to JPEG, PNG or WebP.",
}
"""What to do when a rule leaves nothing."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a dataset was found to hold."""

    samples: tuple[Sample, ...]
    """Usable images, sorted by name; at least one."""
    skipped: Mapping[str, tuple[str, ...]]
    """Rule (`faults.RULES`) to the names of the images that it left out."""
    notes: tuple[str, ...]
    """Lines to say aloud: what is skipped, and what is done to images that are kept."""
    changes: Changes
    """Images that are new, changed or gone since this dataset was last looked at."""
    caption_changes: Changes
    """The same for caption files."""


def discover(dataset: ImageDataset, index_folder: Path, seed: int, console: Console) -> Discovery:
    """Find the samples of a dataset, reading only files that changed since last time.

    Args:
        dataset: one of the plan.
        index_folder: where its index is kept, as `<id>.sqlite`.
        seed: of the run; random crops depend on it and on the image's bytes.
        console: shows a bar while files are read.

    Raises:
        DatasetError: nothing usable is left; says which rule left out how many.
    """
    # `faults.LIMIT_PX` is our limit; Pillow's advice at half of it would tell the user about images that are fine.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    backend = dataset.open()
    entries = list(backend.list())
    skipped: dict[str, list[str]] = {rule: [] for rule in RULES}
    images = candidates(entries, skipped)
    with open_index(index_folder / f"{dataset.id}.sqlite") as index:
        seen, changes = index.images(images, backend.read, lambda total: console.bar(f"index {dataset.id}", total))
        kept = [name for name in seen if not leave_out(dataset, name, seen[name], skipped)]
        captions = find_captions(dataset, backend, index, kept, entries, skipped, console)
    drawn = draw(dataset, list(captions.by_name), skipped)
    left_out = {rule: tuple(names) for rule, names in skipped.items() if names}
    if not drawn:
        raise nothing_left(dataset, backend, entries, left_out)
    samples = tuple(assemble(dataset, seen, captions.by_name, drawn, seed))
    notes = (*skip_notes(left_out), *kept_notes(samples, seen), *captions.notes)
    return Discovery(samples, left_out, tuple(f"dataset {dataset.id!r}: {note}" for note in notes), changes, captions.changes)


def candidates(entries: Iterable[Entry], skipped: dict[str, list[str]]) -> list[Entry]:
    """Give the files to look at as images, and note those that are not even opened."""
    found = []
    for entry in entries:
        suffix = PurePosixPath(entry.name).suffix.lower()
        if entry.fault is not None:
            skipped[entry.fault].append(entry.name)
        elif suffix in FOREIGN_SUFFIXES:
            skipped["unsupported"].append(entry.name)
        elif suffix in SUFFIXES:
            found.append(entry)
    return found


def leave_out(dataset: ImageDataset, name: str, seen: Seen, skipped: dict[str, list[str]]) -> bool:
    """Note an image that cannot or shall not be used."""
    header = seen.header
    rule = header.fault or refusal(Size(header.width, header.height), dataset.geometry)
    if rule is not None:
        skipped[rule].append(name)
    return rule is not None


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of a dataset's images."""

    by_name: Mapping[str, tuple[str, ...]]
    changes: Changes
    notes: tuple[str, ...]


def find_captions(
    dataset: ImageDataset,
    backend: DataBackend,
    index: Index,
    names: Sequence[str],
    entries: Iterable[Entry],
    skipped: dict[str, list[str]],
    console: Console,
) -> Captions:
    """Give the captions of each image; one that lacks its caption file is left out."""
    rule = dataset.captions
    sidecars = {name: sidecar for name in names if (sidecar := sidecar_of(rule, name)) is not None}
    if not sidecars:
        return Captions({name: captions_of(rule, name) for name in names}, Changes(), ())
    wanted = set(sidecars.values())
    files = [entry for entry in entries if entry.name in wanted and entry.fault is None]
    texts, changes = index.texts(files, backend.read_text, lambda total: console.bar(f"captions {dataset.id}", total, "files"))
    skipped["no caption"] += [name for name in names if sidecars[name] not in texts]
    by_name = {name: captions_of(rule, name, texts[sidecar][0]) for name, sidecar in sidecars.items() if sidecar in texts}
    notes = []
    if empty := sorted(name for name, (text, _) in texts.items() if not text.strip()):
        notes.append(f"{listing(empty)} empty: trained without words of their own")
    if latin := sorted(name for name, (_, encoding) in texts.items() if encoding == "latin-1"):
        notes.append(f"{listing(latin)} not UTF-8: read as latin-1")
    return Captions(by_name, changes, tuple(notes))


def draw(dataset: ImageDataset, names: list[str], skipped: dict[str, list[str]]) -> list[str]:
    """Keep `max_num_samples` images: those whose names hash lowest, so that most stay when others are added."""
    limit = dataset.max_num_samples
    if limit is None or len(names) <= limit:
        return names
    drawn = set(sorted(names, key=lambda name: seed_from("subset", dataset.id, name))[:limit])
    skipped["not drawn"] += [name for name in names if name not in drawn]
    return [name for name in names if name in drawn]


def assemble(
    dataset: ImageDataset, seen: Mapping[str, Seen], captions: Mapping[str, tuple[str, ...]], names: Iterable[str], seed: int
) -> Iterator[Sample]:
    """Make the samples; without a random crop, images of one size share one geometry."""
    shared: dict[Size, Geometry] = {}
    for name in names:
        image = seen[name]
        original = Size(image.header.width, image.header.height)
        if dataset.geometry.is_random:
            geometry = fit(original, dataset.geometry, seed_from("crop", seed, image.content))
        elif (known := shared.get(original)) is not None:
            geometry = known
        else:
            geometry = shared[original] = fit(original, dataset.geometry, random=0)
        yield Sample(dataset.id, name, image.content, geometry, captions[name], dataset.is_regularisation)


def skip_notes(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{listing(names)} skipped, {rule}: {RULES[rule]}" for rule, names in skipped.items()]


def kept_notes(samples: Iterable[Sample], seen: Mapping[str, Seen]) -> list[str]:
    """Say what is done to images besides resizing and cropping, and which are enlarged."""
    counts: Counter[str] = Counter()
    enlarged = 0
    for sample in samples:
        counts.update(seen[sample.name].header.traits)
        enlarged += sample.geometry.resized.width > sample.geometry.original.width
    notes = [f"{counts[trait]} {trait}: {what}" for trait, what in TRAITS.items() if counts[trait]]
    if enlarged:
        notes.append(f"{enlarged} enlarged: smaller than their training picture (minimum_image_size leaves such images out)")
    return notes


def listing(names: Sequence[str]) -> str:
    """Count, and name the first few: `5 (a.png, b.png, c.png, ...)`."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > NAMES_SHOWN else ''})"


def nothing_left(dataset: ImageDataset, backend: DataBackend, entries: Sequence[Entry], skipped: Mapping[str, Sequence[str]]) -> DatasetError:
    """Say why a dataset has no usable image."""
    total = sum(len(names) for names in skipped.values())
    if not total:
        others = Counter(PurePosixPath(entry.name).suffix.lower() or "no suffix" for entry in entries)
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        what = f"holds no images, only other files ({found})" if found else "is empty"
        return DatasetError(
            f"dataset {dataset.id!r}: {backend.place} {what}", hint=f"Images end in {', '.join(sorted(SUFFIXES))}; hidden files are not looked at."
        )
    lines = [f"dataset {dataset.id!r}: none of the {total} images in {backend.place} can be used:", *skip_notes(skipped)]
    worst = max(skipped, key=lambda rule: len(skipped[rule]))
    return DatasetError("\n  ".join(lines), hint=HINTS.get(worst))

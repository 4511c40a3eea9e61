"""A dataset to its samples: what is there, what is left out by which rule, and what changed since last time."""

from __future__ import annotations

import gc
import math
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import TypeVar

from PIL import Image

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend, Entry, stamp
from simpletuner.data.captions import SEPARATOR, STRATEGIES, CaptionRule, captions_of, sidecar_of
from simpletuner.data.crops import crop_seed
from simpletuner.data.faces import FaceFinder
from simpletuner.data.faults import FOREIGN_SUFFIXES, RULES, SUFFIXES, TRAITS
from simpletuner.data.geometry import Face, fit, refusal
from simpletuner.data.index import Changes, Faces, Index, Seen, open_index
from simpletuner.data.plan import ImageDataset
from simpletuner.errors import DatasetError
from simpletuner.randomness import seed_from
from simpletuner.types import Geometry, Sample, Size

NAMES_SHOWN = 3
Item = TypeVar("Item")
HINTS = {
    "too small": "Lower minimum_image_size, or set it to 0 to keep them all.",
    "aspect": "Widen minimum_aspect_ratio and maximum_aspect_ratio.",
    "no caption": "Put a .txt file of the same name beside each image, or set caption_strategy to filename or instanceprompt.",
    "not fetched": "Check the addresses and the network.",
    "unsupported": "Convert them to JPEG, PNG or WebP.",
    "outside": "Copy the files into the dataset's folder, and name them from there.",
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
    settings: tuple[str, ...] = ()
    """Settings of the pictures that are other than those of the last run."""
    faceless: tuple[str, ...] = ()
    """With `crop_style` face, names of the samples that are cut elsewhere since none was found."""


def discover(dataset: ImageDataset, index_folder: Path, seed: int, console: Console) -> Discovery:
    """Find the samples of a dataset, reading only files that changed since last time.

    Args:
        dataset: one of the plan.
        index_folder: where its index is kept, as `<id>.sqlite`.
        seed: of the run; random crops depend on it and on the sample's id.
        console: shows a bar while files are read.

    Raises:
        DatasetError: nothing usable is left; says which rule left out how many.
    """
    # `faults.LIMIT_PX` is our limit; Pillow's advice at half of it would tell the user about images that are fine.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    seed = seed_of(dataset, seed)
    backend = dataset.open()
    fetched = backend.prepare(lambda total: console.bar(f"fetch {dataset.id}", total, "files")) if console.is_main else ()
    entries = sorted(gathered(backend.list()), key=attrgetter("name"))
    skipped: dict[str, list[str]] = {rule: [] for rule in RULES}
    images = candidates(entries, skipped)
    with open_index(index_folder / f"{dataset.id}.sqlite") as index:
        changes, unreadable = index.refresh(images, backend, lambda total: console.bar(f"index {dataset.id}", total))
        skipped["unreadable"] += unreadable
        closed = frozenset(unreadable)
        kept = usable(dataset, index, closed, skipped)
        captions = find_captions(dataset, backend, index, kept, entries, skipped, console)
        drawn = draw(dataset, captions.by_name, skipped)
        faces = find_faces(dataset, backend, index, images, drawn, skipped, console)
        drawn = {name: alternatives for name, alternatives in drawn.items() if name not in faces.unreadable}
        left_out = {rule: tuple(names) for rule, names in skipped.items() if names}
        if not drawn:
            raise nothing_left(dataset, backend, entries, left_out, fetched)
        traits: Counter[str] = Counter()
        samples = tuple(gathered(assemble(dataset, index.images(), drawn, faces.found, seed, traits)))
        settings = index.settings(settings_of(dataset, seed))
    faceless = tuple(name for name in drawn if name not in faces.found) if dataset.geometry.crop_style == "face" else ()
    notes = (*fetched, *skip_notes(left_out), *kept_notes(samples, traits), *face_notes(faceless), *captions.notes)
    return Discovery(
        samples, left_out, tuple(f"dataset {dataset.id!r}: {note}" for note in notes), changes, captions.changes, tuple(settings), faceless
    )


def take_up(dataset: ImageDataset, index_folder: Path, seed: int) -> None:
    """A run trains on what was found of a dataset: from here on changes are counted anew.

    Args:
        index_folder, seed: as in `discover`.
    """
    with open_index(index_folder / f"{dataset.id}.sqlite") as index:
        index.take_up(settings_of(dataset, seed_of(dataset, seed)))


def seed_of(dataset: ImageDataset, seed: int) -> int:
    """The seed of a dataset's crops: of one that is held out it is not the run's, or each run would look at other pictures."""
    return 0 if dataset.is_eval else seed


def gathered(items: Iterable[Item]) -> list[Item]:
    """List what may be a million objects, without Python looking for garbage among those that are there already.

    Measured: its searches take a tenth of a start on a million samples, and find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return list(items)
    finally:
        if was_enabled:
            gc.enable()


def candidates(entries: Iterable[Entry], skipped: dict[str, list[str]]) -> list[Entry]:
    """Give the files to look at as images, and note those that are not even opened."""
    found = []
    for entry in entries:
        suffix = "." + entry.name.rpartition(".")[2].lower()
        if entry.fault is not None:
            skipped[entry.fault].append(entry.shown or entry.name)
        elif suffix in FOREIGN_SUFFIXES:
            skipped["unsupported"].append(entry.name)
        elif suffix in SUFFIXES:
            found.append(entry)
    return found


def usable(dataset: ImageDataset, index: Index, closed: Container[str], skipped: dict[str, list[str]]) -> list[str]:
    """Give the names of images that can and shall be used, and note the others.

    Args:
        closed: names of those that could not be opened.
    """
    kept = []
    refused = lru_cache(maxsize=65_536)(lambda width, height: refusal(Size(width, height), dataset.geometry))
    for name, width, height, fault in index.sizes():
        if name in closed:
            continue
        rule = fault or refused(width, height)
        if rule is None:
            kept.append(name)
        else:
            skipped[rule].append(name)
    return kept


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
    if STRATEGIES[rule.strategy].is_of_place:
        return told_captions(dataset, index, names, entries, skipped, console)
    sidecars = {name: sidecar for name in names if (sidecar := sidecar_of(rule, name)) is not None}
    if not sidecars:
        return Captions({name: captions_of(rule, name) for name in names}, Changes(), unread_texts(rule, names, entries))
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


def unread_texts(rule: CaptionRule, names: Sequence[str], entries: Iterable[Entry]) -> tuple[str, ...]:
    """Say that there are caption files which the strategy does not read."""
    texts = {entry.name for entry in entries if entry.name.endswith(".txt")}
    beside = [name for name in names if splitext(name)[0] + ".txt" in texts] if texts else []
    return (f"{listing(beside)} have a .txt that is not read: caption_strategy is {rule.strategy}, not textfile",) if beside else ()


def told_captions(
    dataset: ImageDataset, index: Index, names: Sequence[str], entries: Iterable[Entry], skipped: dict[str, list[str]], console: Console
) -> Captions:
    """Give the captions that the place itself knows; an image without any is left out. The index keeps them to tell what changed."""
    wanted = set(names)
    told = {entry.name: SEPARATOR.join(entry.captions) for entry in entries if entry.captions and entry.name in wanted}
    files = [Entry(name, len(text), stamp(text)) for name, text in told.items()]
    _, changes = index.texts(files, lambda name: (told[name], "utf-8"), lambda total: console.bar(f"captions {dataset.id}", total, "files"))
    skipped["no caption"] += [name for name in names if name not in told]
    return Captions({name: captions_of(dataset.captions, name, text) for name, text in told.items()}, changes, ())


def draw(dataset: ImageDataset, captions: Mapping[str, tuple[str, ...]], skipped: dict[str, list[str]]) -> Mapping[str, tuple[str, ...]]:
    """Keep `max_num_samples` images, with their captions: those whose names hash lowest, so that most stay when others are added."""
    limit = dataset.max_num_samples
    if limit is None or len(captions) <= limit:
        return captions
    drawn = set(sorted(captions, key=lambda name: seed_from("subset", dataset.id, name))[:limit])
    skipped["not drawn"] += [name for name in captions if name not in drawn]
    return {name: alternatives for name, alternatives in captions.items() if name in drawn}


def find_faces(
    dataset: ImageDataset,
    backend: DataBackend,
    index: Index,
    images: Iterable[Entry],
    names: Container[str],
    skipped: dict[str, list[str]],
    console: Console,
) -> Faces:
    """Give the face of each image that has one, if pictures are cut around faces; images are read whole for that, once."""
    if dataset.geometry.crop_style != "face":
        return Faces({}, frozenset())
    finder = FaceFinder()
    entries = [entry for entry in images if entry.name in names]
    faces = index.faces(entries, lambda name: finder.find(backend.read(name), name), lambda total: console.bar(f"faces {dataset.id}", total))
    skipped["unreadable"] += sorted(faces.unreadable)  # rather than cut anywhere, and elsewhere at the next start
    return faces


def assemble(
    dataset: ImageDataset,
    images: Iterator[tuple[str, Seen]],
    captions: Mapping[str, tuple[str, ...]],
    faces: Mapping[str, Face],
    seed: int,
    traits: Counter[str],
) -> Iterator[Sample]:
    """Make the samples; without a random crop, images of one size share one geometry.

    Args:
        images: all of the index, sorted by name.
        captions: of those that are used, sorted by name too.
        traits: counts what is done to the images.
    """
    shared: dict[tuple[int, int], Geometry] = {}
    rule = dataset.geometry
    crops = rule.crops if rule.crop_style == "random" else 1
    for name, alternatives in captions.items():
        other = ""
        while other != name:
            found = next(images, None)
            if found is None:
                raise DatasetError(
                    f"dataset {dataset.id!r}: its index changed while it was read", hint="Does another run use this cache_dir? Start again."
                )
            other, (fingerprint, content, header) = found
        if header.traits:
            traits.update(header.traits)
        geometry = None if rule.is_random else shared.get((header.width, header.height))
        if geometry is None:
            geometry = fit(Size(header.width, header.height), rule, crop_seed(seed, dataset.id, name), faces.get(name))
            shared[header.width, header.height] = geometry
        yield Sample(dataset.id, name, content, geometry, alternatives, dataset.is_regularisation, fingerprint, crops)


def settings_of(dataset: ImageDataset, seed: int) -> dict[str, str]:
    """What decides the pictures and words of a dataset besides its files, as users write it."""
    rule = dataset.geometry
    return {
        "resolution": str(rule.resolution),
        "aspect_bucket_alignment": str(rule.alignment_px),
        "aspect_bucket_rounding": str(rule.aspect_decimals),
        "crop": f"{rule.crop_aspect} {rule.crop_style}" if rule.is_cropped else "off",
        "crop_aspect_buckets": ", ".join(f"{float(choice.aspect):g} ({float(choice.weight):g})" for choice in rule.choices) or "none",
        "crops_per_image": str(rule.crops),
        "seed of crops": str(seed) if rule.is_random else "none",
        "minimum_image_size": str(rule.minimum or "none"),
        "maximum_image_size": str(rule.maximum or "none"),
        "target_downsample_size": str(rule.target or "none"),
        "aspect ratios": f"{rule.minimum_aspect or 0:g} to {rule.maximum_aspect or math.inf:g}",
        "captions": dataset.caption_rules,
        "repeats": str(dataset.repeats),
        "probability": f"{dataset.probability:g}",
        "train_batch_size": str(dataset.train_batch_size or "that of config.json"),
        "max_num_samples": str(dataset.max_num_samples or "all"),
    }


def skip_notes(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{listing(names)} skipped, {rule}: {RULES[rule]}" for rule, names in skipped.items()]


def kept_notes(samples: Iterable[Sample], counts: Mapping[str, int]) -> list[str]:
    """Say what is done to images besides resizing and cropping, and how many are enlarged.

    Args:
        counts: trait to images that have it.
    """
    enlarged = sum(sample.geometry.resized.width > sample.geometry.original.width for sample in samples)
    notes = [f"{counts[trait]} {trait}: {what}" for trait, what in TRAITS.items() if counts.get(trait)]
    if enlarged:
        notes.append(f"{enlarged} enlarged: smaller than their training picture (minimum_image_size leaves such images out)")
    return notes


def face_notes(faceless: Sequence[str]) -> list[str]:
    """Say which pictures are not cut around a face, though they should be."""
    return [f"{listing(faceless)} without a face that was found: cut at a place drawn for each"] if faceless else []


def listing(names: Sequence[str]) -> str:
    """Count, and name the first few: `5 (a.png, b.png, c.png, ...)`."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > NAMES_SHOWN else ''})"


def nothing_left(
    dataset: ImageDataset, backend: DataBackend, entries: Sequence[Entry], skipped: Mapping[str, Sequence[str]], fetched: Sequence[str]
) -> DatasetError:
    """Say why a dataset has no usable image.

    Args:
        fetched: what was said when its files were fetched.
    """
    total = sum(len(names) for names in skipped.values())
    if not total:
        others = Counter(PurePosixPath(entry.name).suffix.lower() or "no suffix" for entry in entries)
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        what = f"holds no images, only other files ({found})" if found else "is empty"
        return DatasetError(
            f"dataset {dataset.id!r}: {backend.place} {what}", hint=f"Images end in {', '.join(sorted(SUFFIXES))}; hidden files are not looked at."
        )
    all_of_them = "the only image" if total == 1 else f"none of the {total} images"
    verb = "cannot" if total == 1 else "can"
    lines = [f"dataset {dataset.id!r}: {all_of_them} in {backend.place} {verb} be used:", *fetched, *skip_notes(skipped)]
    worst = max(skipped, key=lambda rule: len(skipped[rule]))
    return DatasetError("\n  ".join(lines), hint=HINTS.get(worst))

"""Where copies of an image lie: within a dataset, in another one, or on both sides of evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simpletuner.data.doctor.duplicates import same_groups, twin_pairs
from simpletuner.data.doctor.findings import Chart, named
from simpletuner.data.doctor.looks import Look

SHOWN = 3
"""Twins that an image names."""
MIRRORED = " (mirrored)"


@dataclass(frozen=True, slots=True)
class Seen:
    """One image of one dataset, with what it looks like."""

    dataset: str
    name: str
    is_eval: bool
    look: Look

    @property
    def id(self) -> str:
        return f"{self.dataset}/{self.name}"


Pair = tuple[Seen, Seen, str]
"""Two twins, and what is to be said behind the name of one: nothing, or that it is mirrored."""


def check_twins(images: Sequence[Seen], charts: Mapping[str, Chart]) -> None:
    """Note copies and near copies among all images of a run.

    Args:
        charts: by dataset.
    """
    groups = [[images[position] for position in group] for group in same_groups([image.look.content for image in images])]
    pairs = [(a, b, "") for group in groups for a, b in together(group)]
    note_within(pairs, charts, "exact duplicate", "exact copies of others")
    note_between(pairs, charts, "leak", "also")
    alike = near_twins(images)
    note_within(alike, charts, "near duplicate", "nearly like others")
    note_between(alike, charts, "near leak", "nearly the same")


def together(group: Sequence[Seen]) -> list[tuple[Seen, Seen]]:
    """Pairs that join a group of copies: each with the one before it in its dataset, and with the first of every other dataset."""
    firsts: dict[str, Seen] = {}
    last: dict[str, Seen] = {}
    pairs = []
    for image in group:
        if image.dataset in last:
            pairs.append((last[image.dataset], image))
        last[image.dataset] = image
        firsts.setdefault(image.dataset, image)
    return pairs + [(image, first) for image in group for first in firsts.values() if first.dataset != image.dataset]


def near_twins(images: Sequence[Seen]) -> list[Pair]:
    """Pairs of images that look alike, or of which one looks like the other's mirror image; copies left out."""
    unique: dict[tuple[str, str], Seen] = {}
    for image in images:
        if image.look.colours:
            unique.setdefault((image.dataset, image.look.content), image)
    different = list(unique.values())
    looks = [image.look for image in different]
    pairs = twin_pairs([look.hash for look in looks], [look.colours for look in looks], [(look.mirror_hash, look.mirror_colours) for look in looks])
    found = ((different[a], different[b], MIRRORED if is_mirrored else "") for a, b, is_mirrored in pairs)
    return [pair for pair in found if pair[0].look.content != pair[1].look.content]


def note_within(pairs: Sequence[Pair], charts: Mapping[str, Chart], kind: str, what: str) -> None:
    """Note twins inside one dataset."""
    twins: dict[str, dict[str, list[str]]] = {}
    for a, b, mark in pairs:
        if a.dataset == b.dataset:
            mine = twins.setdefault(a.dataset, {})
            mine.setdefault(a.name, []).append(b.name + mark)
            mine.setdefault(b.name, []).append(a.name + mark)
    for dataset, mine in twins.items():
        charts[dataset].note(kind, {name: listed(others) for name, others in mine.items()}, f"{named(len(mine), 'image')} {what}")


def note_between(pairs: Sequence[Pair], charts: Mapping[str, Chart], leak: str, how: str) -> None:
    """Note twins in two datasets: a leak if only one of these is for evaluation, which then has the line; otherwise just shared."""
    twins: dict[tuple[str, str], dict[str, list[str]]] = {}
    leaks: dict[tuple[str, str], bool] = {}
    for a, b, mark in pairs:
        if a.dataset != b.dataset:
            # The side that comes first in `twins` has the line: that of evaluation, or the dataset whose image came first.
            for one, twin in sorted(((a, b), (b, a)), key=lambda pair: not pair[0].is_eval):
                twins.setdefault((one.dataset, twin.dataset), {}).setdefault(one.name, []).append(twin.id + mark)
                leaks[one.dataset, twin.dataset] = one.is_eval != twin.is_eval
    has_line: set[tuple[str, str]] = set()
    for (mine, other), names in twins.items():
        kind = leak if leaks[mine, other] else "shared"
        details = {name: f"{how} {listed(others)}" for name, others in names.items()}
        if (other, mine) in has_line:
            charts[mine].mark(kind, details)
        else:
            has_line.add((mine, other))
            message = f"{named(len(details), 'image is', 'images are')} {how} in dataset {other!r}"
            charts[mine].note(kind, details, message)


def listed(names: Sequence[str]) -> str:
    """Name the first few of some."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return ", ".join(different[:SHOWN]) + more

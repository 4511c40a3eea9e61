"""Where copies of an image lie: within a dataset, in another one, or on both sides of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
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
    copies = [(a, b, "") for group in groups for a, b in together(group)]
    alike = near_twins(images)
    note_within(copies, charts, "exact duplicate", "=", said_of_copies)
    note_within(alike, charts, "near duplicate", "like", lambda count, pairs: f"{named(count, 'image')} nearly like another")
    note_between(copies, alike, {image.dataset for image in images if image.is_eval}, charts)


def said_of_copies(count: int, pairs: int) -> str:
    """Say how many images have copies: pairs join each copy to the one before it, so that there are as many copies as pairs."""
    several = f"{pairs:,} exact copies" if pairs > 1 else "exact copy"
    return f"{named(count - pairs, 'image')} and {'its' if count - pairs == 1 else 'their'} {several}"


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


def note_within(pairs: Sequence[Pair], charts: Mapping[str, Chart], kind: str, sign: str, say: Callable[[int, int], str]) -> None:
    """Note twins inside one dataset.

    Args:
        sign: what stands between the names of two.
        say: the message, given the number of images and of pairs.
    """
    twins: dict[str, dict[str, list[str]]] = {}
    shown: dict[str, list[str]] = {}
    for a, b, mark in pairs:
        if a.dataset == b.dataset:
            mine = twins.setdefault(a.dataset, {})
            mine.setdefault(a.name, []).append(b.name + mark)
            mine.setdefault(b.name, []).append(a.name + mark)
            shown.setdefault(a.dataset, []).append(f"{a.name} {sign} {b.name}{mark}")
    for dataset, mine in twins.items():
        details = {name: listed(others) for name, others in mine.items()}
        charts[dataset].note(kind, details, say(len(mine), len(shown[dataset])), examples=shown[dataset])


Sides = tuple[str, str]
"""A dataset, and another one in which its images have twins."""


def note_between(copies: Sequence[Pair], alike: Sequence[Pair], held_out: Container[str], charts: Mapping[str, Chart]) -> None:
    """Note twins in two datasets: a leak if only one of these is for evaluation, which then has the line; otherwise just shared.

    An image that is there itself is not said to be nearly there, too.

    Args:
        held_out: datasets for evaluation.
    """
    same = across(copies)
    near = {sides: {name: ids for name, ids in names.items() if name not in same.get(sides, {})} for sides, names in across(alike).items()}
    leaking = {sides for sides in (*same, *near) if (sides[0] in held_out) != (sides[1] in held_out)}
    leaks = {sides: details_of(names, "also") for sides, names in same.items() if sides in leaking}
    note_sides("leak", leaks, lambda sides, count: said_of_shared(sides, count, count), charts)
    near_leaks = {sides: details_of(names, "nearly the same") for sides, names in near.items() if sides in leaking}
    note_sides("near leak", near_leaks, lambda sides, count: said_of_shared(sides, 0, count), charts)
    shared = {
        sides: details_of(same.get(sides, {}), "also") | details_of(near.get(sides, {}), "nearly the same")
        for sides in (*same, *near)
        if sides not in leaking
    }
    note_sides("shared", shared, lambda sides, count: said_of_shared(sides, len(same.get(sides, {})), count), charts)


def across(pairs: Sequence[Pair]) -> dict[Sides, dict[str, list[str]]]:
    """By dataset and other dataset, names of images to their twins there; that of evaluation first, then as images came."""
    twins: dict[Sides, dict[str, list[str]]] = {}
    for a, b, mark in pairs:
        if a.dataset != b.dataset:
            for one, twin in sorted(((a, b), (b, a)), key=lambda pair: not pair[0].is_eval):
                twins.setdefault((one.dataset, twin.dataset), {}).setdefault(one.name, []).append(twin.id + mark)
    return twins


def details_of(names: Mapping[str, Sequence[str]], how: str) -> dict[str, str]:
    return {name: f"{how} {listed(others)}" for name, others in names.items()}


def note_sides(kind: str, found: Mapping[Sides, Mapping[str, str]], say: Callable[[Sides, int], str], charts: Mapping[str, Chart]) -> None:
    """Note a line for each two datasets, on the side that comes first; on the other one the images are marked.

    Args:
        found: names of images to what is to be said of each.
        say: the message, given the sides and the number of images.
    """
    has_line: set[Sides] = set()
    for (mine, other), details in found.items():
        if (other, mine) in has_line:
            charts[mine].mark(kind, details)
        elif details:
            has_line.add((mine, other))
            examples = [f"{name}: {detail}" for name, detail in details.items()] if kind != "shared" else ()
            charts[mine].note(kind, details, say((mine, other), len(details)), examples=examples)


def said_of_shared(sides: Sides, same: int, count: int) -> str:
    """Say how many of `count` images are in another dataset themselves, and how many nearly."""
    there = f"in dataset {sides[1]!r}"
    if not same:
        return f"{named(count, 'image is', 'images are')} nearly the same {there}"
    more = f", and {count - same:,} nearly" if count > same else ""
    return f"{named(same, 'image is', 'images are')} also {there}{more}"


def listed(names: Sequence[str]) -> str:
    """Name the first few of some."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return ", ".join(different[:SHOWN]) + more

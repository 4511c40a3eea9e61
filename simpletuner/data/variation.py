"""Captions that vary although their embeddings are cached: each is trained in a fixed set of versions, of which every draw shows one.

A version is a function of the rule, the caption and the version's number, so versions are computed wherever they are needed and
stored nowhere. Which one a draw shows is the loader's choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Literal

from simpletuner.data.filters import Filter, apply, tidy
from simpletuner.data.wildcards import Choose, has_choice, has_lone_brace, resolve
from simpletuner.randomness import seed_from
from simpletuner.types import Sample

Separator = Literal["comma", "space", "period"]
PLURAL = {"comma": "commas", "space": "spaces", "period": "periods"}


@dataclass(frozen=True, slots=True)
class Variation:
    """How the versions of one dataset's captions are made: wildcards, then filters, then tags dropped, then tags shuffled."""

    count: int = 1
    """Versions made of each caption, besides the original."""
    seed: int = 0
    """Not the run's: runs of several seeds share their embeddings."""
    shuffles: bool = False
    """Whether tags change places."""
    separator: Separator = "comma"
    """What stands between two tags."""
    kept_tags: int = 0
    """Tags at the front that are neither moved nor dropped."""
    includes_original: bool = True
    """Whether the caption with all its tags in their order is a version too."""
    tag_dropout: float = 0.0
    """Probability that a version lacks a tag."""
    has_wildcards: bool = False
    """Whether `{a|b}` is a choice."""
    filters: tuple[Filter, ...] = ()
    heads: tuple[str, ...] = ()
    """Instance prompts with which captions begin; their tags are kept as well."""

    @property
    def changes_tags(self) -> bool:
        return self.shuffles or self.tag_dropout > 0

    @property
    def numbers(self) -> range:
        """The numbers of a caption's versions. 0 is the original, so that a changed `include_original` renumbers nothing."""
        if self.changes_tags:
            return range(0 if self.includes_original else 1, self.count + 1)
        return range(1, self.count + 1) if self.has_wildcards else range(1)

    def version(self, caption: str, number: int) -> str:
        """One version of a caption; empty if nothing is left of it."""
        text, tags, kept = self.tags(caption, number)
        if number == 0 or not self.changes_tags:
            return text
        free = range(kept, len(tags))
        # Of Python's generators only random() is promised to stay the same in every version. Each place gets a number of both,
        # so that tags keep their order when dropout is turned on, and their dropout when shuffling is.
        dropout = Random(seed_from("tag dropout", self.seed, text, number))
        order = Random(seed_from("tag order", self.seed, text, number))
        ranks = {place: order.random() if self.shuffles else place for place in free}
        left = sorted((place for place in free if dropout.random() >= self.tag_dropout), key=ranks.__getitem__)
        return text if left == list(free) else join([*tags[:kept], *(tags[place] for place in left)], text, self.separator)

    def tags(self, caption: str, number: int) -> tuple[str, list[str], int]:
        """A version's words in the order in which they were written, cut into tags, and how many of these are kept."""
        text = self.words(caption, number)
        head = max((head for head in self.heads if caption.startswith(head)), key=len, default="")
        of_head = split(self.words(caption, number, head), self.separator) if head else []
        return text, split(text, self.separator), max(self.kept_tags, len(of_head))

    def words(self, caption: str, number: int, part: str | None = None) -> str:
        """A caption, or a part at its front, with wildcards chosen and filters applied."""
        return apply(self.filters, self.chosen(caption, number, part))[0]

    def chosen(self, caption: str, number: int, part: str | None = None) -> str:
        """The same before filters."""
        text = caption if part is None else part
        if not self.has_wildcards:
            return text
        resolved = resolve(text, self._chooser(caption, number))
        return tidy(resolved, text) if has_choice(text) else resolved

    def _chooser(self, caption: str, number: int) -> Choose:
        """Choose so that each option of a group is taken equally often: n versions in a row hold all n options."""

        def choose(level: int, place: int, options: int) -> int:
            turn, offset = divmod(number - 1, options)
            order = Random(seed_from("wildcard", self.seed, caption, level, place, turn))
            rank = [order.random() for _ in range(options)]
            return sorted(range(options), key=rank.__getitem__)[offset]

        return choose

    def __str__(self) -> str:
        parts = ["with wildcards"] if self.has_wildcards else []
        parts += [f"{len(self.filters)} filter{'s' if len(self.filters) > 1 else ''}"] if self.filters else []
        parts += [f"{self.tag_dropout:.0%} of tags dropped"] if self.tag_dropout else []
        parts += ["tags shuffled"] if self.shuffles else []
        if self.changes_tags:
            parts.append(f"split at {PLURAL[self.separator]}" + (f", the first {self.kept_tags} kept" if self.kept_tags else ""))
        if self.changes_tags or self.has_wildcards:
            original = " with the original" if 0 in self.numbers else ""
            parts.append(f"{len(self.numbers)} versions of each{original}" + (f", seed {self.seed}" if self.seed else ""))
        return ", ".join(parts)


def split(text: str, separator: Separator) -> list[str]:
    """Cut a caption into tags, none empty. A period ends a tag where a blank or nothing follows, so not in 3.5."""
    if separator == "space":
        return text.split()
    parts = text.split(",") if separator == "comma" else re.split(r"\.(?:\s+|$)", text)
    return [part.strip() for part in parts if part.strip()]


def join(tags: list[str], text: str, separator: Separator) -> str:
    """Put tags together again; sentences end in a period if the last one of `text`, which they come from, does."""
    if separator == "period":
        return ". ".join(tags) + ("." if tags and text.rstrip().endswith(".") else "")
    return (" " if separator == "space" else ", ").join(tags)


@dataclass(frozen=True, slots=True)
class Expansion:
    """All that the captions of one dataset can become."""

    prompts: dict[str, str]
    """Each text once, with the caption of which it is a version."""
    count: str = ""
    """How many embeddings versions make; empty if each caption has one."""
    notes: tuple[str, ...] = ()
    """What to say aloud: rules that find nothing to do, captions of which no word is left."""


def expand(samples: Iterable[Sample], variation: Variation | None) -> Expansion:
    """Make every version of every caption of a dataset."""
    captions = dict.fromkeys(caption for sample in samples for caption in sample.captions)
    if variation is None:
        return Expansion({caption: caption for caption in captions})
    prompts: dict[str, str] = {}
    emptied = 0
    for caption in captions:
        for number in variation.numbers:
            version = variation.version(caption, number)
            prompts.setdefault(version, caption)
            emptied += bool(caption and not version)
    each = len(variation.numbers)
    count = f"{len(captions):,} captions in {each:,} versions make {len(prompts):,} text embeddings" if each > 1 else ""
    notes = [count] if count else []
    if emptied:
        what = f"{len(captions) * each:,} versions of captions" if each > 1 else f"{len(captions):,} captions"
        notes.append(f"{emptied:,} of {what} have no words left: trained without words of their own")
    return Expansion(prompts, count, (*notes, *idle_rules(captions, variation)))


def idle_rules(captions: Iterable[str], variation: Variation) -> list[str]:
    """Name the rules for which these captions hold nothing to do."""
    captions = [caption for caption in captions if caption]
    notes = []
    if variation.has_wildcards and not any(map(has_choice, captions)):
        notes.append("caption_wildcards finds no {a|b} in any caption")
    if variation.has_wildcards and (lone := sum(map(has_lone_brace, captions))):
        notes.append(f"braces without a partner stay as they are, in {lone:,} of {len(captions):,} captions")
    unused = set(variation.filters)
    most_free = 0
    for caption, number in product(captions, variation.numbers):
        if unused:
            unused -= apply(variation.filters, variation.chosen(caption, number))[1]
        if most_free < 2 and variation.changes_tags:
            _, tags, kept = variation.tags(caption, number)
            most_free = max(most_free, len(tags) - kept)
        if not unused and most_free > 1:
            break
    notes += [f"caption_filter_list: {one.written!r} is found in no caption" for one in variation.filters if one in unused]
    where = f"behind those that are kept, split at {PLURAL[variation.separator]}"
    if variation.shuffles and most_free < 2:
        notes.append(f"caption_shuffle changes nothing: no caption has two tags {where}")
    if variation.tag_dropout and most_free < 1:
        notes.append(f"caption_tag_dropout changes nothing: no caption has a tag {where}")
    return notes

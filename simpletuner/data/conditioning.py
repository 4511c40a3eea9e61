"""Conditioning datasets: pictures that go along with those of other datasets, such as masks and references.

A conditioning dataset has no captions, sizes and sampling of its own. Its file of the same name as a picture (whatever the
suffix) belongs to that picture, and is resized and cropped as that picture is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.data.backend import DataBackend, DatasetOptions
from simpletuner.data.cache_place import CachePlace
from simpletuner.data.columns import open_place
from simpletuner.data.entries import Findings
from simpletuner.errors import choose

MASKS = ("mask", "segmentation")
REFERENCES = ("reference_strict", "reference_loose")
KINDS = (*MASKS, *REFERENCES)
OWN_KEYS = frozenset(
    {"id", "type", "dataset_type", "disabled", "conditioning_type", "source_dataset_id", "cache_dir_vae", "image_embeds", "metadata_backend"}
)
"""Keys of an image dataset that mean something here, besides those of its place."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """One enabled conditioning dataset."""

    id: str
    kind: str
    """One of `KINDS`."""
    sources: tuple[str, ...]
    """Ids of the datasets with whose pictures its own go along."""
    backend_type: type[DataBackend]
    options: DatasetOptions
    """As written, for the backend."""
    latents_place: CachePlace
    index_folder: Path | None = None
    """Where its place may keep what it learns of its files."""

    @property
    def is_mask(self) -> bool:
        return self.kind in MASKS

    def open(self) -> DataBackend:
        """Give access to the files."""
        return open_place(self.backend_type, self.options, self.index_folder)

    def describe(self) -> str:
        """Say all of it in a line."""
        of = ", ".join(self.sources)
        return f"{self.id}: {self.kind} of {of}; files in {self.open().place}; cached in {self.latents_place}"


@dataclass(frozen=True, slots=True)
class Draft:
    """A conditioning entry that is right by itself, before it is known whose it is."""

    label: str
    options: DatasetOptions
    backend_type: type[DataBackend]
    latents_place: CachePlace
    index_folder: Path


def check_entry(label: str, written: DatasetOptions, findings: Findings) -> None:
    """Check what a conditioning entry says of itself, and say which of its keys have no effect."""
    if written.conditioning_type is None:
        findings.problems.append(f"{label}: conditioning_type is needed: one of {', '.join(KINDS)}")
    elif written.conditioning_type not in KINDS:
        asked = written.conditioning_type
        reason = ", which is not available yet" if asked == "controlnet" else f"; {choose(asked, KINDS, 'kinds')}"
        findings.problems.append(f"{label}: conditioning_type is {asked!r}{reason}")
    idle = sorted(key for key in written.model_fields_set & set(DatasetOptions.model_fields) if key not in OWN_KEYS)
    if idle:
        findings.notes.append(f"{label}: {', '.join(idle)} without effect: its files are resized and cropped as the pictures that they go along with")


def settle(
    drafts: Sequence[Draft], entries: Iterable[tuple[str, str, Mapping[str, Any]]], disabled: Iterable[str], findings: Findings
) -> list[Conditioning]:
    """Find out which conditioning dataset goes with which datasets; either side may name the other.

    Args:
        drafts: those that are right by themselves.
        entries: label, kind and keys of everything that is enabled, as it was written.
        disabled: ids of entries that are left out.
    """
    entries = list(entries)
    datasets = {entry["id"]: ids_of(entry.get("conditioning_data")) for _, kind, entry in entries if kind in ("image", "eval")}
    known = {entry["id"] for _, kind, entry in entries if kind == "conditioning"}
    absent = set(disabled)
    for name, wanted in datasets.items():
        for one in wanted:
            if one not in known and one not in absent:
                findings.problems.append(f"dataset {name!r}: conditioning_data names {one!r}; {choose(one, sorted(known), 'conditioning datasets')}")
            elif one in absent:
                findings.notes.append(f"dataset {name!r}: trained without its conditioning_data {one!r}, which is disabled")
    settled = []
    for draft in drafts:
        sources = sources_of(draft, datasets, absent, findings)
        if sources:
            kind = draft.options.conditioning_type or ""
            settled.append(Conditioning(draft.options.id, kind, sources, draft.backend_type, draft.options, draft.latents_place, draft.index_folder))
    findings.problems += doubled(settled)
    return settled


def sources_of(draft: Draft, datasets: Mapping[str, Sequence[str]], disabled: set[str], findings: Findings) -> tuple[str, ...]:
    """The datasets with which one goes; none if it is left out, or if something is wrong."""
    written = draft.options
    named = [name for name, wanted in datasets.items() if written.id in wanted]
    source = written.source_dataset_id
    if source is not None and source in disabled and not named:
        findings.notes.append(f"{draft.label}: left out, since its source_dataset_id {source!r} is disabled")
        return ()
    if source is not None and source not in datasets and source not in disabled:
        findings.problems.append(f"{draft.label}: source_dataset_id is {source!r}; {choose(source, list(datasets), 'datasets of pictures')}")
        return ()
    if source in datasets and source not in named:
        named.append(str(source))
    if not named:
        findings.problems.append(
            f"{draft.label}: no dataset uses it; name it in the conditioning_data of a dataset of pictures, or name that one in source_dataset_id"
        )
    return tuple(named)


def doubled(settled: Sequence[Conditioning]) -> list[str]:
    """Refuse two masks for one dataset."""
    owners: dict[str, str] = {}
    problems = []
    for one in settled:
        for source in one.sources if one.is_mask else ():
            if source in owners:
                problems.append(f"datasets {owners[source]!r} and {one.id!r} are both masks of {source!r}; a picture has one mask")
            owners.setdefault(source, one.id)
    return problems


def ids_of(value: Any) -> tuple[str, ...]:
    """`conditioning_data` as it was written, an id or a list of them; what is neither is refused where its dataset is checked."""
    several = value if isinstance(value, list) else [value]
    return tuple(one for one in several if isinstance(one, str))

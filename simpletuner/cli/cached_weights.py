"""Quantised bases among the caches: what `simpletuner cache` says of them and does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.console import MEGABYTE, Console, in_megabytes
from simpletuner.errors import ConfigError
from simpletuner.memory.weight_shelf import Shelf, drop, faults_of, find_shelves, sweep_roots, unused
from simpletuner.options.train_config import TrainConfig

KIND = "weights"
FOREIGN = (
    "none of its {count} quantised bases is the one that this config uses on this machine, so none is dropped. Another precision, dtype or device"
    " has one of its own: train first, or delete the folder to be rid of them all."
)


def rows(shelves: Iterable[Shelf]) -> list[dict[str, Any]]:
    """What `ls --json` says of them, in the keys that other caches have."""
    return [
        {"folder": str(one.folder), "about": {"kind": KIND, **one.about}, "entries": one.layers, "bytes": one.bytes, "last_used": one.used}
        for one in shelves
    ]


def made_of(about: Mapping[str, str]) -> str:
    """The base and how it is held, for the table."""
    return f"{about['base']}, {about['precision']}, {about['dtype']}, on {about['device']}" if "base" in about else "-"


def verified(shelves: Iterable[Shelf], console: Console, deletes: bool) -> list[dict[str, Any]]:
    """Read them whole, and give what `verify` reports of each; one with a fault is of no use, and deleted as a whole if that is asked."""
    report = []
    for shelf in shelves:
        with console.bar(f"verify {shelf.folder}", shelf.bytes // MEGABYTE, "MB") as bar:
            faults = faults_of(shelf, in_megabytes(bar))
        if faults and deletes:
            drop(shelf)
        damaged = [{"key": name, "file": name, "problem": problem, "about": {"kind": KIND, **shelf.about}} for name, problem in faults.items()]
        report.append({"folder": str(shelf.folder), "entries": shelf.layers, "damaged": damaged, "lost": {}, "files": {}, "deleted": deletes})
    return report


def collected(
    roots: Sequence[Path], use: Callable[[], Sequence[Path | None]] | None, before: float | None, console: Console, *, is_dry: bool
) -> list[dict[str, Any]]:
    """Delete the quantised bases that are not used, and give what `gc` reports, a row for each.

    Args:
        roots: folders to look in.
        use: gives what each config keeps, asked only if there is anything; None is no config, and age alone counts.
        before: only what no run has read since, in seconds since 1970.
    """
    shelves = find_shelves(roots)
    if not shelves:
        return []
    if not is_dry:
        sweep_roots(shelves)
    used = None if use is None else [folder for folder in use() if folder is not None]
    gone = unused(shelves, used, before)
    if used and not {one.folder.resolve() for one in shelves} & {folder.resolve() for folder in used} and before is None:
        console.warn(f"{shelves[0].folder.parent}: {FOREIGN.format(count=len(shelves))}")
        gone = []
    for shelf in gone if not is_dry else ():
        drop(shelf)
    return [
        {
            "folder": str(one.folder),
            "kept": 0 if one in gone else one.layers,
            "dropped": one.layers if one in gone else 0,
            "files": 0,
            "bytes": one.bytes if one in gone else 0,
        }
        for one in shelves
    ]


def roots_of(named: Sequence[str], config: TrainConfig | None) -> list[Path]:
    """Where `gc` looks for quantised bases: those of the folders named that hold some, or else the config's.

    Raises:
        ConfigError: one of them is not the config's.
    """
    own = None if config is None else Path(config.data.cache_dir) / KIND
    if not named:
        return [] if own is None else [own]
    roots = [root for root in map(Path, named) if any(root in (one.folder, one.folder.parent) for one in find_shelves([root]))]
    if own is not None and (foreign := [str(root) for root in roots if own.resolve() not in (root.resolve(), *root.resolve().parents)]):
        raise ConfigError(f"{', '.join(foreign)} holds quantised bases that are not of this config", hint=f"It keeps its own in {own}.")
    return roots

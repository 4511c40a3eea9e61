"""What `simpletuner cache` says of caches: the words and figures of its tables and lines."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.console import Console

KINDS = {"mask": "masks"}
"""Kinds of entries to what many of them are called, where that differs."""


def kind_of(about: Mapping[str, str]) -> str:
    """What entries are, as a word for many."""
    kind = about.get("kind", "-")
    return KINDS.get(kind, kind)


def made_by(about: Mapping[str, str]) -> str:
    """The VAE or encoders that made an entry, by the first letters of their digest."""
    return " ".join(f"{name} {value[:8]}" for name, value in sorted(about.items()) if name != "kind") or "-"


def day(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def tell(found: Mapping[str, Any], console: Console, words: Sequence[str]) -> None:
    """Print what `verify` found in one folder."""
    damaged, lost, is_deleted = found["damaged"], found["lost"], found["deleted"]
    name = found["folder"]
    is_known_by = words if name.startswith("s3://") else ()
    collect_it = f"`{shlex.join(['simpletuner', 'cache', 'gc', name, *is_known_by])}`"
    counts = [f"{len(damaged):,} damaged"] if damaged else []
    counts += [f"{total_lost(lost)} lost"] if lost else []
    console.say(f"{name}: {found['entries']:,} entries, {', '.join(counts) or 'all whole'}")
    for one in damaged:
        what = one["about"].get("sample") or one["about"].get("prompt") or one["key"]
        console.say(f"  {what[:100]}: {one['problem']} ({one['file']}, {one['key'][:8]})")
    for file, fault in found["files"].items():
        loss = f"entries lost: {total_lost({file: lost[file]})}" if file in lost else f"no entry is lost, {collect_it} writes it anew"
        console.say(f"  {file}: {fault}; {loss}")
    if damaged:
        console.say("  dropped; the next run makes them again" if is_deleted else "  --delete drops them; a run makes each again when it needs it")
    if lost and is_deleted:
        console.say("  what was whole in files that lost entries is in new files; training makes the lost entries anew")
    elif lost:
        console.say(f"  training makes the lost entries anew; --delete, or {collect_it}, keeps what is whole in such a file and deletes the file")


def total_lost(lost: Mapping[str, int | None]) -> str:
    """How many entries some files lost, as far as that is known."""
    known = sum(count or 0 for count in lost.values())
    return f"{known:,}" if None not in lost.values() else f"{known:,} and an unknown number more" if known else "an unknown number"

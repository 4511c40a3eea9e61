"""Images in tar shards, as webdataset has them: the files of one sample share their name up to the suffix."""

from __future__ import annotations

import glob
import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from simpletuner.data.backend import DataBackend, DatasetOptions, Entry, check_name, readable, refused, stamp
from simpletuner.data.backends.local import is_inside
from simpletuner.data.captions import STRATEGIES, decode
from simpletuner.data.columns import captions_in
from simpletuner.data.faults import FOREIGN_SUFFIXES, SUFFIXES
from simpletuner.data.tar_book import TarBook, Told
from simpletuner.data.tars import Member, Shard
from simpletuner.errors import DatasetError

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXT_BYTES = 1 << 20
"""More than a caption or the description of a sample has; longer ones are not looked at."""


class WebdatasetOptions(DatasetOptions):
    """Keys of an image dataset in tar shards."""

    source: str
    """A folder of .tar files, one such file, or a pattern: `shards/train-*.tar`."""

    @property
    def knows_captions(self) -> bool:
        return True


class WebdatasetBackend(DataBackend):
    """Tar files, read where they lie and never unpacked. A file is named `<shard>/<its name there>`.

    A stamp is made of the shard's size and time of change and of the file's place in it: a shard that is written anew is read anew.
    What the shards hold is kept in a `TarBook`.
    """

    options_type = WebdatasetOptions

    def __init__(self, options: WebdatasetOptions) -> None:
        self._options = options
        self._book = TarBook(None)
        self._lock = threading.Lock()

    def keep_in(self, folder: Path) -> None:
        self._book = TarBook(folder / "tars" / f"{self._options.id}.sqlite")

    @property
    def place(self) -> str:
        return self._options.source

    def missing(self) -> str | None:
        paths = self._paths()
        if packed := [path for path in paths if path.lower().endswith(PACKED)]:
            name = os.path.basename(packed[0])
            return f"{self.place} holds packed shards ({name}), which cannot be read in places; unpack them to .tar, e.g. by gunzip"
        if not paths:
            root = os.path.expanduser(self.place)
            what = "holds no .tar files" if os.path.isdir(root) else "is neither a folder nor a .tar file here, nor a pattern that any file fits"
            return f"source {self.place} {what}"
        return None

    def list(self) -> Iterator[Entry]:
        yield from sorted(self._entries(), key=lambda entry: entry.name)

    def _entries(self) -> Iterator[Entry]:
        names = {shard.path: name for name, shard in self._shards.items()}
        shards = [*self._shards.values()]
        splits = not self._options.disable_multiline_split
        for shard, told in self._book.captions(shards, captions_told) if self._wants_captions else ((shard, {}) for shard in shards):
            name = names[shard.path]
            if not shard.is_whole:
                yield Entry(name, shard.size_bytes, shard.modified_ns, fault="truncated" if shard.members else "broken")
            for inner, member in sorted(shard.members.items()):
                if readable(inner) != inner:
                    yield Entry(f"{name}/{readable(inner)}", 0, 0, fault="unreadable")
                elif member.fault == "outside":
                    yield refused(f"{name}/{inner}")
                else:
                    mark = stamp(shard.size_bytes, shard.modified_ns, member.offset)
                    yield Entry(f"{name}/{inner}", member.size_bytes, mark, member.fault, alternatives(told.get(inner), splits))

    def read(self, name: str) -> bytes:
        shard, member = self._find(name)
        return shard.read(member, member.size_bytes)

    def read_head(self, name: str, count: int) -> bytes:
        shard, member = self._find(name)
        return shard.read(member, count)

    def exists(self, name: str) -> bool:
        try:
            self._find(name)
        except NotInShardError:
            return False
        return True

    def _find(self, name: str) -> tuple[Shard, Member]:
        check_name(name)
        for end in range(len(name)):
            if name[end] == "/" and (shard := self._shards.get(name[:end])) is not None:
                member = shard.members.get(name[end + 1 :])
                if member is not None and member.fault is None:
                    return shard, member
        raise NotInShardError(f"{self.place} holds no file {name!r} that may be read")

    @property
    def _wants_captions(self) -> bool:
        """Whether the captions in the shards are asked for; else many small reads would be for nothing."""
        strategy = self._options.caption_strategy
        return strategy is None or (strategy in STRATEGIES and STRATEGIES[strategy].is_of_place)

    @property
    def _shards(self) -> dict[str, Shard]:
        with self._lock:
            return self._indexed

    @cached_property
    def _indexed(self) -> dict[str, Shard]:
        """Read the headers of every shard, once; by the shard's name from the folder that all of them have in common."""
        if fault := self.missing():
            raise DatasetError(fault)
        root = self._root()
        found = self._book.shards([Path(path) for path in self._paths()])
        return {name: found[path] for name, path in sorted((PurePosixPath(os.path.relpath(path, root)).as_posix(), path) for path in found)}

    def _root(self) -> str:
        root = os.path.expanduser(self.place)
        if os.path.isdir(root):
            return root
        fixed = root if not glob.has_magic(root) else root[: min(root.find(letter) for letter in "*?[" if letter in root)]
        return os.path.dirname(fixed)

    def _paths(self) -> Sequence[str]:
        """The shards, folders in the folder included; links that lead out of it are left alone."""
        given = os.path.expanduser(self.place)
        kinds = (".tar", *PACKED)
        if not os.path.isdir(given):
            found = glob.glob(given, recursive=True) if glob.has_magic(given) else [given]
            return sorted(path for path in found if os.path.isfile(path) and path.lower().endswith(kinds))
        root = os.path.realpath(given)
        found = [path for path in glob.glob(os.path.join(glob.escape(given), "**", "*"), recursive=True) if path.lower().endswith(kinds)]
        return sorted(path for path in found if os.path.isfile(path) and is_inside(os.path.realpath(path), root))


class NotInShardError(DatasetError):
    """No shard has a file of this name."""


def captions_told(shard: Shard) -> Told:
    """Of each image the captions that the .json file beside it says as "caption", else the text of its .txt file."""
    told: Told = {}
    for inner in shard.members:
        stem, suffix = os.path.splitext(inner)
        if suffix.lower() in SUFFIXES | FOREIGN_SUFFIXES:
            captions = captions_in(described(text)) if (text := text_in(shard, f"{stem}.json")) else ()
            if found := list(captions) or text_in(shard, f"{stem}.txt"):
                told[inner] = found
    return told


def alternatives(told: list[str] | str | None, splits_lines: bool) -> tuple[str, ...] | None:
    """The captions of an image; each line of a text is one."""
    if isinstance(told, str):
        told = told.splitlines() if splits_lines else [told]
    return captions_in(told or ()) or None


def text_in(shard: Shard, inner: str) -> str:
    """The text of a small file of a shard; nothing if there is none."""
    member = shard.members.get(inner)
    return decode(shard.read(member, TEXT_BYTES))[0] if member and member.fault is None and member.size_bytes <= TEXT_BYTES else ""


def described(text: str) -> object:
    """The caption in a sample's .json file: a text, or a list of alternatives; None if it has none or is damaged."""
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    return facts.get("caption") if isinstance(facts, dict) else None

"""Quantised layers on disk, so that the next start of a run on the same base reads them instead of quantising again.

A folder holds the layers of one file of weights by one recipe, and is named by both: nothing in it can be stale. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1 << 28
"""Written at a time, since writing takes as much memory again."""
NOTES = "notes"
SEAL = "complete.json"
"""Which layers each shard holds. Its time of change is when the folder was last read."""
ABOUT = "about.json"
"""What the layers were made of, for people, and the SHA-256 of each shard."""
READ_BYTES = 1 << 22


class WeightStore:
    """The layers of one network by one recipe: read if they are there, and gathered if not."""

    def __init__(self, folder: Path, may_write: bool, warn: Callable[[str], object], about: Mapping[str, str] = MappingProxyType({})) -> None:
        """
        Args:
            folder: its name must tell the weights and the recipe.
            may_write: whether what is not there is kept; of several processes one should.
            about: what they are, in words, to be read by `cache ls`.
        """
        self._folder, self._warn, self._about = folder, warn, dict(about)
        self._shards, self._known = _shards_of(folder), _digests_of(folder)
        self._staged = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        self._writes = may_write and not self._shards
        if self._writes:
            sweep(folder.parent)
        self._open = ""
        self._tensors: dict[str, Tensor] = {}
        self._notes: dict[str, str] = {}
        self._waiting: dict[str, Tensor] = {}
        self._written: dict[str, list[str]] = {}
        self._digests: dict[str, str] = {}

    def read(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """A layer's tensors, as views of a file, and its note; None if it is not kept."""
        shard = self._shards.get(name)
        if shard is None:
            return None
        if shard != self._open:  # layers are asked for in the order in which they were written
            try:
                is_whole = self._known.get(shard) in (None, sha256_of(self._folder / shard))
                self._open, self._tensors, self._notes = shard, *_contents(self._folder / shard)
            except (OSError, SafetensorError):  # somebody deleted it
                is_whole = False
            if not is_whole:
                self._leave(shard)
                return None
            with suppress(OSError):  # another user's
                os.utime(self._folder / SEAL)
        return {key.removeprefix(name + "/"): tensor for key, tensor in self._tensors.items() if key.startswith(name + "/")}, self._notes[name]

    def _leave(self, shard: str) -> None:
        """Read no further: the layers that are left are quantised, and the next start makes the folder anew."""
        self._warn(f"{self._folder / shard} is damaged or gone: its layers, and those after them, are quantised again")
        self._shards, self._open = {}, ""
        with suppress(OSError):
            (self._folder / SEAL).unlink(missing_ok=True)

    def write(self, name: str, tensors: Mapping[str, Tensor], note: str) -> None:
        """Keep a layer; its tensors are copied to host memory until enough wait to be written."""
        if not self._writes:
            return
        self._waiting |= {f"{name}/{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._notes[name] = note
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= SHARD_BYTES:
            self._flush()

    def seal(self) -> None:
        """Let the layers be found, now that all are here."""
        self._flush()
        if not self._writes or not self._written:
            return
        try:
            (self._staged / ABOUT).write_text(json.dumps({"about": self._about, "sha256": self._digests}, indent=1) + "\n", encoding="utf-8")
            (self._staged / SEAL).write_text(json.dumps(self._written), encoding="utf-8")
            if not _shards_of(self._folder):
                shutil.rmtree(self._folder, ignore_errors=True)  # of what is damaged there
            os.replace(self._staged, self._folder)
        except OSError as error:  # another run was first, or the disk is full
            self._give_up(error)

    def _flush(self) -> None:
        if not self._writes or not self._waiting:
            return
        shard = f"layers-{len(self._written):05d}.safetensors"
        try:
            self._staged.mkdir(parents=True, exist_ok=True)
            save_file(self._waiting, self._staged / shard, {NOTES: json.dumps(self._notes)})
            self._digests[shard] = sha256_of(self._staged / shard)
        except (OSError, SafetensorError) as error:
            self._give_up(error)
            return
        self._written[shard] = sorted(self._notes)
        self._waiting, self._notes = {}, {}

    def _give_up(self, error: Exception) -> None:
        """Go on without: nothing depends on what is kept here."""
        self._writes, self._waiting = False, {}
        shutil.rmtree(self._staged, ignore_errors=True)
        if not _shards_of(self._folder):
            self._warn(f"the quantised weights are not kept in {self._folder}: {error}; the next start quantises again")


def sha256_of(file: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """The digest of a file's bytes, in hexadecimal; `advance` is told of each part that was read."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _shards_of(folder: Path) -> dict[str, str]:
    """The shard that each layer is in, by the layer's name, if the folder is whole."""
    try:
        written: dict[str, list[str]] = dict(json.loads((folder / SEAL).read_text(encoding="utf-8")))
        for shard in written:
            with safe_open(folder / shard, framework="pt"):  # refuses what is cut short
                pass
    except (OSError, ValueError, TypeError, SafetensorError):
        return {}
    return {name: shard for shard, names in written.items() for name in names}


def _digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each shard, as far as they are known."""
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def sweep(root: Path) -> None:
    """Delete what runs that ended in the middle had gathered, on this machine."""
    for staged in root.glob("*.tmp"):
        writer = staged.suffixes[-2].removeprefix(".") if len(staged.suffixes) > 1 else ""
        if writer.isdecimal() and (int(writer) == os.getpid() or not _is_alive(int(writer))):
            shutil.rmtree(staged, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        notes: dict[str, str] = json.loads(file.metadata()[NOTES])
        return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118

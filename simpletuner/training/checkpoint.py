"""Checkpoints that survive a crash: staged, written with a manifest last, synced, renamed; verified before use and before deletion.

<output_dir>/checkpoint-<step>/     the adapter or denoiser, optimizer.pt, training_state.json, ..., manifest.json
<output_dir>/checkpoint-<step>.tmp/ one never finished, or half deleted; swept at the next save
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def _always() -> None:
    """Go on."""


def _none(steps: Collection[int]) -> int | None:
    """Keep none besides."""
    return None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One finished checkpoint folder."""

    step: int
    folder: Path

    def problem(self) -> str | None:
        """Say what is wrong with it, comparing every file with the manifest; None if nothing is."""
        try:
            return self._compare(json.loads((self.folder / MANIFEST).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return f"it has no {MANIFEST}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"it cannot be read, or its {MANIFEST} makes no sense ({error})"

    def _compare(self, manifest: dict[str, Any]) -> str | None:
        if manifest["step"] != self.step or not manifest["files"]:
            return f"its {MANIFEST} is of another checkpoint, or empty"
        for name, wanted in manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            if digest_of(path) != wanted["blake2b"]:
                return f"{name} does not have the bytes that were written"
        return None


class CheckpointFolder:
    """The checkpoints of one output folder."""

    def __init__(
        self, output_dir: Path, limit: int | None, warn: Callable[[str], None], best: Callable[[Collection[int]], int | None] = _none
    ) -> None:
        """
        Args:
            limit: how many to keep; None or 0 keeps all.
            warn: told of each damaged checkpoint.
            best: gives which one of some steps is to be kept besides.
        """
        self._output_dir, self._limit, self._warn, self._best = output_dir, limit, warn, best

    def all(self) -> list[Checkpoint]:
        """Every finished checkpoint, oldest first, verified or not."""
        if not self._output_dir.is_dir():
            return []
        found = []
        for folder in self._output_dir.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            if match and folder.is_dir():
                found.append(Checkpoint(int(match[1]), folder))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are named and passed over."""
        for checkpoint in reversed(self.all()):
            problem = checkpoint.problem()
            if problem is None:
                return checkpoint
            self._warn(f"checkpoint {checkpoint.folder.name} is damaged and not used: {problem}")
        return None

    def supersede(self, step: int) -> Path | None:
        """Move checkpoints after `step` aside: the run continues from there and will write its own.

        Returns:
            The folder that holds them now, or None if there were none.
        """
        later = [checkpoint for checkpoint in self.all() if checkpoint.step > step]
        if not later:
            return None
        number = 1
        while (aside := self._output_dir / f"superseded-{number}").exists():
            number += 1
        aside.mkdir()
        for checkpoint in later:
            os.replace(checkpoint.folder, aside / checkpoint.folder.name)
        return aside

    def save(self, step: int, write: Callable[[Path], None], go_on: Callable[[], None] = _always) -> Checkpoint:
        """Make the checkpoint of `step`: `write` fills an empty folder, which takes its name only when all is on disk.

        Older checkpoints beyond the limit are deleted after the new one was verified.

        Args:
            go_on: is called now and then until it has its name, and may raise to give it up.
        """
        checkpoint = Checkpoint(step, self._output_dir / f"checkpoint-{step}")
        if checkpoint.folder.exists() and checkpoint.problem() is None:
            return checkpoint
        self._output_dir.mkdir(parents=True, exist_ok=True)
        for stale in self._output_dir.glob("checkpoint-*.tmp"):
            shutil.rmtree(stale)
        if checkpoint.folder.exists():
            discard(checkpoint.folder)  # damaged, or it would have been returned above
        staged = checkpoint.folder.with_name(checkpoint.folder.name + ".tmp")
        staged.mkdir()
        write(staged)
        _write_manifest(staged, step, go_on)
        _sync_tree(staged, go_on)
        os.replace(staged, checkpoint.folder)
        _sync(self._output_dir)
        self._rotate(checkpoint)
        return checkpoint

    def _rotate(self, newest: Checkpoint) -> None:
        if not self._limit:
            return
        problem = newest.problem()
        if problem is not None:
            self._warn(f"{newest.folder.name} does not verify after writing ({problem}); older checkpoints are kept")
            return
        there = self.all()
        older = [checkpoint for checkpoint in there if checkpoint.step < newest.step]
        best = self._best([checkpoint.step for checkpoint in there])
        for checkpoint in older[: max(0, len(older) - (self._limit - 1))]:
            if checkpoint.step != best:
                discard(checkpoint.folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint: it loses its name first, so that one half deleted is never taken for a whole one."""
    doomed = folder.with_name(folder.name + ".tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def digest_of(path: Path, go_on: Callable[[], None] = _always) -> str:
    """BLAKE2b of a file, 32 hex letters."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            go_on()
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(folder: Path, step: int, go_on: Callable[[], None]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": digest_of(path, go_on)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"step": step, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _sync_tree(folder: Path, go_on: Callable[[], None]) -> None:
    for path in folder.rglob("*"):
        go_on()
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

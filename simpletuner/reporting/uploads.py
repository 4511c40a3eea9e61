"""Uploads beside the training: one at a time, the newest first, in processes of their own.

A process because an upload hashes and compresses what it sends, which would take turns with the training step, and because one that hangs
can be ended. It is `simpletuner push`, which does the same by hand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.reporting.hub import files_of

POLL_SECONDS, END_SECONDS = 0.1, 5.0
LIMIT_SECONDS, LEAST_BYTES_A_SECOND = 600.0, 250_000
"""An upload that takes longer than so long, and its bytes at that rate, is taken for one that hangs."""
OF_ONE_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SIMPLETUNER_FAILURES")
"""Variables by which a process of a training run is known; an upload is none."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Something to be uploaded."""

    folder: Path
    message: str
    """Of the commit."""
    origin: Path
    """What to upload by hand, should it fail."""

    @property
    def is_copy(self) -> bool:
        return self.folder != self.origin


class Uploads:
    """The uploads of a run to one repository. Its failures are named, and never raised."""

    def __init__(self, repository: str, private: bool, place: Path, warn: Callable[[str], None], is_stopped: Callable[[], bool]) -> None:
        """
        Args:
            place: folder for what waits; on the disk of what is uploaded.
            is_stopped: asked while one is waited for; once it says yes, no more is uploaded.
        """
        self._repository, self._private, self._place, self._warn, self._is_stopped = repository, private, place, warn, is_stopped
        self._lock = threading.Lock()
        self._waiting: Parcel | None = None
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._has_ended = False
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed

    def offer(self, checkpoint: Path, beside: Mapping[str, Path], message: str) -> None:
        """Have a checkpoint uploaded when the one in hand is done. It may be deleted meanwhile: its files are kept by links.

        Args:
            beside: further files, by their paths in the repository.
        """
        parcel = Parcel(stage({**files_of(checkpoint), **beside}, self._place / checkpoint.name), message, checkpoint)
        with self._lock:
            if self._has_ended:
                return
            left_out, self._waiting = self._waiting, parcel
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
        if left_out is not None:
            shutil.rmtree(left_out.folder, ignore_errors=True)
            self._warn("uploads take longer than the time between checkpoints: some checkpoints are not published")

    def finish(self, folder: Path, message: str) -> str | None:
        """Upload what a run ends with, after the one in hand; what waits is left out. Gives the address of the page, or None."""
        with self._lock:
            self._waiting = None
        self.wait()
        with self._lock:
            if self._has_ended:
                return None
        return self._upload(Parcel(folder, message, folder))

    def wait(self) -> None:
        """Wait until nothing is to be uploaded, or the run is to stop."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join(POLL_SECONDS)
            if self._is_stopped():
                self.close()

    def close(self) -> None:
        """End the upload in hand, and begin no other."""
        with self._lock:
            self._has_ended, self._waiting, process = True, None, self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if (thread := self._thread) is not None:
            thread.join(END_SECONDS)
        shutil.rmtree(self._place, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._lock:
                parcel, self._waiting = self._waiting, None
                if parcel is None:
                    self._thread = None
                    return
            self._upload(parcel)
            shutil.rmtree(parcel.folder, ignore_errors=True)

    def _upload(self, parcel: Parcel) -> str | None:
        size = sum(path.stat().st_size for path in files_of(parcel.folder).values())
        words = [sys.executable, "-m", "simpletuner", "push", str(parcel.folder), "--to", self._repository, "--message", parcel.message]
        environment = {name: value for name, value in os.environ.items() if name not in OF_ONE_PROCESS}
        with self._lock:
            if self._has_ended:
                return None
            process = self._process = subprocess.Popen(
                [*words, *([] if self._private else ["--public"])],
                env={**environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=os.name != "nt",  # a terminal's Ctrl-C is for the run, which ends its uploads itself
            )
        told, complaint = self._answer(process, LIMIT_SECONDS + size / LEAST_BYTES_A_SECOND)
        if process.returncode == 0:
            return told.strip().rpartition(" ")[2]
        is_ended = self._has_ended
        reason = "the upload was stopped" if is_ended else complaint or f"the upload ended with {process.returncode}"
        again = shlex.join(["simpletuner", "push", str(parcel.origin), "--to", self._repository, *([] if self._private else ["--public"])])
        self._warn(f"{parcel.origin.name} was not published: {reason}. It is whole on this disk; to publish it: {again}")
        return None

    def _answer(self, process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
        """What an upload said, and what it complained of; it is ended if the run is to stop, or if it takes longer than so many seconds."""
        deadline, is_late = time.monotonic() + seconds, False
        while True:
            try:
                told, complaint = process.communicate(timeout=POLL_SECONDS)
                if is_late:
                    return told, f"the hub had not taken it within {seconds / 60:.0f} minutes"
                return told, complaint.strip().rpartition("error: ")[2].partition("\n")[0]
            except subprocess.TimeoutExpired:
                if threading.current_thread() is threading.main_thread() and self._is_stopped():
                    self._has_ended = True
                    process.terminate()
                elif time.monotonic() > deadline:
                    is_late = True
                    (process.kill if time.monotonic() > deadline + END_SECONDS else process.terminate)()


def stage(files: Mapping[str, Path], place: Path) -> Path:
    """Give files a second name under a folder, by their paths there; copies where the disk has no links."""
    shutil.rmtree(place, ignore_errors=True)
    for name, path in files.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    return place

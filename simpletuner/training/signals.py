"""SIGINT and SIGTERM end a run without losing it: the step is finished, a checkpoint saved, and the exit code says so."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from simpletuner.errors import Stopped

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
CONTINUE = "Run the same command again to continue."


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """End the process while its libraries are still being imported: an exception would come out of them as some other one."""
    print("stopped before anything was done", file=sys.stderr, flush=True)
    os._exit(EXIT_CODES[signal.Signals(number)])


def how_to_continue(resume_from_checkpoint: str | None) -> str:
    """What to do after a stop; the same command continues only where it asks for the latest checkpoint."""
    return CONTINUE if resume_from_checkpoint == "latest" else "Run it again with --resume_from_checkpoint=latest to continue."


class StopRequest:
    """Whether a signal has asked this process to stop.

    While caches are filled the signal raises at once, since every entry is whole or absent; `deferred()` makes
    it wait for the end of a step. A second signal of either kind acts at once.
    """

    def __init__(self, how_to_continue: str = CONTINUE, stopped: Callable[[int], Stopped] | None = None) -> None:
        """
        Args:
            stopped: gives what to raise, by the exit code, where there is no training; at the first signal as at a second.
        """
        self.how_to_continue = how_to_continue
        self._stopped = stopped
        self.exit_code: int | None = None
        self.is_urgent = False
        """Whether a second one came, which waits for nothing."""
        self._is_deferred = False

    @property
    def is_made(self) -> bool:
        return self.exit_code is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over both signals while the body runs."""
        before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals only be noted while the body runs."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Let whatever the body raises after a signal be the stop that was asked for.

        A signal may come while a library is being imported or is at work in C; libraries wrap what is raised there in errors of
        their own, or lose it and fail a moment later.
        """
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if self.exit_code is None:
                raise
            raise self._before_training() from error

    def at_once(self) -> Stopped:
        """What a second signal ends with."""
        assert self.exit_code is not None
        where = f"The newest checkpoint is from before this step. {self.how_to_continue}"
        return Stopped("stopped at once by a second signal", where, exit_code=self.exit_code)

    def _before_training(self) -> Stopped:
        assert self.exit_code is not None
        if self._stopped is not None:
            return self._stopped(self.exit_code)
        return Stopped("stopped before training began", f"What was cached is kept. {self.how_to_continue}", exit_code=self.exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.is_made and self._stopped is None
        self.is_urgent = again
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        if again:
            raise self.at_once()
        if not self._is_deferred:
            raise self._before_training()

"""Entries written while the caller makes the next ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from torch import Tensor

from simpletuner.data.store import NewEntry, Store
from simpletuner.errors import SimpleTunerError


class WriteBehind:
    """A thread that puts entries while the caller makes the next ones; its errors reach the caller at the next put or at the end."""

    def __init__(self, ahead: int) -> None:
        """
        Args:
            ahead: entries that may wait to be written, and so be lost to a `kill -9`. All that wait are written together.
        """
        self._ahead = max(1, ahead)
        self._waiting: deque[tuple[Store, NewEntry]] = deque()
        self._in_hand = 0
        self._changed = threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._stores: set[Store] = set()
        self._thread = threading.Thread(target=self._write, name="cache-writer", daemon=True)
        self._thread.start()

    def put(self, store: Store, key: str, tensors: Mapping[str, Tensor], describe: Mapping[str, str]) -> None:
        """Hand over an entry; waits only while too many are waiting already."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._waiting) + self._in_hand < self._ahead)
            self._raise_error()
            self._waiting.append((store, (key, tensors, describe)))
            self._stores.add(store)
            self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._in_hand = 0
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_over)
                if not self._waiting:
                    return
                batch = list(self._waiting)
                self._waiting.clear()
                self._in_hand = len(batch)
            for store in dict.fromkeys(store for store, _ in batch):
                try:
                    store.put_many([entry for kept_in, entry in batch if kept_in is store])
                except BaseException as error:
                    self._error = self._error or error

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Also after an error all that was handed over is written: it was encoded, and it is whole.
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        for store in self._stores:
            try:
                store.close()
            except SimpleTunerError as problem:
                self._error = self._error or problem
        if error is None:
            self._raise_error()

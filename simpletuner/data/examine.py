"""Many small looks at many files, on several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def examined(items: Sequence[Item], examine: Callable[[Item], Found]) -> Iterator[tuple[Item, Found]]:
    """Examine items on several threads and give each with what was found, in no particular order.

    Threads take the next item by themselves: a header takes less time than a future would cost. What one look raises is
    raised here, and nothing further is begun; the same if the caller stops.
    """
    waiting = iter(items)
    done: SimpleQueue[tuple[Item, Found] | BaseException] = SimpleQueue()
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(waiting, None)
                if item is None:
                    return
                done.put((item, examine(item)))
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=work, name="file-reader") for _ in range(min(16, 2 * (os.cpu_count() or 1), len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            answer = done.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        stop.set()
        for thread in threads:
            thread.join()

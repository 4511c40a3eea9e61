"""The contract of a tracker, and how several are used at once without ever stopping a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import plugins
from simpletuner.errors import Stopped

if TYPE_CHECKING:
    from PIL.Image import Image


class Tracker(ABC):
    """One place where figures and pictures of a run go. Made on the main process only, when the loop begins."""

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        """
        Args:
            folder: where the tracker may write, the run's logging directory.
            project, run: names for services that group runs.
            config: the effective options by key, without secrets.
        """
        self.folder, self.project, self.run, self.config = folder, project, run, config

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of one optimizer step."""

    @abstractmethod
    def images(self, step: int, images: Mapping[str, Image]) -> None:
        """Take pictures by name."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still held."""


class Trackers:
    """Several trackers as one. A tracker that fails is named once and dropped; the run goes on."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._warn = warn

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def images(self, step: int, images: Mapping[str, Image]) -> None:
        self._each(lambda tracker: tracker.images(step, images))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Stopped:
                raise
            except Exception as error:  # any library's any failure: figures are worth less than the run
                self._trackers.remove(tracker)
                self._warn(f"tracker {type(tracker).__module__.rsplit('.', 1)[-1]!r} failed and is off for the rest of the run: {error}")


def start_trackers(report_to: str, folder: Path, project: str, run: str, config: Mapping[str, Any], warn: Callable[[str], None]) -> Trackers:
    """Make the trackers that `report_to` names: a comma list, `none`, or `all`. One that cannot start is named and left out.

    Raises:
        ConfigError: a name is no tracker's.
    """
    folder_name = "simpletuner.reporting.trackers"
    asked = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    if "all" in asked:
        asked = plugins.names(folder_name)
    kinds = [(name, plugins.load(folder_name, name, Tracker)) for name in dict.fromkeys(asked)]  # type: ignore[type-abstract]
    started = []
    for name, kind in kinds:
        try:
            started.append(kind(folder, project, run, config))
        except Stopped:
            raise
        except Exception as error:  # a missing package, no network, a full disk: the run matters more
            warn(f"tracker {name!r} did not start and is off for this run: {error}")
    return Trackers(started, warn)

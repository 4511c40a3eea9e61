"""The page of a run's model, kept up to date in its output folder, and its way to the hub. Neither ever ends a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from simpletuner.console import Console
from simpletuner.errors import ConfigError, SimpleTunerError, Stopped
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.hub import open_repository
from simpletuner.reporting.model_card import CARD_FILE, PICTURES_FOLDER, write_card
from simpletuner.reporting.uploads import Uploads
from simpletuner.training.card_facts import CardSource, progress_of
from simpletuner.training.finish import Result
from simpletuner.training.signals import StopRequest

WAITING = ".hub"
"""Folder in output_dir for what waits to be uploaded."""
LONGEST_NAME = 96
"""Letters in the name of a repository, its owner's not counted."""


def repository_name(config: TrainConfig) -> str:
    """The name of the repository that the options ask for, as the user would write it."""
    project = config.reporting.tracker_project_name
    usual = type(config.reporting).model_fields["tracker_project_name"].default  # would be the same for all runs of all projects
    name = config.hub.hub_model_id or (project if project != usual else Path(config.training.output_dir).resolve().name)
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_./") else "-" for letter in name)
    while "--" in kept or ".." in kept:
        kept = kept.replace("--", "-").replace("..", ".")
    owner, slash, own = kept.rpartition("/")
    own = own[:LONGEST_NAME].strip("-.") or "lora"
    return f"{owner.strip('-.')}{slash}{own}".lstrip("/")


def find_repository(config: TrainConfig, is_main: bool, console: Console) -> str:
    """Settle, before anything is loaded, where the run is published; empty if it is not. Only the first process asks the hub.

    Raises:
        ConfigError: there is no token, the hub does not accept it, or it may not write there. A hub that does not answer is only warned of.
    """
    if not (config.hub.push_to_hub and is_main):
        return ""
    name = repository_name(config)
    try:
        whole = open_repository(name, private=config.hub.model_card_private)
    except ConfigError:
        raise
    except SimpleTunerError as error:
        console.warn(f"push_to_hub: {error.message}. The run goes on, and asks again when there is something to publish")
        return name
    console.say(f"note: the result will be published as {whole}")
    return whole


class Publisher:
    """Writes the page when there is something new, and publishes what the options ask for. Made on all processes, used on the first alone."""

    def __init__(self, source: CardSource, repository: str, console: Console, stop: StopRequest) -> None:
        """
        Args:
            repository: as `find_repository` gives it.
        """
        self._source, self._repository, self._console, self._stop = source, repository, console, stop
        self._options = source.config.hub
        self._output_dir = Path(source.config.training.output_dir)
        self._uploads = (
            Uploads(repository, self._options.model_card_private, self._output_dir / WAITING, console.warn, lambda: stop.is_made)
            if repository
            else None
        )

    def saved(self, folder: Path) -> None:
        """Take up a new checkpoint, the last one excepted: after it comes what the run ends with."""
        step = int(folder.name.rpartition("-")[2])
        if step >= self._source.total_steps:
            return
        self._guarded(lambda: self._write_page(step, folder))
        if self._uploads is not None and self._options.push_checkpoints_to_hub and not self._source.adapter.trains_base:
            self._guarded(lambda: self._offer(step, folder))

    def finished(self, result: Result, step: int) -> None:
        """Write the page of what a run ends with, and publish that; a signal ends the upload and leaves it for later.

        Args:
            step: the last one that was taken.
        """
        is_average = result.folder.parent == self._output_dir and result.folder.name == "ema"
        folder, inside = (self._output_dir, "ema") if is_average else (result.folder, "")
        self._guarded(lambda: self._write_page(step, folder, inside, is_end=True))
        if self._uploads is not None:
            self._guarded(lambda: self._upload_result(step))

    def close(self) -> None:
        """End what is being uploaded."""
        if self._uploads is not None:
            self._uploads.close()

    def _write_page(self, step: int, folder: Path, inside: str = "", *, is_end: bool = False) -> None:
        asks_hub = is_end and self._uploads is not None
        write_card(self._output_dir, self._source.facts(step, folder, inside, asks_hub=asks_hub, is_end=is_end), self._repository or None)

    def _offer(self, step: int, folder: Path) -> None:
        assert self._uploads is not None
        self._uploads.offer(folder, page_files(self._output_dir), f"Step {step} of {self._source.total_steps}")
        if not self._options.push_to_hub_background:
            self._uploads.wait()

    def _upload_result(self, step: int) -> None:
        assert self._uploads is not None
        self._console.say(f"Uploading to {self._repository}; Ctrl-C leaves it for later")
        progress = progress_of(step, self._source.total_steps, is_end=True)
        address = self._uploads.finish(self._output_dir, progress[0].upper() + progress[1:])
        if address:
            self._console.say(f"Published: {address}")

    def _guarded(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Stopped:
            raise
        except Exception as error:  # a full disk, a picture that cannot be read, any library's any failure: the run matters more
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            self._console.warn(f"the page of the model ({CARD_FILE}) could not be written or published: {what}")


def page_files(folder: Path) -> Mapping[str, Path]:
    """The page of a model and its pictures, by their paths in the repository."""
    paths = (folder / CARD_FILE, *sorted((folder / PICTURES_FOLDER).glob("*.jpg")))
    return {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}

"""Weight files are read whole once, to say which they are: under a bar, since that takes a second a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from simpletuner.console import MEGABYTE, Console, in_megabytes
from simpletuner.models.family import ModelFamily
from simpletuner.models.identity import learn, unread
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.base import keeps_quantised

LARGE_BYTES = 128 * MEGABYTE
"""Less is read where it is asked for, in a moment."""


def identified_parts(config: TrainConfig, family: ModelFamily) -> list[str]:
    """The parts of a model of which a run has to know which they are: what caches depend on, and a base that is kept quantised."""
    keeps_base = keeps_quantised(config, family) and config.adapters.model_type != "full"
    return [name for name in family.parts if name != "scheduler" and (keeps_base or name != family.denoiser_folder)]


def learn_identities(family: ModelFamily, parts: Iterable[str], memo_folder: Path, console: Console) -> None:
    """Digest what was never read of the files of some parts, so that fingerprints ask for no more reading.

    Args:
        parts: names of the model's folders.
        memo_folder: where digests are remembered.
    """
    files = unread((path for part in parts for path in family.source.part(part).files().values()), memo_folder)
    size = sum(file.stat().st_size for file in files)
    if size < LARGE_BYTES:
        return
    with console.bar("identifying weights", size // MEGABYTE, "MB") as bar:
        learn(files, memo_folder, in_megabytes(bar))

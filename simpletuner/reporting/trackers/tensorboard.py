"""Figures and pictures as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.reporting.tracker import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoard(Tracker):
    """Event files in `<logging folder>/<run name>`; look with `tensorboard --logdir <logging folder>`."""

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        super().__init__(folder, project, run, config)
        from torch.utils.tensorboard.writer import SummaryWriter as Writer

        self._kind = Writer
        self._begun: SummaryWriter | None = None
        (folder / run).mkdir(parents=True, exist_ok=True)  # now, where it is a fault of the start

    def _writer(self, step: int) -> SummaryWriter:
        """The event file, which begins at a step: what files of before hold of this step and later ones is not shown any more."""
        if self._begun is None:
            self._begun = self._kind(str(self.folder / self.run), purge_step=step)
            settings = "\n".join(f"    {key} = {value}" for key, value in sorted(self.config.items()))
            self._begun.add_text("config", settings, step)
        return self._begun

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer(step).add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str]) -> None:
        import numpy

        writer = self._writer(step)
        for name, image in images.items():
            writer.add_image(f"validation/{name}", numpy.asarray(image.convert("RGB")), step, dataformats="HWC")
            if captions.get(name):
                writer.add_text(f"validation/{name}/prompt", captions[name], step)
        writer.flush()

    def close(self) -> None:
        if self._begun is not None:
            self._begun.close()

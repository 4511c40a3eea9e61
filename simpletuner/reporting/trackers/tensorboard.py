"""Figures and pictures as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.reporting.tracker import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image


class TensorBoard(Tracker):
    """Event files in `<logging folder>/<run name>`; look with `tensorboard --logdir <logging folder>`."""

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        super().__init__(folder, project, run, config)
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / run))
        self._writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in sorted(config.items())))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, Image]) -> None:
        import numpy

        for name, image in images.items():
            self._writer.add_image(f"validation/{name}", numpy.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

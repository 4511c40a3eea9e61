"""Figures as one JSON object a line, readable while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.reporting.tracker import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image


class Jsonl(Tracker):
    """`metrics.jsonl` in the logging folder; a resumed run appends to it. Pictures are only named."""

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        super().__init__(folder, project, run, config)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def images(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str]) -> None:
        self._file.write(json.dumps({"step": step, "images": sorted(images)}) + "\n")

    def close(self) -> None:
        self._file.close()

"""Figures and pictures on wandb.ai or a server of your own, or kept on disk for later with WANDB_MODE=offline."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.reporting.tracker import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

STEP = "global_step"
"""The axis of every chart: optimizer steps. The service's own steps never go back, and a resumed run may."""
FIRST_STEP = 1
FINISH_SECONDS = 25.0
COLUMNS = ("step", "name", "picture", "prompt")


class Wandb(Tracker):
    """One run of the service; `wandb-run.json` in the logging folder keeps its id, so that a resumed training goes on in it.

    The service is asked for at the first figures, in the tracker's own thread: one that does not answer holds nothing up.
    """

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        super().__init__(folder, project, run, config)
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None
        self._step, self._row = -1, -1
        self._memo = folder / "wandb-run.json"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._send(step, dict(values))

    def images(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str]) -> None:
        shown = {name: self._wandb.Image(image, caption=captions.get(name)) for name, image in images.items()}
        if self.config.get("tracker_image_layout") == "table":
            rows = [[step, name, picture, captions.get(name, "")] for name, picture in shown.items()]
            self._send(step, {"validation/pictures": self._wandb.Table(columns=list(COLUMNS), data=rows)})
        else:
            self._send(step, {f"validation/{name}": picture for name, picture in shown.items()})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        if self._run is None:
            self._run = self._begin(step)
            self._row = self._run.step - 1  # a run that is continued has rows
        if step != self._step:
            self._step, self._row = step, max(step, self._row + 1)  # a row below the last one would be thrown away
        self._run.log({**values, STEP: step}, step=self._row)

    def _begin(self, step: int) -> Any:
        """Begin the run, or go on in the one of the training that is resumed."""
        import wandb

        kept = self._kept() if step > FIRST_STEP else None
        name = kept or secrets.token_hex(4)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.setup().settings
        if not (settings._offline or settings._noop or is_logged_in()):
            raise RuntimeError("it is not logged in: run `wandb login`, or set WANDB_MODE=offline")
        # What was typed, and where the program lies, may hold secrets and paths; the console's output stays what it is.
        private: dict[str, Any] = {"x_disable_meta": True, "disable_git": True, "disable_code": True, "console": "off"}
        wanted = {**private, "quiet": True, "finish_timeout": FINISH_SECONDS}
        known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
        run = wandb.init(
            project=self.project,
            name=self.run,
            id=name,
            resume="allow",
            dir=str(self.folder),
            config=dict(self.config),
            settings=wandb.Settings(**known),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        self._memo.write_text(json.dumps({"id": name, "project": self.project}) + "\n", encoding="utf-8")
        return run

    def _kept(self) -> str | None:
        """The id of the run that this one continues."""
        try:
            memo = json.loads(self._memo.read_text(encoding="utf-8"))
            return str(memo["id"]) if memo["project"] == self.project else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def is_logged_in() -> bool:
    """Whether there are credentials; asks nobody."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # older releases
        return bool(wandb.api.api_key)

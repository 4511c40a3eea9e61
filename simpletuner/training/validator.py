"""When and what validation renders: the base model first, then the training at its interval, on averaged weights if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Image

from simpletuner.console import Console
from simpletuner.errors import Stopped
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.caching import Vae
from simpletuner.training.ema import Ema
from simpletuner.training.prompts import Picture
from simpletuner.training.validation import BASE_LABEL, Gallery, Interrupted, Renderer, label_of, settings_of


class Validator:
    """Renders on the main process; the others wait. Never touches what training computes."""

    def __init__(
        self,
        renderer: Renderer,
        vae: Vae,
        pictures: Sequence[Picture],
        output_dir: Path,
        config: TrainConfig,
        ema: Ema | None,
        trackers: Trackers,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self._renderer, self._vae, self._pictures = renderer, vae, list(pictures)
        self._options, self._ema = config.validation, ema
        self._trains_base = renderer.adapter.trains_base
        self._trackers, self._accelerator, self._console = trackers, accelerator, console
        settings = settings_of(config.models.model_family, config.validation, config.validation.validation_lycoris_strength)
        self._gallery = Gallery(output_dir / "validation_images", settings)

    def before_training(self, step: int) -> None:
        """Render the base model once a run, so that later pictures have something to stand beside; and the start, if asked."""
        if self._renders:
            if step == 0 and not self._options.disable_benchmark:
                strength = 1.0 if self._trains_base else 0.0  # before its first step a full model is the base
                self._show(0, BASE_LABEL, strength, nullcontext())
            if self._options.validation_on_startup:
                self._show_all(step)
        self._accelerator.wait_for_everyone()

    def validate(self, step: int) -> None:
        """Render what the training has come to after `step` steps. A failure is named, and the training goes on.

        Once the run is to stop this returns early; `catch_up` renders the pictures when the run is resumed.
        """
        if self._renders:
            try:
                self._show_all(step)
            except Interrupted:
                pass
            except Stopped:
                raise
            except Exception as error:  # out of memory, a full disk, a sampler's fault: pictures are worth less than the run
                what = str(error).strip().partition("\n")[0] or type(error).__name__
                self._console.warn(f"no pictures of step {step}: {what}. The training goes on")
        self._accelerator.wait_for_everyone()

    def catch_up(self, step: int) -> None:
        """Render the pictures of a step at which they were due, if the run ended before it came to them."""
        if self._renders and all(self._gallery.has(label, self._pictures) for label, _ in self._views(step)):
            self._accelerator.wait_for_everyone()
        else:
            self.validate(step)

    def move_later(self, step: int, aside: Path) -> None:
        """Put the pictures after `step` beside checkpoints that are not continued."""
        self._gallery.move_later(step, aside / self._gallery.folder.name)

    @property
    def grid(self) -> Path | None:
        """The grid over all steps, once there is one."""
        return self._gallery.grid if self._gallery.grid.is_file() else None

    @property
    def _renders(self) -> bool:
        return bool(self._pictures) and self._accelerator.is_main_process

    def _show_all(self, step: int) -> None:
        strength = 1.0 if self._trains_base else self._options.validation_lycoris_strength
        for label, weights in self._views(step):
            self._show(step, label, strength, weights)

    def _views(self, step: int) -> list[tuple[str, AbstractContextManager[None]]]:
        """Which weights are looked at, under which labels."""
        label, shows = label_of(step), self._options.ema_validation
        if self._ema is None or shows == "none":
            return [(label, nullcontext())]
        average = self._ema.swapped_in()
        return [(label, average)] if shows == "ema_only" else [(label, nullcontext()), (f"{label}_ema", average)]

    def _show(self, step: int, label: str, strength: float, weights: AbstractContextManager[None]) -> None:
        try:
            with weights, self._console.bar(f"pictures {label}", len(self._pictures), "pictures") as bar:
                images = self._renderer.render(self._pictures, strength, bar.advance)
        finally:
            self._vae.release()
        self._keep(step, label, images)

    def _suffix(self, label: str) -> str:
        """What tells pictures of one step apart in trackers."""
        return "_base" if label == BASE_LABEL else "_ema" if label.endswith("_ema") else ""

    def _keep(self, step: int, label: str, images: Sequence[Image]) -> None:
        grid = self._gallery.add(step, label, self._pictures, images)
        named = {f"{picture.file_stem}{self._suffix(label)}": image for picture, image in zip(self._pictures, images)}
        self._trackers.images(step, {**named, "grid": grid})

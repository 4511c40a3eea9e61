"""When and what validation renders: the base model first, then the training at its interval, on averaged weights if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Image

from simpletuner.console import Console
from simpletuner.errors import MemoryLimitError, Stopped
from simpletuner.memory.residency import release
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.caching import Vae
from simpletuner.training.ema import Ema
from simpletuner.training.prompts import Picture
from simpletuner.training.recovery import attempt_twice
from simpletuner.training.scoring import Scoring
from simpletuner.training.sharing import Share, of_first
from simpletuner.training.validation import BASE_LABEL, SUFFIXES, Gallery, Interrupted, Renderer, facts_of, label_of

NAMED = 5
"""Pictures that a message names."""


class Validator:
    """Renders, on all processes or on the first one, which writes. Never touches what training computes."""

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
        self._options, self._memory, self._ema = config.validation, config.memory, ema
        self._trains_base = renderer.adapter.trains_base
        self._trackers, self._accelerator, self._console = trackers, accelerator, console
        self._family, options = config.models.model_family, config.validation
        self._gallery = Gallery(output_dir / "validation_images", SUFFIXES[options.validation_image_format], options.validation_image_quality)
        self._scoring = Scoring(options, output_dir, accelerator.device, trackers, console)
        self._share = Share(accelerator) if options.validation_multigpu == "batch-parallel" else None

    def before_training(self, step: int) -> None:
        """Render the base model once a run, so that later pictures have something to stand beside; and the start, if asked.

        Raises:
            MemoryLimitError: there is too little memory for some at step 0, which is best known now that nothing is lost.
        """
        if self._renders:
            missing: list[str] = []
            if step == 0 and not self._options.disable_benchmark:
                self._trackers.events.stage("benchmark_base_model")
                strength = 1.0 if self._trains_base else 0.0  # before its first step a full model is the base
                missing += self._show(0, BASE_LABEL, strength, nullcontext())
            if self._options.validation_on_startup:
                missing += self._show_all(step)
            if missing and step == 0:
                raise MemoryLimitError(f"memory ran out in {_named(missing)} before training", hint=self._advice())
            if missing:
                self._warn_of(step, missing)
        self._accelerator.wait_for_everyone()

    def validate(self, step: int) -> None:
        """Render what the training has come to after `step` steps. A failure is named, and the training goes on.

        Where memory runs out a picture is tried again, and if it is too much the others are made without it. Once the run is to stop this
        returns early; `catch_up` renders the pictures when the run is resumed.
        """
        if self._renders:
            failed = True
            try:
                if missing := self._show_all(step):
                    self._warn_of(step, missing)
                failed = bool(missing)
            except Interrupted:
                failed = False
            except Stopped:
                raise
            except Exception as error:  # out of memory, a full disk, a sampler's fault: pictures are worth less than the run
                what = str(error).strip().partition("\n")[0] or type(error).__name__
                self._console.warn(f"no pictures of step {step}: {what}. The training goes on")
            if failed:
                release()  # what it left behind
        self._accelerator.wait_for_everyone()

    def catch_up(self, step: int) -> None:
        """Render the pictures of a step at which they were due, if the run ended before it came to them."""
        is_there = bool(self._pictures) and all(self._gallery.has(label, self._pictures) for label, _ in self._views(step))
        if not of_first(self._accelerator, is_there):
            self.validate(step)

    def move_later(self, step: int, aside: Path) -> None:
        """Put the pictures after `step` beside checkpoints that are not continued."""
        self._gallery.move_later(step, aside / self._gallery.folder.name)

    def _warn_of(self, step: int, missing: Sequence[str]) -> None:
        self._console.warn(f"step {step} lacks {_named(missing)}: memory ran out. {self._advice()} The training goes on")

    @property
    def grid(self) -> Path | None:
        """The grid over all steps, once there is one."""
        return self._gallery.grid if self._gallery.grid.is_file() else None

    @property
    def _renders(self) -> bool:
        return bool(self._pictures) and (self._accelerator.is_main_process or self._share is not None)

    def _show_all(self, step: int) -> list[str]:
        """Render all that is to be seen of a step; gives what memory did not suffice for."""
        self._trackers.events.looks(step)
        strength = 1.0 if self._trains_base else self._options.validation_lycoris_strength
        return [name for label, weights in self._views(step) for name in self._show(step, label, strength, weights)]

    def _views(self, step: int) -> list[tuple[str, AbstractContextManager[None]]]:
        """Which weights are looked at, under which labels."""
        label, shows = label_of(step), self._options.ema_validation
        if self._ema is None or shows == "none":
            return [(label, nullcontext())]
        average = self._ema.swapped_in()
        return [(label, average)] if shows == "ema_only" else [(label, nullcontext()), (f"{label}_ema", average)]

    def _show(self, step: int, label: str, strength: float, weights: AbstractContextManager[None]) -> list[str]:
        """Render and keep the pictures of one label; gives the names of those that memory did not suffice for."""
        if self._renderer.previews is not None:
            self._renderer.previews.at_step(step)
        render = partial(self._render, label, strength, weights)
        images = render(self._pictures) if self._share is None else self._share.map(render, self._pictures)
        made = [(picture, image) for picture, image in zip(self._pictures, images, strict=True) if image is not None]
        failure: Exception | None = None
        try:
            if self._accelerator.is_main_process:
                self._keep(step, label, strength, made)
        except Stopped:
            raise
        except Exception as error:  # others are not to wait for this one at what comes next
            failure = error
        if self._share is not None:
            self._share.agree(failure)
        elif failure is not None:
            raise failure
        return [f"{label}_{picture.file_stem}" for picture, image in zip(self._pictures, images, strict=True) if image is None]

    def _render(self, label: str, strength: float, weights: AbstractContextManager[None], pictures: Sequence[Picture]) -> list[Image | None]:
        """Render pictures here; None is one that memory did not suffice for."""
        images: list[Image | None] = []
        try:
            with weights, self._console.bar(f"pictures {label}", len(pictures), "pictures") as bar, self._renderer.at(strength) as render:
                for picture in pictures:
                    images.append(attempt_twice(partial(render, picture)))
                    bar.advance()
        finally:
            self._vae.release()
        return images

    def _advice(self) -> str:
        """What helps where one picture is too much, the cheapest first."""
        ways = [
            *([] if self._memory.vae_enable_tiling else ["set vae_enable_tiling"]),
            *(["leave keep_vae_loaded out"] if self._memory.keep_vae_loaded else []),
            "lower validation_resolution",
        ]
        text = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
        return f"{text[0].upper()}{text[1:]}."

    def _suffix(self, label: str) -> str:
        """What tells pictures of one step apart in trackers."""
        return "_base" if label == BASE_LABEL else "_ema" if label.endswith("_ema") else ""

    def _keep(self, step: int, label: str, strength: float, made: Sequence[tuple[Picture, Image]]) -> None:
        """Write the pictures that there are; into the grids go those of a step that has all of them."""
        images, facts = [image for _, image in made], partial(facts_of, model_family=self._family, common=self._options, strength=strength)
        named = {f"{picture.file_stem}{self._suffix(label)}": image for picture, image in made}
        if len(made) == len(self._pictures):
            named["grid"] = self._gallery.add(step, label, self._pictures, images, facts)
        elif made:
            self._gallery.write(step, label, [picture for picture, _ in made], images, facts)
        if named:
            prompts = {f"{picture.file_stem}{self._suffix(label)}": picture.prompt for picture, _ in made}
            self._trackers.images(step, named, prompts)
        if len(made) == len(self._pictures):  # a mean of fewer could not be laid beside the others
            self._scoring.score(step, [picture.prompt for picture, _ in made], images, "_ema" if label.endswith("_ema") else "")


def _named(pictures: Sequence[str]) -> str:
    """Pictures in words, the first few by name."""
    more = f" and {len(pictures) - NAMED} more" if len(pictures) > NAMED else ""
    return f"{'picture' if len(pictures) == 1 else 'pictures'} {', '.join(pictures[:NAMED])}{more}"

"""CLIP scores of the pictures of validation. What fails costs scores alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from simpletuner.console import Console
from simpletuner.models.clip_score import ClipScore
from simpletuner.options.validation import Validation
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.evaluations import Book


class Scoring:
    """Scores pictures where `evaluation_type` asks for it; one on the first process is enough."""

    def __init__(self, options: Validation, output_dir: Path, device: torch.device, trackers: Trackers, console: Console) -> None:
        self._location, self._is_on = options.pretrained_evaluation_model_name_or_path, options.evaluation_type == "clip"
        self._book, self._device, self._trackers, self._console = Book(output_dir), device, trackers, console
        self._score: ClipScore | None = None

    def score(self, step: int, prompts: Sequence[str], images: Sequence[Image], suffix: str) -> None:
        """Score the pictures that have a prompt, and write the figures down.

        Args:
            suffix: tells apart pictures of one step of which several kinds are rendered.
        """
        shown = [(prompt, image) for prompt, image in zip(prompts, images, strict=True) if prompt]
        if not self._is_on or not shown:
            return
        try:
            self._score = self._score or ClipScore(self._location)
            scores = self._score([image for _, image in shown], [prompt for prompt, _ in shown], self._device)
        except (OSError, ValueError, RuntimeError) as error:  # no such model, no network, no memory
            self._is_on = False
            why = str(error).strip().partition("\n")[0]
            self._console.warn(f"there are no CLIP scores: {self._location}: {why}. The training goes on")
            return
        spread = statistics.pstdev(scores)
        figures = {"mean": statistics.fmean(scores), "min": min(scores), "max": max(scores), "std": spread}
        values = {f"clip{suffix}/{name}": value for name, value in figures.items()}
        try:
            self._book.put(step, values)
        except OSError as error:
            self._console.warn(f"the CLIP scores of step {step} cannot be written down: {error}. The training goes on")
        self._trackers.log(step, values)
        self._console.say(f"step {step}: CLIP score {figures['mean']:.2f} ({figures['min']:.2f} to {figures['max']:.2f})")

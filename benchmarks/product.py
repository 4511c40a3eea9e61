"""Our own runs: put together by the code of `simpletuner train`, from pictures to the trainer, around denoisers with random weights.

The one thing that is not the product's own is where the weights come from: they are drawn on the device, layer by layer, and go through the
same quantising and offload from there.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from PIL import Image
from torch import nn

from benchmarks.networks import CLASSES, SUFFIXES, draw, empty, twin, write_model
from simpletuner.cli.choices import family_defaults, known_names
from simpletuner.console import Console
from simpletuner.models.streaming import Settle, Settling, settle_layers
from simpletuner.models.usual import UsualFamily
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.assemble import Run, assemble
from simpletuner.training.signals import StopRequest
from simpletuner.types import Size

FLAVOURS = {"auraflow": "v0.3", "sdxl": "base-1.0", "flux": "dev"}
CAPTION = "a photograph of a harbour at dawn, number {}"
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1}
FACTOR = {"real": 16, "medium": 8, "tiny": 4}
RANK = {"real": 16, "medium": 16, "tiny": 4}
COMMON = {
    "resolution_type": "pixel_area",
    "mixed_precision": "bf16",
    "max_train_steps": 100_000,
    "checkpoint_step_interval": 0,
    "report_to": "jsonl",
    "seed": 1,
    "model_init": "random",
}
FILES = {
    "data_backend_config": "multidatabackend.json",
    "output_dir": "output",
    "cache_dir": "cache",
    "pretrained_model_name_or_path": "model",
    "lycoris_config": "lycoris.json",
}
"""Of a folder that `write_data` filled."""


@dataclass(frozen=True)
class Job:
    """What is trained on what; how is up to the contenders."""

    model: str
    size: str
    pictures: tuple[Size, ...]
    """One bucket each."""
    batch: int = 1


class Drawn:
    """How a frozen denoiser is held, with weights that are drawn just before each layer is brought into its final form."""

    def __init__(self, settle: Settle, seed: int) -> None:
        self._settle, self._seed = settle, seed

    @property
    def dtype(self) -> torch.dtype:
        return self._settle.dtype

    @property
    def device(self) -> torch.device:
        return self._settle.device

    def begin(self, network: nn.Module) -> Settling:
        return _Drawing(self._settle.begin(network), self, torch.Generator(self.device).manual_seed(self._seed))


@dataclass
class _Drawing:
    inner: Settling
    settle: Drawn
    generator: torch.Generator

    def __call__(self, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        draw(module, self.settle.device, self.settle.dtype, self.generator)
        return self.inner(name, module, dtype)

    def finish(self) -> None:
        self.inner.finish()


@dataclass
class Bases:
    """The frozen denoisers of a process: each precision once, however many train on it."""

    job: Job
    _held: dict[Any, nn.Module] = field(default_factory=dict)

    def get(self, family: Any, settle: Any, seed: int) -> nn.Module:
        """What `load_frozen` of a family gives, from random weights."""
        if settle.placement is not None:  # parts of it wait in main memory: it is nobody else's
            return self._make(family, settle, seed)
        key = (settle.row.name, settle.dtype)
        if key not in self._held:
            self._held[key] = self._make(family, settle, seed)
        return twin(self._held[key])

    def plain(self, precision: str = "no_change") -> nn.Module:
        """One that was made already, for a loop that is not ours."""
        return twin(next(network for (name, _), network in self._held.items() if name == precision))

    def _make(self, family: Any, settle: Any, seed: int) -> nn.Module:
        made: nn.Module = family.prepare_denoiser(settle_layers(empty(self.job.model, self.job.size), Drawn(settle, seed), []))
        return made

    @contextmanager
    def given(self) -> Iterator[None]:
        """Have families load these."""
        with patch.object(UsualFamily, "load_frozen", lambda family, settle, seed: self.get(family, settle, seed)):
            yield


def write_data(folder: Path, job: Job) -> None:
    """A model, pictures for one batch of each bucket, and the files of a user."""
    write_model(folder / "model", job.model, job.size)
    (folder / "pictures").mkdir()
    for bucket, size in enumerate(job.pictures):
        for number in range(job.batch):
            name = CAPTION.format(bucket * job.batch + number)
            pixels = numpy.random.default_rng(bucket * 100 + number).integers(0, 255, (size.height, size.width, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{name}.png")
    data = [{"id": "pictures", "type": "local", "instance_data_dir": str(folder / "pictures"), "caption_strategy": "filename"}]
    (folder / "multidatabackend.json").write_text(json.dumps(data))


def alignment_of(size: Size) -> int:
    """What the sides of other buckets of that area are multiples of."""
    return min(64, size.width // 4)


def config_of(folder: Path, job: Job, adapter: str, options: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run in a folder that `write_data` filled.

    Args:
        adapter: lokr or lora.
    """
    lokr = {**LOKR, "factor": FACTOR[job.size], "apply_preset": {"target_module": list(CLASSES[job.model])}}
    (folder / "lycoris.json").write_text(json.dumps(lokr))
    lora = {"lora_type": "standard", "lora_rank": RANK[job.size], "lora_dropout": 0.0}
    first = job.pictures[0]
    given = {
        **COMMON,
        **{key: str(folder / name) for key, name in FILES.items() if adapter == "lokr" or key != "lycoris_config"},
        "model_family": job.model,
        "model_flavour": FLAVOURS[job.model],
        "model_type": "lora",
        "train_batch_size": job.batch,
        "resolution": round((first.width * first.height) ** 0.5),
        "aspect_bucket_alignment": alignment_of(first),
        **({"lora_type": "lycoris"} if adapter == "lokr" else lora),
        **options,
    }
    settings = [Setting(key, value, "the benchmark") for key, value in given.items() if value is not None]
    return load_config(settings, family_defaults, choices=known_names(), environ={}).config


@dataclass
class Ours:
    """A run that takes steps when it is asked to."""

    run: Run
    step: Callable[[], None]
    trainable: int
    closing: ExitStack

    @property
    def buckets(self) -> Sequence[Any]:
        """A batch of each bucket, as the trainer gets it, in the order of an epoch."""
        loader = self.run.trainer.loader
        return [loader.batch_at(position) for position in range(loader.batches_per_epoch())]

    def close(self) -> None:
        self.closing.close()


def put_together(folder: Path, job: Job, adapter: str, options: Mapping[str, Any], bases: Bases) -> Ours:
    """Assemble a run as `simpletuner train` does.

    Args:
        folder: as `write_data` filled it; absolute. Runs in one folder need an `output_dir` each.
    """
    config, closing, quiet = config_of(folder, job, adapter, options), ExitStack(), Console(is_main=False)
    with bases.given():
        run = assemble(config, quiet, {"model_family": job.model, "output_dir": str(config.training.output_dir)}, StopRequest(), closing)
    trainer = run.trainer
    batches = trainer.batches()
    closing.callback(batches.close)
    closing.callback(trainer.trackers.close)
    bar = closing.enter_context(quiet.bar("training", trainer.pace.total_steps, "steps", 0))
    gc.collect()
    return Ours(run, lambda: trainer.advance(batches, bar), sum(one.numel() for one in trainer.parameters if one.requires_grad), closing)


def lora_targets_are_ours(job: Job, family: Any) -> bool:
    """Whether a LoRA of ours is on the layers that the other loops adapt."""
    return set(family.lora_targets) == set(SUFFIXES[job.model])

"""What the report of a run is told when the run begins, and what memory it sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from simpletuner import __version__
from simpletuner.adapters.adapter import Attached
from simpletuner.console import amount
from simpletuner.data.doctor.page import pictures
from simpletuner.memory.peaks import held_in_main
from simpletuner.optim.rules import trains_in
from simpletuner.options.memory import TRAINED, WEIGHTS
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.report.facts import CropShown, DatasetRow, PlannedPhase, RunFacts
from simpletuner.training.datasets import Datasets
from simpletuner.training.finish import LOCATIONS
from simpletuner.training.plan import Plan
from simpletuner.training.run_folder import without_paths
from simpletuner.training.trainer import Trainer
from simpletuner.types import Sample

CROPS_SHOWN, CROPS_A_DATASET, CAPTION_LETTERS = 24, 8, 300


def begin_report(config: TrainConfig, source: str, attached: Attached, datasets: Datasets, plan: Plan | None, trainer: Trainer, start: str) -> None:
    """Tell the report, if there is one, what the run is and where it goes on from.

    Args:
        source: what the model is loaded from.
        start: where it goes on from, in words.
    """
    report = trainer.trackers.events.report
    if report is None:
        return
    epoch = trainer.loader.batches_per_epoch() / (trainer.pace.accumulation * config.training.num_processes)
    steps = (trainer.pace.total_steps, epoch)
    report.begin(facts_of_run(config, source, attached, datasets, plan, trainer.step.device, steps, start), trainer.state.step)


def facts_of_run(
    config: TrainConfig,
    source: str,
    attached: Attached,
    datasets: Datasets,
    plan: Plan | None,
    device: torch.device,
    steps: tuple[int, float],
    start: str,
) -> RunFacts:
    """Gather what a run is.

    Args:
        steps: of the whole run, and of an epoch.
    """
    training, adapters = config.training, config.adapters
    is_full = adapters.model_type == "full"
    kind = f"all weights, {TRAINED[trains_in(config.optim, config.memory)]}" if is_full else adapters.lora_type
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return RunFacts(
        name=training.output_dir.resolve().name,
        output=str(without_paths(training.output_dir)),
        where=where_of(config),
        family=config.models.model_family,
        base=f"{without_paths(source)}, {WEIGHTS[config.memory.mixed_precision]}",
        learns=f"{kind}: {amount(attached.parameters)} parameters",
        device=name,
        total_steps=steps[0],
        images_per_step=training.images_per_step,
        steps_per_epoch=steps[1],
        start=start,
        settings=without_paths(config.flat()),
        metric=config.validation.best_checkpoint,
        max_grad_norm=config.optim.max_grad_norm if config.optim.grad_clip_method == "norm" else 0.0,
        checkpoint_limit=training.checkpoints_total_limit,
        is_adapter=not is_full,
        software=f"SimpleTuner {__version__}",
        planned=[PlannedPhase(phase.name, phase.vram_bytes, phase.ram_bytes) for phase in plan.phases] if plan else [],
        datasets=rows_of(datasets, training.train_batch_size),
        crops=partial(crops_of, datasets),
    )


def where_of(config: TrainConfig) -> str:
    """What a command is to be told of a model that lies in a folder of this machine: the folder's last part."""
    words = [f" --{key} …/{without_paths(value)}" for key in LOCATIONS if without_paths(value := config.value(key)) != value]
    return "".join(words)


def rows_of(datasets: Datasets, batch_size: int) -> list[DatasetRow]:
    """The datasets, those that are held out last."""
    trained = [
        DatasetRow(
            id=facts.name,
            role="regularisation" if facts.is_regularisation else "trained",
            images=facts.images,
            repeats=facts.repeats,
            buckets=list(facts.buckets),
            skipped=dict(facts.skipped),
            about=", ".join(part for part in (facts.takes_part, facts.beside and f"with {facts.beside}") if part),
        )
        for facts in datasets.facts(batch_size, {})
    ]
    held_out = []
    for name, samples in datasets.held_out_samples().items():
        sizes = [str(sample.geometry.bucket) for sample in samples]
        buckets = sorted(((size, sizes.count(size)) for size in dict.fromkeys(sizes)), key=lambda row: -row[1])
        held_out.append(DatasetRow(name, "held out", len(samples), 0, buckets))
    return [*trained, *held_out]


def crops_of(datasets: Datasets) -> list[CropShown]:
    """A few pictures of each dataset that is trained on, of as many buckets as there are, with what of them is seen.

    Raises:
        Exception: whatever the place that they lie in raises.
    """
    chosen = [sample for _, discovery in datasets.trained for sample in spread(discovery.samples)][:CROPS_SHOWN]
    return [crop_of(sample, next(pictures(datasets.backends[sample.backend], [sample.name]))) for sample in chosen]


def spread(samples: Sequence[Sample], most: int = CROPS_A_DATASET) -> list[Sample]:
    """Some samples of as many buckets as there are."""
    by_bucket: dict[str, list[Sample]] = {}
    for sample in samples:
        by_bucket.setdefault(str(sample.geometry.bucket), []).append(sample)
    turns = (several[turn] for turn in range(most) for several in by_bucket.values() if turn < len(several))
    return [sample for _, sample in zip(range(most), turns)]


def crop_of(sample: Sample, thumbnail: str) -> CropShown:
    geometry = sample.geometry
    original, resized, crop = geometry.original, geometry.resized, geometry.crop
    return CropShown(
        dataset=sample.backend,
        file=sample.name,
        caption=sample.captions[0][:CAPTION_LETTERS],
        thumbnail=thumbnail,
        original=(original.width, original.height),
        resized=(resized.width, resized.height),
        crop=(crop.left, crop.top, crop.width, crop.height),
        bucket=str(geometry.bucket),
    )


def memory_in_use() -> dict[str, float]:
    """Bytes that this process has of main memory, and of the card that it computes on; what the system does not tell is left out."""
    return dict(_memory_in_use())


def _memory_in_use() -> Iterator[tuple[str, float]]:
    held = held_in_main()
    if held is not None:
        yield "main", held
    if torch.cuda.is_initialized():
        yield "card", torch.cuda.memory_reserved()

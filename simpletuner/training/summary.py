"""What a run says of itself: one screen at the start, and at the end where the result is and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.adapters.adapter import Attached
from simpletuner.console import Console, amount
from simpletuner.optim.rules import trains_in
from simpletuner.optim.scaling import scaled
from simpletuner.options.memory import TRAINED, WEIGHTS
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.pace import Pace

BUCKETS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """One dataset in a line of the summary."""

    name: str
    images: int
    buckets: Sequence[tuple[str, int]]
    """Size and images of each bucket."""
    repeats: int
    is_regularisation: bool
    skipped: Mapping[str, int]
    """Rule to images it removed."""
    captions: str
    """How many embeddings versions of captions make; empty if each has one."""
    changes: str
    takes_part: str = ""
    """When and how often it does, if not always and as often as others."""
    beside: str = ""
    """Masks and references that go along with its pictures."""

    def line(self) -> str:
        shown = ", ".join(f"{size} x{count}" for size, count in self.buckets[:BUCKETS_SHOWN])
        more = f" and {len(self.buckets) - BUCKETS_SHOWN} more" if len(self.buckets) > BUCKETS_SHOWN else ""
        images, buckets = (f"{count} {noun}{'s' if count != 1 else ''}" for count, noun in ((self.images, "image"), (len(self.buckets), "bucket")))
        parts = [f"{images} in {buckets} ({shown}{more})"]
        if self.repeats:
            parts.append(f"{self.repeats} repeats")
        if self.is_regularisation:
            parts.append("regularisation")
        if self.takes_part:
            parts.append(self.takes_part)
        if self.beside:
            parts.append(f"with {self.beside}")
        if self.skipped:
            parts.append("skipped: " + ", ".join(f"{count} {rule}" for rule, count in self.skipped.items()))
        if self.captions:
            parts.append(self.captions)
        if self.changes:
            parts.append(f"since last time: {self.changes}")
        return "; ".join(parts)


def show_start(
    console: Console,
    config: TrainConfig,
    source: str,
    attached: Attached,
    datasets: Sequence[DatasetFacts],
    pace: Pace,
    batches_per_epoch: int,
    start: str,
    evaluates: str,
    memory: str,
    products: str = "",
) -> None:
    """Print the summary.

    Args:
        evaluates: how the held-out loss is measured; empty if it is not.
        memory: what is planned; empty if nothing is.
        products: which layers multiply in 8 bits; empty if that was not asked.
    """
    steps_per_epoch = batches_per_epoch / (pace.accumulation * config.training.num_processes)
    is_full, batch = config.adapters.model_type == "full", config.training.images_per_step
    kind = f"full, {TRAINED[trains_in(config.optim, config.memory)]}" if is_full else config.adapters.lora_type
    rows = {
        "model": f"{config.models.model_family} from {source}, {WEIGHTS[config.memory.mixed_precision]}"
        + (f", base in {config.memory.base_model_precision}" if config.memory.base_model_precision != "no_change" else ""),
        "learns": f"{kind}: {amount(attached.parameters)} parameters on {attached.modules} of {attached.modules_total} modules",
        **{f"dataset {facts.name}": facts.line() for facts in datasets},
        "steps": f"{pace.total_steps} of {batch} images ({pace.total_steps / steps_per_epoch:.1f} epochs of {steps_per_epoch:g} steps)",
        **({"evaluates": evaluates} if evaluates else {}),
        "optimizer": f"{config.optim.optimizer}, rate {scaled(config.optim, batch).learning_rate:g}{of_text(config)}, {config.optim.lr_scheduler}",
        **({"memory": memory} if memory else {}),
        **({"products": products} if products else {}),
        "start": start,
        "output": ", ".join([str(config.training.output_dir), *rhythm(pace)]),
    }
    console.heading("SimpleTuner")
    console.facts(rows)
    for note in attached.notes:
        console.say(f"note: {note}")
    console.say()


def of_text(config: TrainConfig) -> str:
    """The rate of text encoders and how long they learn, where that is something else."""
    rate, limit = scaled(config.optim, config.training.images_per_step).text_encoder_lr, config.adapters.text_encoder_limit
    said = [f"{rate:g}"] if rate else []
    said += [f"up to {limit:g} % of the steps"] if limit < 100 else []
    return f" (text encoders {' '.join(said)})" if said and config.adapters.train_text_encoder else ""


def rhythm(pace: Pace) -> list[str]:
    """When a run saves and looks."""
    saves = f"a checkpoint {pace.save}" if pace.save.is_ever else "a checkpoint at the end"
    return [saves, f"pictures {pace.validate}"] if pace.validate.is_ever else [saves]


def show_end(console: Console, results: Sequence[Path], grid: Path | None, command: str, snippet: str | None, seconds: str) -> None:
    """Print where everything is, a command that makes a picture with it, and code that does."""
    console.heading(f"Done in {seconds}")
    for path in results:
        console.say(f"  {path}")
    if grid is not None:
        console.say(f"  {grid}")
    console.say(f"\nMake pictures with it:\n\n  {command}")
    if snippet:
        console.say("\nUse it with diffusers:\n")
        console.say(snippet)

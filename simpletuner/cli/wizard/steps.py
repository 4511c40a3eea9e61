"""The steps of the wizard in their order: single questions first, then pages on which several answers stand beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simpletuner.cli.wizard.files import NAMED_BY
from simpletuner.options.train_config import declared


@dataclass(frozen=True, slots=True)
class Step:
    """One question, or a page of them."""

    name: str
    keys: tuple[str, ...]
    title: str = ""
    """Of a page."""
    is_planned: bool = False
    """Whether its answers decide over memory."""

    @property
    def is_page(self) -> bool:
        return bool(self.title)


SINGLE = (
    "pictures",
    "name",
    "caption_strategy",
    "instance_prompt",
    "card",
    "model_family",
    "model_flavour",
    "pretrained_model_name_or_path",
    "model_type",
    "lora_type",
)
MEMORY = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "train_batch_size",
    "mixed_precision",
    "base_model_precision",
    "gradient_checkpointing",
    "blocks_to_swap",
)
LEARNING = ("optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "use_ema")
LOOKING = (
    "output_dir",
    "checkpoint_step_interval",
    "validation_prompt",
    "renders_captions",
    "validation_resolution",
    "validation_step_interval",
    "report_to",
)
ADAPTER = ("lora_rank", "lokr_factor", "lokr_layers")


def steps() -> tuple[Step, ...]:
    """All steps. Options that declare a question and have no place of their own are on the last page."""
    known = {*SINGLE, *ADAPTER, *MEMORY, *LEARNING, *LOOKING, *NAMED_BY}
    further = tuple(key for key, option in declared().items() if option.ask and key not in known)
    return (
        *(Step(key, (key,)) for key in SINGLE),
        Step("adapter", ADAPTER, "What the adapter is like"),
        Step("memory", MEMORY, "Size and memory", is_planned=True),
        Step("learning", LEARNING, "How it learns"),
        Step("looking", (*LOOKING, *further), "Saving, and looking at it"),
    )


def asked_keys() -> Iterator[str]:
    """Everything that may be asked."""
    for step in steps():
        yield from step.keys

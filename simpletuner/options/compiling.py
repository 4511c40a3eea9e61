"""Options that make a step faster: what PyTorch compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from simpletuner.options.memory import OFFLOADS
from simpletuner.options.option import Problem, Section, option

if TYPE_CHECKING:
    from simpletuner.options.train_config import TrainConfig

GRAPHS = "it is max-autotune-no-cudagraphs and reduce-overhead at once: take the one or the other"
RECORDS = "reduce-overhead"
"""The mode that records CUDA graphs."""


class Compiling(Section):
    """What is compiled before it trains."""

    dynamo_backend: Literal["no", "inductor"] = option("no")
    """Compile the blocks of the denoiser: `inductor` is PyTorch's own compiler. The first start takes minutes longer, later ones find most of it
    in `cache_dir`; pictures and evaluation compute as before. What cannot be compiled trains as before, and the run says so."""

    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = option(
        "default", instead={"max-autotune": GRAPHS}, advanced=True
    )
    """How the compiler goes about it. `max-autotune-no-cudagraphs` times several kernels of each kind on this machine, which takes long.
    `reduce-overhead` records CUDA graphs of each block, for each size of picture: for small models and few sizes; an experiment."""

    dynamo_dynamic: bool = option(True, advanced=True)
    """Compile once for pictures and captions of all sizes. Without it each size is compiled when it first comes, 64 at most."""

    activation_memory_budget: float = option(1.0, gt=0, le=1, advanced=True)
    """Share of its activations that a compiled block keeps for the way back; the compiler computes again what is cheapest. 0.5 saves memory at
    little time. In place of `gradient_checkpointing`; not with dropouts."""

    @property
    def records_graphs(self) -> bool:
        return self.dynamo_backend != "no" and self.dynamo_mode == RECORDS

    @property
    def has_budget(self) -> bool:
        return self.dynamo_backend != "no" and self.activation_memory_budget < 1


def compiling_problems(config: TrainConfig) -> Iterator[Problem]:
    """Name what does not go together with how blocks are compiled."""
    compiling, memory, budget = config.compiling, config.memory, "activation_memory_budget"
    if compiling.has_budget and memory.gradient_checkpointing:
        said = f"{budget} {compiling.activation_memory_budget:g} is instead of gradient_checkpointing, which keeps nothing of a block"
        yield Problem((budget, "gradient_checkpointing"), f"{said}: set gradient_checkpointing to false, or leave {budget} out")
    if compiling.has_budget and config.adapters.model_type == "lora" and config.adapters.lora_type == "standard" and config.adapters.lora_dropout:
        yield Problem((budget, "lora_dropout"), f"{budget} cannot be with lora_dropout: what is computed again would draw anew")
    if compiling.records_graphs and memory.gradient_checkpointing:
        said = f"dynamo_mode {RECORDS} cannot be with gradient_checkpointing: blocks that are computed again in between break what is recorded"
        yield Problem(("dynamo_mode", "gradient_checkpointing"), f"{said}; {budget} saves memory with it")
    for key in OFFLOADS if compiling.records_graphs else ():
        if getattr(memory, key):
            yield Problem(
                ("dynamo_mode", key), f"dynamo_mode {RECORDS} cannot be with {key}: what is recorded holds the places of weights, which change"
            )

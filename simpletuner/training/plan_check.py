"""The plan in a run: what it says at the start, a warning where it is more than there is, and how far it was off.

The second step of a run is measured: in the first one the optimizer remembers nothing yet while gradients are on their way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from simpletuner.console import Console
from simpletuner.memory.peaks import Peak, free_in_main, free_on_card
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.datasets import Datasets
from simpletuner.training.plan import CUDA_BYTES, Phase, Plan, plan_run
from simpletuner.training.plan_pictures import largest_found
from simpletuner.training.signals import StopRequest

PLANNED_ON = ("cuda", "cpu")


def plan_start(config: TrainConfig, datasets: Datasets, device: torch.device, console: Console, stop: StopRequest) -> Plan | None:
    """Plan a run, if that is asked for, for the largest batch that its pictures make, and warn where that is more than there is.

    None on other devices, and where no plan can be made: it informs, and is no reason not to train.
    """
    if not config.reporting.plan_memory or device.type not in PLANNED_ON:
        return None
    batch = largest_found(datasets, config.training.train_batch_size)
    console.say("planning the memory of this run on shapes alone")
    try:
        plan = plan_run(config, batch.size, batch.count, "cpu" if device.type == "cpu" else "cuda", batch.references)
    except Exception as error:
        if stop.is_made:  # a signal, or what a library made of it
            raise
        console.say(f"note: the memory of this run cannot be planned: {error}")
        return None
    for warning in too_much(plan, free_on_card(device), free_in_main()):
        console.warn(warning)
    return plan


def planned(plan: Plan) -> str:
    """The plan in a line of the summary."""
    phases = ", ".join(f"{phase.name} {_main(plan, phase) / 1e9:.1f}" for phase in plan.phases)
    if plan.device == "cpu":
        return f"planned {plan.peak_ram_bytes / 1e9:.1f} GB of main memory ({phases})"
    return f"planned {plan.peak_vram_bytes / 1e9:.1f} GB on the card ({phases}) and {plan.peak_ram_bytes / 1e9:.1f} GB of main memory"


def too_much(plan: Plan, on_card: int | None, in_main: int | None) -> list[str]:
    """What to say of a plan that is for more than there is.

    Args:
        on_card: free bytes, None if not known.
        in_main: likewise of main memory.
    """
    said = []
    if on_card is not None and plan.peak_vram_bytes > on_card:
        phase = max(plan.phases, key=lambda one: one.vram_bytes)
        fits = f"`simpletuner plan --fit {math.floor((on_card + CUDA_BYTES) / 1e9)}GB` proposes options with which it fits"
        said.append(f"{_planned(phase.name, phase.vram_bytes)}, and the card has {on_card / 1e9:.1f} GB free; {fits}")
    phase = max(plan.phases, key=lambda one: one.ram_bytes - one.spare_bytes)
    needed = phase.ram_bytes - phase.spare_bytes
    if in_main is not None and needed > in_main:
        said.append(f"{_planned(phase.name, needed)} of main memory, of which {in_main / 1e9:.1f} GB are free")
    return said


def _planned(name: str, size: int) -> str:
    return f"the phase {name} is planned to take {size / 1e9:.1f} GB"


def probes(plan: Plan | None, device: torch.device, say: Callable[[str], None]) -> Iterator[AbstractContextManager[None]]:
    """What the first steps of a run are taken in."""
    return iter([nullcontext(), measuring(plan, device, say)] if plan else [])


@contextmanager
def measuring(plan: Plan, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Measure a step, and say how far the plan was off; nothing where the system does not tell."""
    peak = Peak.begin(device)
    yield
    found = peak.end() if peak else None
    if found:
        say(compared(_main(plan, plan.phase("step")), found.bytes, found.held_bytes))


def compared(planned_bytes: int, measured_bytes: int, held_bytes: int) -> str:
    """Say how a plan and a measurement compare.

    Args:
        held_bytes: that PyTorch's allocator holds of a card, which is what others lack; 0 where there is none.
    """
    off = (planned_bytes - measured_bytes) / measured_bytes
    held = f"; PyTorch holds {held_bytes / 1e9:.1f} GB of the card" if held_bytes else ""
    return f"memory of a step: planned {planned_bytes / 1e9:.1f} GB, measured {measured_bytes / 1e9:.1f} GB ({off:+.0%}){held}"


def _main(plan: Plan, phase: Phase) -> int:
    """Bytes where the run computes."""
    return phase.ram_bytes if plan.device == "cpu" else phase.vram_bytes

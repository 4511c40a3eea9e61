"""Hold the plan of a step against what a card really gave: the first step of a run calibrates it."""

from __future__ import annotations

import torch

from simpletuner.training.plan import Plan


def planned(plan: Plan) -> str:
    """The plan in a line of the summary."""
    phases = ", ".join(f"{phase.name} {phase.vram_bytes / 1e9:.1f}" for phase in plan.phases)
    return f"planned {plan.peak_vram_bytes / 1e9:.1f} GB on the card ({phases}) and {plan.peak_ram_bytes / 1e9:.1f} GB of main memory"


class FirstStep:
    """Measures one step on a card, and says once how far the plan was off."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._planned, self._device = plan.phase("step").vram_bytes, device

    def begin(self) -> None:
        """The step begins."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> str:
        """The step is done; what there is to say of it."""
        return compared(self._planned, torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device))


def compared(planned_bytes: int, measured_bytes: int, reserved_bytes: int) -> str:
    """Say how a plan and a measurement compare.

    Args:
        reserved_bytes: that the allocator holds, which is what the card lacks.
    """
    off = (planned_bytes - measured_bytes) / measured_bytes
    return (
        f"memory of a step: planned {planned_bytes / 1e9:.1f} GB, measured {measured_bytes / 1e9:.1f} GB ({off:+.0%}); "
        f"PyTorch holds {reserved_bytes / 1e9:.1f} GB of the card"
    )

"""What only a card can show of a run: no waiting within steps, memory that really runs out, and the plan beside what the allocator gave out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.product import Bases, Job, Ours, config_of, put_together, write_data
from simpletuner.training.plan import plan_run
from simpletuner.types import Size
from tests.builders.gpu import NEEDS_GPU, cuda, without_package

pytestmark = NEEDS_GPU
SIDE = Size(512, 512)


@pytest.fixture
def whole_card() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda())
    torch.cuda.empty_cache()


def started(folder: Path, model: str, batch: int = 1, **options: Any) -> Ours:
    """A run of a model of some 50 million parameters, after its first steps, in which kernels are chosen and states are made."""
    job = Job(model, "medium", (SIDE,), batch)
    write_data(folder, job)
    run = without_package(lambda: put_together(folder, job, "lokr", options, Bases(job)))
    for _ in range(3):
        run.step()
    torch.cuda.synchronize(cuda())
    return run


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False}, {"enable_group_offload": True}], ids=["recomputed", "kept", "offloaded"])
@pytest.mark.parametrize("model", ["auraflow", "sdxl", "flux"])
def test_no_step_waits_for_the_card(tmp_path, model, options):
    run = started(tmp_path, model, **options)
    before = torch.cuda.get_sync_debug_mode()

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        run.close()


def test_a_step_that_really_runs_out_of_memory_goes_through_in_parts(tmp_path, whole_card):
    device, batch = cuda(), 8
    run = started(tmp_path, "auraflow", batch=batch, gradient_checkpointing=False)
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    run.step()
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]

    torch.cuda.set_per_process_memory_fraction((resting + 0.7 * (most - resting)) / total, device)
    for _ in range(2):
        run.step()
    figures = run.run.trainer.meter.take()
    recovery = run.run.trainer.recovery
    run.close()

    assert recovery.events >= 1 and 1 <= min(recovery.samples_at_once.values()) < batch
    assert figures is not None and figures.loss == figures.loss and len(figures.samples) == batch
    assert torch.cuda.max_memory_allocated(device) <= most


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": False}, {"base_model_precision": "int8-quanto"}, {"blocks_to_swap": 2}],
    ids=["recomputed", "kept", "int8", "swapped"],
)
@pytest.mark.parametrize("model", ["auraflow", "sdxl", "flux"])
def test_the_plan_is_near_what_the_allocator_gave_out(tmp_path, whole_card, model, options):
    device = cuda()
    job = Job(model, "medium", (SIDE,), 2)
    (tmp_path / "planned").mkdir()
    write_data(tmp_path / "planned", job)
    planned = plan_run(config_of(tmp_path / "planned", job, "lokr", options), SIDE, 2, "cuda").phase("step").vram_bytes
    before = torch.cuda.memory_allocated(device)
    (tmp_path / "run").mkdir()
    run = started(tmp_path / "run", model, batch=2, **options)

    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize(device)
    measured = torch.cuda.max_memory_allocated(device) - before
    run.close()

    assert abs(planned - measured) <= 0.05 * measured + 40e6, f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"

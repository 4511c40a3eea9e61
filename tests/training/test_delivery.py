"""Batches come to the device as they were, and what is made ready ahead changes no number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simpletuner.training.delivery import Delivery
from simpletuner.types import Batch, Drawn
from tests.training.test_step import Family, batch, step

META = torch.device("meta")


def full_batch() -> Batch:
    """With everything that a batch can have."""
    picture = torch.ones(2, 4, 8, 8)
    drawn = Drawn((3, 1), picture, picture, torch.rand(2), picture, torch.rand(2), torch.rand(3, 2))
    text = {"prompt": torch.rand(2, 5, 6), "mask": torch.ones(2, 5, dtype=torch.long)}
    return replace(batch(), text=text, mask=torch.ones(2, 1, 8, 8), references=({"mean": picture, "scaled": picture},), drawn=drawn)


def test_what_a_step_reads_goes_to_the_device_and_masks_over_text_and_raw_latents_stay():
    there = Delivery(META).bring(full_batch())

    drawn = [getattr(there.drawn, name) for name in ("latents", "noise", "time", "mixed", "guidance", "way")]
    assert all(tensor.device == META for tensor in (*drawn, there.text["prompt"], there.mask, there.references[0]["scaled"]))
    assert there.text["mask"].device.type == there.latents["mean"].device.type == "cpu"
    assert there.drawn.place == (3, 1) and there.samples == full_batch().samples


def test_on_the_cpu_a_batch_is_left_alone():
    mine, delivery = full_batch(), Delivery(torch.device("cpu"))

    assert delivery.bring(mine) is mine and delivery.pack(mine) is mine


@pytest.mark.parametrize("place", [(3, 1), (0, 0)])
def test_a_batch_made_ready_gives_the_losses_of_one_that_was_not(place):
    plain = step().losses(batch(), *place)

    ready = step().make_ready(batch(), *place)

    assert torch.equal(step().losses(ready, *place), plain)
    assert torch.equal(step().losses(ready, 5, 0), step().losses(batch(), 5, 0))  # made ready for another place: drawn anew


def test_references_are_scaled_once_a_batch():
    class Counting(Family):
        scaled = 0

        def scale_latents(self, raw):
            self.scaled += 1
            return super().scale_latents(raw)

    family, raw = Counting(), {"mean": torch.ones(2, 4, 8, 8)}

    ready = step(family=family).make_ready(replace(batch(), references=(raw, raw)), 0, 0)

    assert family.scaled == 3 and all(torch.equal(one["scaled"], raw["mean"] * 0.5) for one in ready.references)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA copies from page-locked memory by itself")
def test_cuda_gets_the_same_numbers_from_page_locked_memory():
    delivery = Delivery(torch.device("cuda"))
    packed = delivery.pack(full_batch())

    there = delivery.bring(packed)

    assert packed.drawn.noise.is_pinned() and packed.text["mask"].is_pinned()
    assert torch.equal(there.drawn.way.cpu(), packed.drawn.way) and there.text["prompt"].is_cuda and not there.text["mask"].is_cuda

"""How cost grows and where a step's time goes, on tiny models; their figures at these sizes mean nothing."""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import anatomy, growth, page
from benchmarks.useful import needed

CPU = torch.device("cpu")


def test_steps_and_their_products_are_timed_at_all_sizes(monkeypatch):
    monkeypatch.setattr(growth, "BATCHES", (2,))
    monkeypatch.setattr(growth, "SIDES", ((1, 1), (1, 2)))

    found = growth.of_steps("auraflow", "tiny", CPU, rounds=1)

    assert len(found["by_batch"]) == 1 and len(found["by_pixels"]) == 2
    for rows in (found["by_batch"], found["by_pixels"]):
        assert rows[0]["grown"] == rows[0]["curve"] == 1 and rows[0]["off"] == 0
        assert all(row["step"] > row["products"] > 0 for row in rows)
    assert "64x128" in page.page([{"machine": {}, "cases": {"growth of auraflow tiny": {**found, "day": "", "commit": "", "versions": {}}}}])


def test_the_products_of_a_step_are_all_of_its_layers_and_no_more():
    """Counted by PyTorch, which leaves out the attention of CPUs."""
    work = needed("flux", "tiny", "lokr", 4, (1, 16, 8, 8), 16)
    with FlopCounterMode(display=False) as counter:
        growth.products_of(work, CPU)()

    assert counter.get_total_flops() == sum(work.products.values())

    work = needed("sdxl", "tiny", "lokr", 4, (1, 4, 8, 8), 16)
    with FlopCounterMode(display=False) as counter:
        growth.products_of(work, CPU)()

    assert counter.get_total_flops() - sum(work.products.values()) > 0.1 * counter.get_total_flops()  # its convolutions


def test_caching_is_timed_by_numbers_of_images():
    found = growth.of_caching([3, 9])

    assert [row["images"] for row in found["by_images"]] == [3, 9]
    assert all(row["fill_per_second"] > 0 and row["index_per_second"] > 0 for row in found["by_images"])


def test_the_time_of_a_step_is_told_by_kinds_of_work(tmp_path):
    arguments = argparse.Namespace(size="tiny", adapter="lokr", steps=1)

    found = anatomy.of_model("auraflow", arguments, CPU)

    assert found["ours"]["adapters"] > 0 and found["ours"]["products of layers"] > 0 and found["ours"]["attention"] > 0
    assert found["ours"]["optimizer"] > 0
    assert "products of layers" in anatomy.table(found)

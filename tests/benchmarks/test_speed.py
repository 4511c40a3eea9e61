"""The benchmarks of time and memory run on tiny models; their figures at these sizes mean nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import speed, vram
from benchmarks.cases import Case

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("case", "compared"),
    [
        (Case("auraflow", "tiny", px=64, batch=2), {"floor", "library", "peer"}),
        (Case("flux", "tiny", "lora", "int8-quanto", checkpointing=True, px=64, is_mixed=True), {"floor", "ours, bf16", "ours, kept"}),
    ],
    ids=["lokr", "lora on int8, mixed buckets"],
)
def test_all_contenders_take_their_turns_on_the_same_work(case, compared):
    found = speed.measure(case, CPU, rounds=1, steps=1)

    assert set(found["contenders"]) == {"ours", *compared} == {"ours", *found["ours_by"]}
    trained = {name: one["trainable"] for name, one in found["contenders"].items() if name != "peer"}
    assert len(set(trained.values())) == 1, trained
    assert sorted(found["buckets"]) == sorted(map(str, case.pictures)) and found["steps"] == len(case.pictures)
    assert found["ran_out"] == 0
    assert 0 < found["useful"]["of_square"] < 1 and found["useful"]["rate"] < found["useful"]["square"]


def test_a_run_is_planned_and_taken():
    fit = next(fit for fit in vram.fits() if fit.options.get("blocks_to_swap"))

    found = vram.judged(fit, "tiny", vram.measure(fit, "tiny", CPU, 1))

    assert found["planned"]["step"]["ram_bytes"] > 0 and found["seconds"] > 0 and found["is_met"] is None

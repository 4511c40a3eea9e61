"""Slabs of powers of two: everything fits, and hardly anything is lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.errors import MemoryLimitError
from simpletuner.memory.slabs import ALIGNMENT_BYTES, LARGEST_BYTES, aligned, allocate, plan_slabs

W = 3072
FLUX_DOUBLE = [W * W] * 8 + [4 * W * W] * 4 + [6 * W * W] * 2
FLUX_SINGLE = [W * W] * 3 + [4 * W * W, 5 * W * W, 3 * W * W]
AURAFLOW = [W * W] * 4 + [W * 8192] * 3 + [6 * W * W]
SDXL = [1280 * 1280] * 6 + [2048 * 1280] * 2 + [1280 * 10240, 5120 * 1280]
MODELS = {
    "flux": FLUX_DOUBLE * 19 + FLUX_SINGLE * 38,
    "auraflow": AURAFLOW * 32,
    "half of auraflow": AURAFLOW * 16,
    "sdxl": SDXL * 60,
}


@given(st.lists(st.integers(0, 3_000_000), max_size=60))
def test_tensors_have_places_of_their_own_in_slabs_of_a_power_of_two(sizes):
    slabs, places = plan_slabs(sizes)

    assert all(slab & (slab - 1) == 0 for slab in slabs)
    assert len(places) == len(sizes)
    taken: dict[int, list[tuple[int, int]]] = {}
    for size, place in zip(sizes, places):
        assert place.start % ALIGNMENT_BYTES == 0
        assert place.start + size <= slabs[place.slab]
        if size:
            taken.setdefault(place.slab, []).append((place.start, place.start + size))
    for spans in taken.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(spans)))
    assert sum(slabs) < 2 * max(sum(map(aligned, sizes)), ALIGNMENT_BYTES)


@pytest.mark.parametrize("bytes_each", [2, 1, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_real_models_lose_at_most_a_few_hundredths(model, bytes_each):
    sizes = [int(size * bytes_each) for size in MODELS[model]]

    slabs, _ = plan_slabs(sizes)

    assert sum(slabs) <= 1.04 * sum(sizes)
    assert max(slabs) <= LARGEST_BYTES


def test_a_slab_in_a_file_keeps_its_bytes_and_leaves_no_name(tmp_path):
    slab = allocate(4096, is_pinned=False, folder=tmp_path / "new")

    slab.copy_(torch.arange(4096).to(torch.uint8))

    assert torch.equal(slab, torch.arange(4096).to(torch.uint8))
    assert list((tmp_path / "new").iterdir()) == []


def test_too_little_memory_is_said_with_what_to_do(tmp_path):
    with pytest.raises(MemoryLimitError, match="main memory") as error:
        allocate(1 << 60, is_pinned=False)
    assert "blocks_to_swap" in error.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(MemoryLimitError, match="disk"):
        allocate(4096, is_pinned=False, folder=tmp_path / "file")

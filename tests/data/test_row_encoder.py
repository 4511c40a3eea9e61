"""Encoding in batches that shrink when memory runs out."""

from __future__ import annotations

import pytest
import torch

from simpletuner.data.row_encoder import RowEncoder, is_finite, is_out_of_memory
from simpletuner.errors import MemoryLimitError


def limited(limit: int, calls: list[int], error: BaseException):
    """An encoder that takes `limit` items at once."""

    def encode(items):
        calls.append(len(items))
        if len(items) > limit:
            raise error
        return {"double": torch.tensor(items) * 2}

    return encode


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("MPS backend out of memory (used 3 GB)")], ids=repr)
def test_the_batch_is_halved_until_it_fits_and_stays_so(error):
    calls: list[int] = []
    said: list[str] = []
    encoder = RowEncoder(limited(2, calls, error), 8, said.append, noun="images", option="vae_batch_size", hint="buy more")

    rows = encoder.rows([0, 1, 2, 3, 4, 5, 6, 7, 8]) + encoder.rows([9, 10])

    assert [int(row["double"]) for row in rows] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert calls == [8, 4, 2, 2, 2, 2, 1, 2]
    assert len(said) == 2 and "vae_batch_size 2" in said[-1]


def test_one_item_that_does_not_fit_is_refused_with_the_option_and_the_hint():
    encoder = RowEncoder(limited(0, [], MemoryError()), 4, lambda text: None, noun="images", option="vae_batch_size", hint="Set vae_enable_tiling.")

    with pytest.raises(MemoryLimitError) as refused:
        encoder.rows([1, 2])

    assert refused.value.message == "memory ran out while images were encoded, with vae_batch_size 1"
    assert refused.value.hint == "Set vae_enable_tiling."


def test_other_errors_are_not_taken_for_too_little_memory():
    encoder = RowEncoder(limited(0, [], RuntimeError("shapes do not match")), 4, lambda text: None, noun="images", option="vae_batch_size", hint="")

    with pytest.raises(RuntimeError, match="shapes"):
        encoder.rows([1])


def test_a_real_allocation_that_is_too_large_is_recognised():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 55)

    assert is_out_of_memory(failed.value)


def test_infinite_and_missing_numbers_are_not_finite_and_whole_ones_always_are():
    assert is_finite({"mean": torch.ones(2), "mask": torch.tensor([1, 0])})
    assert not is_finite({"mean": torch.tensor([1.0, float("inf")])})
    assert not is_finite({"mean": torch.ones(1), "std": torch.tensor([float("nan")])})

"""Bytes of tensors, counted by what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from simpletuner.memory.quantisers.quanto import Quanto
from simpletuner.memory.shapes_only import StandIn, Twins, shapes_only
from simpletuner.memory.tracker import HOST, WORK, Tracker

KB = 1024


def test_what_is_let_go_of_is_not_counted_any_more():
    with Tracker() as tracker:
        kept = torch.zeros(KB, dtype=torch.uint8)
        gone = torch.zeros(4 * KB, dtype=torch.uint8)
        view = kept.view(32, 32).t()
        del gone

    assert (tracker.now, tracker.peak) == (KB, 5 * KB)
    assert view.shape == (32, 32)
    del kept, view
    assert tracker.now == 0


def test_the_peak_is_told_by_kinds_and_main_memory_is_apart():
    weights = torch.zeros(2 * KB, dtype=torch.uint8)
    with Tracker() as tracker:
        tracker.name([weights], "weights")
        tracker.name([weights[:KB]], "weights")  # of the same storage
        aside = tracker.to_host(weights)
        work = weights + 1
        tracker.add(KB, "optimizer")
        del work

    assert tracker.at_peak == {"weights": 2 * KB, WORK: 2 * KB, "optimizer": KB}
    assert tracker.bytes[HOST] == tracker.host_peak == aside.numel()


def test_a_tensor_of_other_tensors_counts_as_those():
    with Tracker() as tracker:
        layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        quantised = Quanto("qint8").quantise(layer)
        del layer
        tracker.restart()
        tracker.name(quantised.parameters(), "weights")

    assert tracker.bytes["weights"] == 64 * 64 + 64 * 2  # bytes, and a scale a row


def test_shapes_take_the_bytes_that_numbers_would():
    def work() -> tuple[int, int]:
        with Tracker() as tracker:
            layer = nn.Linear(64, 32)
            loss = functional.gelu(layer(torch.zeros(8, 64))).square().sum()
            loss.backward()
        return tracker.peak, tracker.now

    with shapes_only():
        planned = work()

    assert planned == work()


def test_whole_numbers_are_known_where_they_follow_from_whole_numbers():
    with shapes_only():
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0

        assert mask.sum(dim=1).tolist() == [6, 4]
        assert [len(torch.zeros(6)[: int(row.sum())]) for row in mask] == [6, 4]


def test_attention_without_numbers_holds_no_scores_as_the_kernels_do():
    def work() -> int:
        with Tracker() as tracker:
            query = torch.zeros(1, 2, 64, 16, requires_grad=True)
            hidden = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            functional.scaled_dot_product_attention(query, query, query, attn_mask=hidden).sum().backward()
        return tracker.peak

    with shapes_only():
        planned = work()

    assert planned == work()


def test_a_twin_of_a_quantised_layer_takes_as_much_and_shares_nothing():
    with shapes_only(), Tracker() as tracker:
        twins, layers = Twins(Quanto("qint8")), [nn.Linear(64, 32, bias=False, dtype=torch.bfloat16) for _ in range(2)]
        quantised = nn.ModuleList(map(twins.quantise, layers))
        del layers

    assert tracker.now == pytest.approx(2 * (64 * 32 + 32 * 2), abs=16)  # bytes, and a scale a row; quanto has a few scales of activations besides
    assert twins.work[quantised[0]] == twins.work[quantised[1]] >= 64 * 32 * 2  # the layer as it came
    assert 0 < twins.beyond(quantised) == twins.work[quantised[1]]


def test_what_stands_on_the_meta_device_can_be_left_out():
    with Tracker(without="meta") as tracker:
        shape = torch.zeros(KB, dtype=torch.uint8, device="meta")
        real = torch.zeros(KB, dtype=torch.uint8)

    assert tracker.now == KB and shape.shape == real.shape


def test_a_stand_in_has_the_bits_of_its_row_and_the_gradient_of_its_input():
    with shapes_only(), Tracker() as tracker:
        layer = StandIn(4.25).quantise(nn.Linear(128, 64, dtype=torch.bfloat16))
        tracker.name([layer.weight], "weights")
        given = torch.zeros(2, 128, dtype=torch.bfloat16, requires_grad=True)
        layer(given).sum().backward()

    assert tracker.bytes["weights"] == 128 * 64 * 4.25 / 8
    assert given.grad is not None and given.grad.shape == given.shape
    assert tracker.at_peak[WORK] >= 128 * 64 * 2  # the plain weight

"""What becomes of images: cut, enlarged, batched, cached."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.doctor.shapes import cut_share, enlargement, latent_bytes
from simpletuner.types import Crop, Geometry, Sample, Size
from tests.builders.demonstration import MODEL


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
def test_shares_stay_within_their_bounds(width, height, across, down):
    geometry = Geometry(Size(width, height), Size(width + across, height + down), Crop(0, 0, across, down))

    assert 0 <= cut_share(geometry) < 1
    assert enlargement(geometry) > 1


def test_a_copy_costs_no_second_latent_and_each_crop_one_of_its_own():
    geometry = Geometry(Size(64, 64), Size(64, 64), Crop(0, 0, 64, 32))
    one = Sample("set", "a.png", "", geometry, ("",))

    assert latent_bytes([("a", one), ("a", one), ("b", one)], MODEL) == 2 * (2 * 4 * 4 * 8 * 4)
    assert latent_bytes([("a", replace(one, crops=3))], MODEL) == 3 * (2 * 4 * 4 * 8 * 4)


def test_the_histogram_and_the_epoch_are_those_of_the_sampler(draw, check, problems):
    for number in range(5):
        draw(f"images/wide{number}.png", 96, 64, seed=number)
    draw("images/tall.png", 64, 96, seed=9)

    report = check({"id": "set", "instance_data_dir": "images", "repeats": 1}, training={"train_batch_size": 4, "gradient_accumulation_steps": 2})

    one = report.datasets[0]
    assert [(str(row.size), row.images, row.batches, row.last_batch) for row in one.buckets] == [("40x24", 5, 3, 2), ("24x40", 1, 1, 2)]
    assert (one.figures["batches"], one.figures["partial_batches"], one.figures["draws"]) == (4, 2, 12)
    assert (report.totals["batches_per_epoch"], report.totals["steps_per_epoch"]) == (4, 2)
    assert "1 of 2 buckets never fills a batch of 4" in problems(report, "lone bucket")[0].message


def test_enlarged_cut_and_long_images_are_told_with_the_worst(draw, check, problems):
    draw("images/fine.png", 96, 96, seed=1)
    draw("images/small.png", 20, 20, seed=2)
    draw("images/little.png", 28, 28, seed=3)
    draw("images/long.png", 400, 100, seed=4)

    report = check({"id": "set", "instance_data_dir": "images", "crop": True, "crop_style": "center"})

    assert problems(report, "enlarged")[0].message == "1 image enlarged 1.5 times or more, the most 1.60 times (small.png)"
    assert problems(report, "slightly enlarged")[0].files == ("little.png",)
    assert problems(report, "cropped away")[0].message == "1 image loses more than 30% to the crop, the most 75% (long.png)"
    assert problems(report, "extreme aspect")[0].files == ("long.png",)
    assert report.datasets[0].figures["cropped_share"] == pytest.approx(3 * 32 * 32 / (3 * 32 * 32 + 128 * 32), abs=1e-4)


def test_expected_cache_size_follows_from_shapes(draw, check):
    for number in range(3):
        draw(f"images/{number}.png", 64, 64, seed=number)

    report = check()

    assert report.totals["latent_cache_bytes"] == 3 * 2 * 4 * 4 * 4 * 4
    assert report.totals["text_cache_bytes"] == 4 * MODEL.text_bytes  # three captions and the empty one
    assert check(options={"vae_cache_disable": True}).totals["latent_cache_bytes"] == 0


def test_draws_are_shared_out_by_repeats_and_a_lopsided_share_is_noted(draw, check, problems):
    for number in range(4):
        draw(f"many/{number}.png", seed=number)
    draw("one/x.png", seed=20)

    report = check(
        {"id": "many", "instance_data_dir": "many", "repeats": 24},
        {"id": "one", "instance_data_dir": "one", "probability": 0.5},
        {"id": "held", "instance_data_dir": "one", "cache_dir_vae": "held"},
        evals=["held"],
    )

    assert [one.figures["share_of_draws"] for one in report.datasets] == [pytest.approx(100 / 100.5), pytest.approx(0.5 / 100.5), 0]
    assert problems(report, "balance")[0].message == "of all draws 100% are of 'many' and under 1% of 'one'"
    assert math.isclose(sum(one.figures["share_of_draws"] for one in report.datasets), 1)

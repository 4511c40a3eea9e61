"""Samples of one size, and whether a dataset is large enough."""

from __future__ import annotations

import pytest

from simpletuner.data.buckets import BucketRow, Group, by_bucket, check_size, describe
from simpletuner.errors import DatasetError
from simpletuner.types import Crop, Geometry, Sample, Size

WIDE, TALL = Size(64, 32), Size(32, 64)


def sample(number: int, bucket: Size = WIDE) -> Sample:
    geometry = Geometry(Size(128, 128), Size(64, 64), Crop(0, 0, bucket.width, bucket.height))
    return Sample("cats", f"{number}.png", f"{number:x}", geometry, ("a cat",))


def cats(wide: int, tall: int = 0, **facts) -> Group:
    return Group("cats", [sample(number, WIDE if number < wide else TALL) for number in range(wide + tall)], **facts)


def test_samples_are_grouped_by_what_is_cut_out_of_them():
    group = cats(wide=2, tall=1)

    assert by_bucket(group.samples) == {WIDE: [sample(0), sample(1)], TALL: [sample(2, TALL)]}


def test_the_summary_counts_the_partial_batches_and_the_repeats():
    rows = describe(cats(wide=5, tall=7, repeats=2), batch_size=4)

    assert rows == [BucketRow(TALL, 7, 6), BucketRow(WIDE, 5, 4)]  # 21 and 15 draws


def test_a_batch_size_of_its_own_goes_before_the_runs():
    assert describe(cats(wide=5, batch_size=5), batch_size=2) == [BucketRow(WIDE, 5, 1)]


@pytest.mark.parametrize(("images", "repeats"), [(12, 0), (6, 1), (5, 2), (1, 11)])
def test_enough_draws_pass(images, repeats):
    check_size(cats(images, repeats=repeats), batch_size=3, accumulation=2, processes=2)


@pytest.mark.parametrize(("images", "repeats", "wanted"), [(11, 0, 1), (5, 1, 2), (4, 1, 2), (1, 10, 11)])
def test_too_few_draws_name_the_dataset_the_counts_and_the_smallest_repeats_that_do(images, repeats, wanted):
    with pytest.raises(DatasetError) as refused:
        check_size(cats(images, repeats=repeats), batch_size=3, accumulation=2, processes=2)

    assert "'cats'" in refused.value.message and f"{images} images" in refused.value.message and "needs 12" in refused.value.message
    assert f"repeats to {wanted} or more" in refused.value.hint
    check_size(cats(images, repeats=wanted), batch_size=3, accumulation=2, processes=2)


def test_a_dataset_without_images_is_refused():
    with pytest.raises(DatasetError, match="'cats' has no images"):
        check_size(cats(0), batch_size=1, accumulation=1, processes=1)

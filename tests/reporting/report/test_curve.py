"""A figure over any number of steps, in a bounded number of points."""

from __future__ import annotations

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.reporting.report.curve import MOST_BINS, Curve, mean_of

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@settings(max_examples=25, deadline=None)
@given(VALUES, st.integers(1, 40))
def test_a_thinned_curve_keeps_the_mean_the_least_and_the_most(values, stride):
    curve = Curve()

    for number, value in enumerate(values):
        curve.add(number * stride * 50, value)

    assert len(curve.bins) <= MOST_BINS
    assert math.isclose(mean_of(curve.bins), sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-6)
    assert min(one.least for one in curve.bins) == min(values) and max(one.most for one in curve.bins) == max(values)
    assert sum(one.count for one in curve.bins) == len(values)


def test_a_million_steps_make_a_few_hundred_points():
    curve = Curve()

    for step in range(0, 1_000_000, 7):
        curve.add(step, float(step))

    assert MOST_BINS // 2 <= len(curve.bins) <= MOST_BINS
    assert len(json.dumps(curve.as_json())) < 60_000
    assert curve.bins[-1].last == 999_999 - 999_999 % 7


def test_what_is_after_a_step_is_forgotten_and_the_rest_can_be_gone_on_with():
    curve = Curve()
    for step in range(1, 11):
        curve.add(step, 1.0)

    curve.cut(6)
    curve.add(7, 5.0)

    assert [one.first for one in curve.bins] == [1, 2, 3, 4, 5, 6, 7] and curve.bins[-1].mean == 5.0


def test_what_is_no_number_is_left_out_and_the_file_stays_json():
    curve = Curve()
    for step, value in enumerate((1.0, math.nan, math.inf, 2.0)):
        curve.add(step, value)

    assert [one.mean for one in curve.bins] == [1.0, 2.0]
    assert Curve.from_json(json.loads(json.dumps(curve.as_json()))) == curve


def test_a_curve_that_goes_on_is_bounded_too():
    first, second = Curve(), Curve()
    for step in range(MOST_BINS):
        first.add(step, 1.0)
        second.add(step, 3.0)

    whole = first.then(second.moved(MOST_BINS))

    assert len(whole.bins) <= MOST_BINS and mean_of(whole.bins) == 2.0 and whole.bins[-1].last == 2 * MOST_BINS - 1

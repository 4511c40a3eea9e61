"""When saving, validating and evaluating is due."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.training.pace import Rhythm


@given(every=st.integers(1, 50), step=st.integers(1, 500))
def test_a_rhythm_by_steps_is_due_at_multiples(every, step):
    assert Rhythm(every).is_due(step) == (step % every == 0)


@settings(max_examples=40)
@given(batches=st.integers(1, 40), per_step=st.integers(1, 6), epochs=st.sampled_from([0.25, 0.5, 1, 2, 3]))
def test_a_rhythm_by_epochs_is_due_at_the_first_step_that_ends_an_interval(batches, per_step, epochs):
    rhythm, steps = Rhythm(epochs=epochs, epoch_steps=Fraction(batches, per_step)), 60

    due = {step for step in range(1, steps + 1) if rhythm.is_due(step)}

    ends = (Fraction(number) * Fraction(epochs) * batches / per_step for number in range(1, 1500))
    assert due == {step for step in map(math.ceil, ends) if step <= steps}


def test_nothing_is_due_before_its_first_step_and_both_rhythms_count():
    rhythm = Rhythm(4, 1, Fraction(5), first=6)

    assert [step for step in range(1, 17) if rhythm.is_due(step)] == [8, 10, 12, 15, 16]
    assert str(rhythm) == "every 4 steps and every epoch from step 6"
    assert not Rhythm().is_ever and not any(Rhythm().is_due(step) for step in range(1, 100))

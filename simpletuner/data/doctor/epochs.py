"""What an epoch and the run are made of: batches and steps, and each dataset's share of what is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.data.buckets import Group
from simpletuner.data.doctor.findings import Examined, Problem, percent
from simpletuner.data.sampler import Sampler, total_steps
from simpletuner.data.window import ALWAYS
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.options.training import Training

UNBALANCED = 20
"""Times that one dataset may be drawn as often as another before it is worth a line."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How the datasets that are trained on are drawn."""

    batches: Mapping[str, int]
    """By dataset, in an epoch in which it takes part from beginning to end."""
    shares: Mapping[str, float]
    """Of all images that are drawn, by dataset: in an epoch; over the whole run, if some take part for a time only."""
    run_batches: Mapping[str, int]
    """By dataset, in the whole run."""
    batches_per_epoch: int
    """In the first epoch."""
    steps_per_epoch: float
    """The same in optimizer steps."""
    total_steps: int
    """Of the run; 0 if it cannot be run."""
    problems: tuple[Problem, ...] = ()


def steps_of(groups: Sequence[Group], training: Training) -> Steps:
    """Count the batches of a run, as its own sampler does.

    Args:
        groups: what is trained on.
    """
    if not groups:
        return Steps({}, {}, {}, 0, 0.0, 0)
    size, per_step = training.train_batch_size, training.gradient_accumulation_steps * training.num_processes
    alone = {group.name: Sampler([open_always(group)], size, training.seed).batches_per_epoch() for group in groups}
    sampler = Sampler(groups, size, training.seed, per_step)
    per_epoch = sampler.batches_per_epoch()
    windowed = [group for group in groups if group.window != ALWAYS]
    problems: list[Problem] = []
    try:
        total = total_steps(training, sampler)
    except ConfigError as error:
        total = 0
        problems.append(Problem("unusable", ", ".join(group.name for group in windowed), error.message, share=1.0, advice=error.hint or ""))
    run = sampler.counts(total * per_step) if total else dict.fromkeys(alone, 0)
    problems += [never_drawn(group, total) for group in windowed if total and not run[group.name]]
    # By batches alone a dataset of many buckets, whose last batches are not full, would seem to be drawn more often than it is.
    draws = {group.name: len(group.samples) * (group.repeats + 1) * group.probability for group in groups}
    if windowed:
        draws = {name: run[name] / alone[name] * count for name, count in draws.items()}
    drawn = max(sum(draws.values()), 1e-9)
    shares = {name: count / drawn for name, count in draws.items()}
    return Steps(alone, shares, run, per_epoch, per_epoch / per_step, total, tuple(problems))


def open_always(group: Group) -> Group:
    """A dataset as if it took part all the time."""
    return Group(group.name, group.samples, group.repeats, group.probability, group.batch_size)


def never_drawn(group: Group, total: int) -> Problem:
    return Problem("never drawn", group.name, f"it takes part in {group.window} alone, and the run ends before, after step {total:,}", share=1.0)


def balance(examined: Sequence[Examined]) -> list[Problem]:
    """Say when some datasets are drawn very much more often than others."""
    shares = Counter({one.id: one.figures["share_of_draws"] for one in examined if one.figures.get("draws")})
    if len(shares) < 2:
        return []
    (most, high), (least, low) = shares.most_common()[0], shares.most_common()[-1]
    if not low or high < UNBALANCED * low:
        return []
    message = f"of all draws {percent(high)} are of {most!r} and {percent(low)} of {least!r}"
    return [Problem("balance", f"{most}, {least}", message, share=high)]

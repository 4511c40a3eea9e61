"""T-LoRA (Soboleva et al. 2025, arXiv 2507.05964): fewer ranks are active where there is more noise, so that few pictures are not learned by heart.

Letters: B batch, r rank, t time in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.adapters.changes import Changes, algorithm_of, rank_of
from simpletuner.adapters.lycoris_file import parse
from simpletuner.errors import ConfigError

SLACK = 1e-4
"""A count that float32 leaves this little below a whole number is that number."""
LYCORIS_SETTINGS = "lycoris_config"
"""Where a file's header holds the settings that it was trained with."""


def active_ranks(time: Tensor, most: int, least: int, alpha: float) -> Tensor:
    """Ranks that are active at each time: floor((1 - t)^alpha (most - least)) + least, (B,)."""
    return ((1 - time.float()).clamp(min=0) ** alpha * (most - least) + SLACK).floor().long() + min(least, most)


@dataclass(frozen=True, slots=True)
class RankRule:
    """How the number of active ranks follows the time."""

    most: int
    """Ranks of the largest module, which all are active without noise."""
    least: int
    """Ranks in pure noise."""
    power: float
    """Of their fall."""


class Ranks:
    """Tells which ranks are active at the time that it was last told; until then all are.

    As in the library, ranks are counted of the largest module: one with fewer has as many of them as it has.
    """

    def __init__(self, rule: RankRule) -> None:
        self.rule = rule
        self._time: Tensor | None = None

    def at_time(self, time: Tensor) -> None:
        """Mask for calls at `time`, (B,) or (1,)."""
        self._time = time

    def of(self, ranks: int, rows: int, device: torch.device) -> Tensor | None:
        """1 where one of a module's ranks is active, for `rows` inputs or for all alike: (rows, ranks) or (1, ranks); None where all are."""
        if self._time is None:
            return None
        counts = active_ranks(self._time.to(device), self.rule.most, self.rule.least, self.rule.power)
        mask = (torch.arange(ranks, device=device) < counts[:, None]).float()
        # Some layers see the tokens of all samples in one row after the other.
        return mask if len(mask) in (1, rows) else mask.repeat_interleave(rows // len(mask), 0)


def has_ranks_by_time(changes: Changes) -> bool:
    return any(algorithm_of(parts) == "tlora" for parts in changes.values())


def rule_of(changes: Changes, said: Mapping[str, str]) -> RankRule | None:
    """The rule that a file's header tells, if the file is of T-LoRA and tells it."""
    most = max((rank_of(parts) or 0 for parts in changes.values() if algorithm_of(parts) == "tlora"), default=0)
    if not most or LYCORIS_SETTINGS not in said:
        return None
    try:
        settings = parse(json.loads(said[LYCORIS_SETTINGS]), "the file's header")
    except (ValueError, ConfigError):
        return None
    return RankRule(most, settings.ranks_in_noise, settings.rank_power)


def all_ranks_note(what: str) -> str:
    """What is said where masks are lost; `what` cannot hold them."""
    return f"note: this was trained with T-LoRA, and {what} holds no rank masks: all ranks are used at all timesteps"

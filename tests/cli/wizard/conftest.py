"""A situation to propose in, without a folder, a card or a model."""

from __future__ import annotations

import pytest

from simpletuner.cli.wizard.machine import Machine, named_card
from simpletuner.cli.wizard.model import ModelFacts
from simpletuner.cli.wizard.pictures import Pictures
from simpletuner.cli.wizard.proposals import Situation, propose

BILLIONS = {"sd1x": 0.86, "sdxl": 2.6, "auraflow": 6.8, "flux": 11.9}
NATIVE = {"sd1x": 512}
RISKY = {"*.ff.net.*": "adapters on feed-forward layers of SDXL are known to end in NaN at times"}


def facts(family, flavour, location):
    risky = RISKY if family == "sdxl" else {}
    return ModelFacts(family, location or family, BILLIONS[family], NATIVE.get(family, 1024), 64, is_here=True, risky_layers=risky)


@pytest.fixture
def propose_for():
    """Propose for a card of some gigabytes, a number of pictures of one size, and answers."""

    def make(gigabytes=24, count=20, size=(1400, 1000), machine=None, captions=None, **chosen):
        cards = (named_card(int(gigabytes * 1e9)),) if gigabytes else ()
        found = Pictures(
            "datasets/my cat", sizes=(size,) * count, has_text=(True,) * count, captions=captions or {"textfile": ("a cat", "my cat asleep")}
        )
        situation = Situation(machine or Machine(cards), found, chosen, facts, lambda family: {"first": BILLIONS[family]})
        propose(situation)
        return situation

    return make

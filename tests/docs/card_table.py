"""Plan every example on every card and keep the answers in simpletuner/examples/cards.json: `python tests/docs/card_table.py [NAME ...]`.

Without names all examples are planned, which takes minutes; with names those alone, and the others stay as they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import EXAMPLES, Place
from simpletuner.cli.recipes.rendering import Fit, render, situation
from simpletuner.cli.recipes.table import CARDS_GB, RECIPES
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_family
from simpletuner.training.fit import Proposal, fit, with_settings
from simpletuner.training.plan import plan_run
from simpletuner.training.plan_pictures import LargestBatch, largest_batch

TABLE = EXAMPLES / "cards.json"
UNCHANGED: tuple[Any, ...] = ()
NOTHING = Fit(None, UNCHANGED, 0, 0, 1.0, False, 0)


def read(files: Mapping[str, str], folder: Path) -> tuple[TrainConfig, LargestBatch]:
    """An example's options and its largest batch."""
    for name, text in files.items():
        (folder / name).write_text(text.replace("{folder}", folder.as_posix()), encoding="utf-8")
    config = read_options(Place(folder / "config.json"), []).config
    return config, largest_batch(config, build_family(config), {"model_family": config.models.model_family})


def planned(name: str, card_gb: int, batch: int | None) -> Proposal:
    """What the planner proposes for an example, as the wizard would write it with this batch."""
    with tempfile.TemporaryDirectory() as folder:
        made = render(name, card_gb, replace(NOTHING, batch=batch))
        config, largest = read(made.files, Path(folder))
        return fit(config, largest, int(card_gb * 1e9))


def batches(name: str, card_gb: int) -> Iterator[int | None]:
    """Batches to try: the proposed one, and smaller ones."""
    yield None
    yield from range(int(situation(name, card_gb).value("train_batch_size")) - 1, 0, -1)


def best(name: str, card_gb: int) -> Fit:
    """The largest batch that fits without changes; else what is to be changed with a batch of 1."""
    for batch in batches(name, card_gb):
        proposal = planned(name, card_gb, batch)
        if proposal.fits and not proposal.changes:
            break
    changes = tuple({"settings": dict(one.settings), "rule": one.rule} for one in proposal.changes)
    plan = proposal.plan
    factor = round(proposal.time_factor, 2)
    return Fit(batch, changes, plan.card_bytes, plan.peak_ram_bytes, factor, proposal.fits, download_bytes(name, card_gb))


def download_bytes(name: str, card_gb: int) -> int:
    """The model's weights with 16 bits each."""
    with tempfile.TemporaryDirectory() as folder:
        config, largest = read(render(name, card_gb, NOTHING).files, Path(folder))
        plan = plan_run(with_settings(config, {"base_model_precision": "no_change"}), largest.size, 1)
        return sum(plan.phase(phase).parts["weights"] for phase in ("text", "vae", "load"))


def main(names: list[str]) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    for name in names or RECIPES:
        table[name] = {str(card): asdict(best(name, card)) for card in CARDS_GB}
        kept = {name: table[name] for name in RECIPES if name in table}
        TABLE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(name, {card: (found["card_bytes"] / 1e9, found["fits"]) for card, found in table[name].items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

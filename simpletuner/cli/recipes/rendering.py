"""Write an example's files: the wizard's proposals for a card, what the memory plan changed of them, and the reasons beside them.

One place decides each thing: `cli/wizard/proposals.py` the values, `training/fit.py` what is changed so that they fit; its answers for these
examples are kept in `examples/cards.json`, since planning takes seconds a card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from simpletuner.cli import locate
from simpletuner.cli.choices import family_of
from simpletuner.cli.recipes.table import RECIPES, USUAL_CARD_GB, Recipe
from simpletuner.cli.wizard.files import CONFIG, DATASETS, LYCORIS, PROMPTS, config, datasets, library, lycoris
from simpletuner.cli.wizard.machine import GIGABYTE, Card, Machine
from simpletuner.cli.wizard.model import facts_of
from simpletuner.cli.wizard.pictures import Pictures
from simpletuner.cli.wizard.proposals import Situation, propose

PICTURES, MANY_PICTURES = 25, 4000
"""That an example is written for; all weights want many."""
EDGE_PX = 1536
RAM_BYTES = 64e9
FOLDER = "{folder}"
"""Stands in an example's texts where its folder does."""
NAMED_BY = {"data_backend_config": DATASETS, "lycoris_config": LYCORIS, "user_prompt_library": PROMPTS}
GROUPS = {
    "What is trained.": ("model_family", "model_flavour", "model_type", "lora_type", "lycoris_config", "lora_rank"),
    "The pictures.": ("data_backend_config", "resolution", "resolution_type"),
    "How it fits the card.": (),
    "How it learns.": ("optimizer", "learning_rate", "lr_scheduler", "max_train_steps", "lr_warmup_steps", "use_ema", "seed"),
    "What is kept, and what to look at on the way.": (
        "output_dir",
        "checkpoint_step_interval",
        "validation_prompt",
        "user_prompt_library",
        "validation_resolution",
        "validation_step_interval",
        "report_to",
    ),
}
DECIDED = ("model_type", "output_dir", "validation_prompt")
"""Keys whose reason would say nothing in a file that is ready."""
FITTING = "How it fits the card."
"""Takes all keys that no other group has."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the memory plan says of an example on a card."""

    batch: int | None
    """The batch that was planned with; None is the proposed one."""
    changes: tuple[Mapping[str, Any], ...]
    """What it changes of the proposals: `settings`, and the `rule` that is the reason."""
    card_bytes: int
    """That must be free on the card."""
    ram_bytes: int
    time_factor: float
    fits: bool
    download_bytes: int
    """Of the model's weights, with 16 bits each."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example for a card."""

    files: Mapping[str, str]
    """By name; `{folder}` in them is where they lie."""
    settings: Mapping[str, Any]
    """All keys of config.json."""


@cache
def kept() -> Mapping[str, Any]:
    """What examples/cards.json keeps: name of an example to gigabytes of a card to what `Fit` has."""
    found: dict[str, Any] = json.loads((locate.EXAMPLES / "cards.json").read_text(encoding="utf-8"))
    return found


def fit_of(name: str, card_gb: int) -> Fit | None:
    """What was planned, or None: nothing was."""
    found = kept().get(name, {}).get(str(card_gb))
    return Fit(**{**found, "changes": tuple(found["changes"])}) if found else None


def smallest_card(name: str) -> int | None:
    """Gigabytes of the smallest card that the example fits."""
    return min((int(card) for card, found in kept().get(name, {}).items() if found["fits"]), default=None)


def situation(name: str, card_gb: int, batch: int | None = None) -> Situation:
    """What the wizard would propose for an example.

    Args:
        batch: takes the place of the proposed one.
    """
    recipe = RECIPES[name]
    count = MANY_PICTURES if recipe.answers.get("model_type") == "full" else PICTURES
    found = Pictures(
        folder=recipe.pictures,
        sizes=((EDGE_PX, EDGE_PX),) * count,
        has_text=(True,) * count,
        captions=dict.fromkeys(("textfile", "instanceprompt"), recipe.captions),
    )
    size = int(card_gb * GIGABYTE)
    machine = Machine((Card("a card", size, size),), int(RAM_BYTES))
    chosen = {"name": name, "pictures": recipe.pictures, "model_family": recipe.family, **recipe.answers}
    if batch is not None:
        chosen["train_batch_size"] = batch
    made = Situation(machine, found, chosen, facts_of, lambda family: family_of(family).billions)
    propose(made)
    return made


def render(name: str, card_gb: int = USUAL_CARD_GB, fit: Fit | None = None) -> Rendered:
    """Write the files of an example.

    Args:
        fit: what the plan changes; what is kept of it unless given.
    """
    recipe, fit = RECIPES[name], fit or fit_of(name, card_gb)
    made = situation(name, card_gb, fit.batch if fit else None)
    changes = [(key, value, change["rule"]) for change in (fit.changes if fit else ()) for key, value in change["settings"].items()]
    settings: dict[str, Any] = {key: value for key, value in config(made).items() if not (key == "use_ema" and not value)}
    settings |= {"seed": 42, **{key: value for key, value, _ in changes}}
    proposed = {key: proposal.reason for key, proposal in made.found.items() if key not in (*made.chosen, *DECIDED)}
    reasons = {**proposed, **{key: rule for key, _, rule in changes}}
    contents: dict[str, Any] = {DATASETS: _datasets(made, recipe), PROMPTS: library(made)}
    if made.kind == "lokr":
        contents[LYCORIS] = lycoris(made)
    settings |= {key: f"{FOLDER}/{file}" for key, file in NAMED_BY.items() if file in contents}
    files = {file: json.dumps(content, indent=4, ensure_ascii=False) + "\n" for file, content in contents.items()}
    return Rendered({CONFIG: with_reasons(settings, {key: reasons[key] for key in settings if key in reasons}, recipe, card_gb), **files}, settings)


def _datasets(made: Situation, recipe: Recipe) -> list[dict[str, Any]]:
    pictures, *others = datasets(made)
    pictures = {key: value for key, value in {**pictures, **recipe.of_pictures}.items() if not (key == "repeats" and value == 0)}
    return [pictures, *([dict(recipe.regularisation)] if recipe.regularisation else []), *others]


def with_reasons(settings: Mapping[str, Any], reasons: Mapping[str, str], recipe: Recipe, card_gb: int) -> str:
    """config.json with comments: what it is, and in groups each value's reason."""
    mine = {key for keys in GROUPS.values() for key in keys}
    lines = [
        "{",
        f"    // {recipe.summary}",
        f"    // For a card of {card_gb} GB and about {PICTURES} pictures; `simpletuner options KEY` explains a key.",
    ]
    if made_for_many(recipe):
        lines[2] = f"    // For a card of {card_gb} GB and about {MANY_PICTURES} pictures; `simpletuner options KEY` explains a key."
    for title, keys in GROUPS.items():
        there = [key for key in keys if key in settings] if title != FITTING else [key for key in settings if key not in mine]
        lines += ["", f"    // {title}"] if there else []
        for key in there:
            reason = f"  // {reasons[key]}" if key in reasons else ""
            lines.append(f"    {json.dumps(key)}: {json.dumps(settings[key], ensure_ascii=False)},{reason}")
    return "\n".join([*lines, "}"]) + "\n"


def made_for_many(recipe: Recipe) -> bool:
    return recipe.answers.get("model_type") == "full"

"""What is said of an example: its README, the table of cards, and what a run of it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from simpletuner.cli.choices import family_of
from simpletuner.cli.recipes.rendering import Fit, fit_of, made_for_many, render, situation
from simpletuner.cli.recipes.table import CARDS_GB, RECIPES, USUAL_CARD_GB
from simpletuner.cli.wizard.machine import GIGABYTE

SHOWN = ("base_model_precision", "train_batch_size", "optimizer")
"""Settings that the table names on every card, where they are not the usual ones."""
USUAL = {"base_model_precision": "no_change", "optimizer": "torch-adamw"}
NO_FIT = "does not fit"


def readme(name: str, card_gb: int, folder: str) -> str:
    """The page in a copy of an example.

    Args:
        folder: where the copy lies.
    """
    recipe = RECIPES[name]
    trains = f"simpletuner train --config {folder}/config.json"
    return "\n".join(
        [
            f"# {name}",
            "",
            recipe.summary,
            "",
            f"Written for a card of {card_gb} GB.",
            f"The model, {model_of(name, card_gb)}, comes from the hub: about {download_gb(name, card_gb):.0f} GB, once.",
            "",
            *pictures_needed(name),
            "",
            "```bash",
            f"simpletuner dataset check --config {folder}/config.json   # looks at every picture and caption",
            trains,
            "```",
            "",
            "What to change: the folder of pictures in `multidatabackend.json`, `validation_prompt` in `config.json` and",
            "`user_prompt_library.json`; then rate and steps, when the first pictures are there.",
            "",
            *card_table(name),
            "",
        ]
    )


def pictures_needed(name: str) -> list[str]:
    """What has to be in which folder."""
    recipe = RECIPES[name]
    captions = "no captions are needed" if recipe.answers.get("caption_strategy") == "instanceprompt" else "a .txt file with its caption beside each"
    count = "thousands of pictures" if made_for_many(recipe) else "ten to fifty pictures"
    lines = [f"- `{recipe.pictures}`: {count}, at least as large as the resolution; {captions}."]
    if recipe.regularisation:
        others = "a hundred pictures of others of its kind, which the adapter is to leave as the base model has them"
        lines.append(f"- `{recipe.regularisation['instance_data_dir']}`: {others}.")
    return lines


def folders_of(name: str) -> list[str]:
    """The folders of pictures."""
    recipe = RECIPES[name]
    return [recipe.pictures, *([str(recipe.regularisation["instance_data_dir"])] if recipe.regularisation else [])]


def model_of(name: str, card_gb: int = USUAL_CARD_GB) -> str:
    """Where the model is, on the hub."""
    return situation(name, card_gb).model.name


def download_gb(name: str, card_gb: int = USUAL_CARD_GB) -> float:
    fit = fit_of(name, card_gb)
    return fit.download_bytes / GIGABYTE if fit else 0.0


def card_table(name: str) -> list[str]:
    """Settings by card, as rows of markdown."""
    head = ["| card | flavour | settings | planned, GB | step takes |", "|---|---|---|---|---|"]
    return [*head, *(f"| {' | '.join(row)} |" for row in _rows(name))]


def _rows(name: str) -> Iterator[list[str]]:
    first = next(iter(family_of(RECIPES[name].family).flavours))
    for card in CARDS_GB:
        fit = fit_of(name, card)
        if fit is None:
            continue
        settings = render(name, card).settings
        flavour = str(settings.get("model_flavour", first))
        if not fit.fits:
            yield [f"{card} GB", f"`{flavour}`", NO_FIT, f"{fit.card_bytes / GIGABYTE:.1f}", ""]
            continue
        keys = [key for key in SHOWN if settings[key] != USUAL.get(key)]
        keys += [key for change in fit.changes for key in change["settings"] if key not in keys]
        said = ", ".join(f"`{key}` {_plain(settings[key])}" for key in keys)
        yield [f"{card} GB", f"`{flavour}`", said, f"{fit.card_bytes / GIGABYTE:.1f}", f"x {fit.time_factor:.2f}" if fit.time_factor != 1 else ""]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def vram(fit: Fit | None) -> str:
    """What the plan says of the card, in words."""
    if fit is None:
        return "not planned; `simpletuner plan` does that"
    if not fit.fits:
        return f"{fit.card_bytes / GIGABYTE:.1f} GB by the plan, which does not fit; `simpletuner plan --fit` finds settings"
    return f"{fit.card_bytes / GIGABYTE:.1f} GB by the plan; `simpletuner plan` has it phase by phase"

"""`simpletuner examples`: what there is, a copy to change, and a run of one."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.cli.locate import examples
from simpletuner.errors import ConfigError, DatasetError, choose

if TYPE_CHECKING:
    from simpletuner.console import Console

help = "list the examples, copy one to change it, or run one"
example = "simpletuner examples copy digits && simpletuner train --env digits"

TEXTS = frozenset({".json", ".toml", ".env"})
PLACEHOLDER = "{example}"
UNKNOWN = "see its README"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "copy", "run"), default="list", help="what to do (default: list)")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the example")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where to copy it (default: config/NAME)")
    parser.add_argument("-d", "--dest", metavar="FOLDER", help="the same")
    parser.add_argument("--card", metavar="SIZE", help="of examples for released models: settings for this card: 8, 12, 16, 24 (default) or 48 GB")
    parser.set_defaults(flags=[])
    parser.epilog = (
        "digits needs neither card nor download. The examples named FAMILY-METHOD are for your own pictures; they are written when they are copied,\n"
        "with a reason beside each value. `run` copies one to config/NAME first, unless it is there, and takes options of config.json as flags."
    )


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.recipes.table import RECIPES
    from simpletuner.console import Console

    if args.action != "run" and args.flags:
        hint = choose(args.flags[0], ("--dest", "--card"), "flags")
        raise ConfigError(f"simpletuner examples {args.action} does not take {args.flags[0]!r}", hint=hint)
    if args.action == "list" and (args.folder or args.dest):
        raise ConfigError("simpletuner examples list takes no folder", hint="simpletuner examples copy NAME FOLDER")
    console = Console()
    if args.action == "list":
        show_all(console)
        return 0
    known = [*examples(), *RECIPES]
    shipped = str(args.name).partition("/")[0] if args.action == "run" else args.name  # a shipped one may have several configs
    if args.name not in RECIPES and shipped not in examples():
        problem = f"{args.name!r} is not an example" if args.name else f"{args.action} needs the name of an example"
        raise ConfigError(problem, hint=choose(args.name or "", known, "examples"))
    if args.card and args.name not in RECIPES:
        raise ConfigError(f"--card is not for {args.name}, which has settings of its own", hint="Leave --card out.")
    if args.action == "run":
        return run_recipe(args, console) if args.name in RECIPES else run_shipped(args, console)
    destination = Path(args.folder or args.dest or f"config/{args.name}")
    if args.name in RECIPES:
        write_recipe(args.name, args.card, destination)
    else:
        copy(examples()[args.name], destination)
    print(f"copied to {destination}; train it with: simpletuner train --config {destination / 'config.json'}")
    return 0


# What there is.


def show_all(console: Console) -> None:
    """The table of examples."""
    rows = [*_shipped_rows(), *_recipe_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]))


def _shipped_rows() -> list[list[str]]:
    from simpletuner.cli.recipes.table import EMBEDDED
    from simpletuner.relaxed_json import load_relaxed

    rows = [["name", "family", "method", "card", "downloads", ""]]
    for name, folder in examples().items():
        facts, settings = EMBEDDED.get(name), load_relaxed(folder / "config.json")
        family = str(settings.get("model_family", "")) if isinstance(settings, dict) else ""
        shown = [facts.method, facts.card, facts.download] if facts else ["", UNKNOWN, UNKNOWN]
        rows.append([name, family, *shown, summary(folder)])
    return rows


def _recipe_rows() -> list[list[str]]:
    from simpletuner.cli.recipes.pages import download_gb
    from simpletuner.cli.recipes.rendering import kept, smallest_card
    from simpletuner.cli.recipes.table import RECIPES

    rows = []
    for name in (name for name in RECIPES if name in kept()):
        recipe, least = RECIPES[name], smallest_card(name)
        card = f"from {least} GB" if least else "over 48 GB"
        rows.append([name, recipe.family, recipe.method, card, f"{download_gb(name):.0f} GB", recipe.summary])
    return rows


# A copy.


def refuse_taken(destination: Path) -> None:
    """
    Raises:
        ConfigError: there is something at the destination.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} is there already", hint="Choose another folder, or remove it.")


def write_recipe(name: str, card: str | None, destination: Path) -> None:
    """Write an example for a released model.

    Raises:
        ConfigError: there is something at the destination, or it cannot be written to.
    """
    from simpletuner.cli.recipes.pages import readme
    from simpletuner.cli.recipes.rendering import render
    from simpletuner.cli.recipes.table import USUAL_CARD_GB, card_named
    from simpletuner.cli.wizard.files import write

    refuse_taken(destination)
    card_gb, folder = card_named(card) if card else USUAL_CARD_GB, destination.as_posix()
    files = {destination / file: text.replace("{folder}", folder) for file, text in render(name, card_gb).files.items()}
    write({**files, destination / "README.md": readme(name, card_gb, folder)})


def copy(source: Path, destination: Path) -> None:
    """Copy an example's folder; its files of settings then name the copy.

    Raises:
        ConfigError: there is something at the destination.
    """
    refuse_taken(destination)
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for path in destination.rglob("*"):
        # Weights and tokenizers are JSON too, in part, but none of theirs has the placeholder.
        if path.suffix in TEXTS:
            text = path.read_text(encoding="utf-8")
            if PLACEHOLDER in text:
                path.write_text(text.replace(PLACEHOLDER, destination.as_posix()), encoding="utf-8")


def summary(folder: Path) -> str:
    """The first line of text in an example's README."""
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line for line in lines if line.strip() and not line.startswith(("#", "!", "<"))), "")


# A run.


def train(words: Sequence[str]) -> int:
    """What `simpletuner train` does with these words."""
    from simpletuner.cli.main import run as run_command

    return run_command(["train", *words])


def flags_of(args: argparse.Namespace) -> list[str]:
    """What stands behind the name: options, whose values argparse would take for a folder."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--card")
    behind: list[str] = args.argv[args.argv.index(args.name) + 1 :]
    return own.parse_known_args(behind)[1]


def run_shipped(args: argparse.Namespace, console: Console) -> int:
    from simpletuner.cli.recipes.table import EMBEDDED

    facts = EMBEDDED.get(args.name.partition("/")[0])
    if facts:
        needs(console, {"card": facts.card, "downloads": facts.download})
    return train(["--example", args.name, *flags_of(args)])


def run_recipe(args: argparse.Namespace, console: Console) -> int:
    """Copy an example unless it is there, and train it.

    Raises:
        DatasetError: its pictures are not there.
    """
    from simpletuner.cli.recipes.pages import download_gb, folders_of, model_of, vram
    from simpletuner.cli.recipes.rendering import fit_of
    from simpletuner.cli.recipes.table import USUAL_CARD_GB, card_named

    destination, card_gb = Path("config") / args.name, card_named(args.card) if args.card else USUAL_CARD_GB
    is_there = (destination / "config.json").is_file()
    free = shutil.disk_usage(Path()).free / 1e9
    said = {
        "pictures": " and ".join(folders_of(args.name)),
        "model": f"{model_of(args.name, card_gb)}, about {download_gb(args.name, card_gb):.0f} GB from the hub unless it is on this machine",
        "disk": f"that, and some for caches and checkpoints; {free:.0f} GB are free here",
        f"card of {card_gb} GB": vram(fit_of(args.name, card_gb)),
    }
    if is_there:  # and may have been changed since
        said = {"settings": f"{destination}, as it was copied before; `simpletuner plan` says what memory they take"}
    needs(console, said)
    if is_there and args.card:
        raise ConfigError(f"{destination} is there already, and --card would make another", hint=f"Leave --card out, or remove {destination}.")
    missing = [] if is_there else [folder for folder in folders_of(args.name) if not Path(folder).is_dir()]
    if missing:
        raise DatasetError(
            f"{args.name} learns from your pictures, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there",
            hint=f"Make the folder and put pictures in; or `simpletuner examples copy {args.name}` and name another in multidatabackend.json.",
        )
    if not is_there:
        write_recipe(args.name, args.card, destination)
        console.say(f"copied to {destination}")
    return train(["--config", os.fspath(destination / "config.json"), *flags_of(args)])


def needs(console: Console, said: Mapping[str, str]) -> None:
    """Say what a run needs, before it begins."""
    console.heading("It needs")
    console.facts(dict(said))
    console.say()

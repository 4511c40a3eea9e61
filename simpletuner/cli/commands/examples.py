"""`simpletuner examples`: what is embedded, and a copy of it to change."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from simpletuner.cli.locate import examples
from simpletuner.errors import ConfigError, choose

help = "list the embedded examples, or copy one to change it"
example = "simpletuner examples copy digits && simpletuner train --env digits"

TEXTS = frozenset({".json", ".toml", ".env"})
PLACEHOLDER = "{example}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "copy"), default="list", help="what to do (default: list)")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the example to copy")
    parser.add_argument("-d", "--dest", metavar="FOLDER", help="where to copy it (default: config/NAME)")


def run(args: argparse.Namespace) -> int:
    found = examples()
    if args.action == "list":
        for name, folder in found.items():
            print(f"{name:<24} {summary(folder)}")
        return 0
    if args.name not in found:
        problem = f"{args.name!r} is not an embedded example" if args.name else "copy needs the name of an example"
        raise ConfigError(problem, hint=choose(args.name or "", found, "examples"))
    destination = Path(args.dest or f"config/{args.name}")
    copy(found[args.name], destination)
    print(f"copied to {destination}; train it with: simpletuner train --config {destination / 'config.json'}")
    return 0


def copy(source: Path, destination: Path) -> None:
    """Copy an example's folder; its files of settings then name the copy.

    Raises:
        ConfigError: there is something at the destination.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} is there already", hint="Choose another folder with --dest, or remove it.")
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

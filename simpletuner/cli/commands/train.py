"""`simpletuner train`: read the config, then train; or say what would be done."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from simpletuner.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from simpletuner.cli.locate import Place
    from simpletuner.options.load import Loaded
    from simpletuner.options.sources import Setting

help = "train an adapter, or a whole model"
example = "simpletuner train --config config/config.json --learning_rate 5e-5"

NAMED = ("config", "example", "env")
SWITCHES = ("dry_run", "all", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from simpletuner.cli.flags import help_of_options

    add_place(parser)
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be done, load nothing")
    parser.add_argument("--all", action="store_true", help="with --dry-run, also list the options that stand at their defaults")
    parser.set_defaults(flags=[])
    parser.epilog = help_of_options()


def add_place(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which config is meant."""
    place = parser.add_argument_group("which config", "by default ./config.json or config/config.json (also .toml and .env)")
    place.add_argument("--config", metavar="PATH", help="this file, or the config in this folder")
    place.add_argument("-e", "--example", metavar="NAME", help="an embedded example; `simpletuner examples` lists them")
    place.add_argument("--env", metavar="NAME", help="config/NAME/config.json; the variables ENV and SIMPLETUNER_ENV do the same")


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.flags import read_flags
    from simpletuner.cli.launch import is_launched, is_main_process, launch
    from simpletuner.cli.locate import find_config
    from simpletuner.cli.preview import preview
    from simpletuner.console import Console

    flags, own = read_flags(args.flags, NAMED, SWITCHES)
    asked = {"config": args.config, "example": args.example, "env": args.env, **own}
    place = find_config(asked["config"], asked["example"], asked["env"], os.environ)
    loaded = read_options(place, flags)
    training = loaded.config.training
    variables = {"model_family": loaded.config.models.model_family, "output_dir": str(training.output_dir)}
    if place.example:
        variables["example"] = str(place.example)
    console = Console(is_main=is_main_process(os.environ))
    if args.dry_run:
        with naming_readme(place):
            preview(loaded, place.name, variables, console, lists_all=args.all)
        return 0
    if training.num_processes > 1 and not is_launched(os.environ):
        return launch([sys.executable, "-m", "simpletuner", *args.argv], training.num_processes)
    console.say(f"training by {place.name}")

    from simpletuner.training.quiet import quiet_libraries
    from simpletuner.training.signals import EXIT_CODES, leave_at_once

    for number in EXIT_CODES:
        signal.signal(number, leave_at_once)  # until the run takes them over
    quiet_libraries()
    from simpletuner.training.assemble import train  # torch and all: seconds that a refused config need not wait for

    with naming_readme(place):
        return train(loaded, console, variables)


@contextmanager
def naming_readme(place: Place) -> Iterator[None]:
    """Where an example comes with scripts that make what it needs, let a refusal name the page that tells of them."""
    try:
        yield
    except (ConfigError, DatasetError) as error:
        if place.example is None or not any(place.example.glob("*.py")):
            raise
        first = f"Has what the example needs been made? See {place.example / 'README.md'}."
        raise type(error)(error.message, hint=f"{error.hint} {first}" if error.hint else first) from error


def read_options(place: Place, flags: Sequence[Setting]) -> Loaded:
    """Read the options of a config, of config.env beside it, of the environment and of flags, the strongest last.

    Variables of an .env file that are no options are put into the environment, for libraries.
    """
    from simpletuner.cli.choices import family_defaults, idle_of, known_names
    from simpletuner.cli.launch import is_launched
    from simpletuner.options.load import load_config
    from simpletuner.options.sources import Setting, read_environment, read_file

    settings, variables = read_file(place.config, os.environ, place.name)
    beside = place.config.parent / "config.env"
    if place.config.suffix != ".env" and beside.is_file():
        more, others = read_file(beside, os.environ)
        settings, variables = [*settings, *more], {**variables, **others}
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    # Somebody else's launcher may have started more processes, or fewer, than the config says.
    launched = [Setting("num_processes", os.environ["WORLD_SIZE"], "the launcher's WORLD_SIZE")] if is_launched(os.environ) else []
    return load_config(
        [*settings, *read_environment(os.environ), *flags, *launched],
        family_defaults,
        idle_of=idle_of,
        choices=known_names(),
        variables={"example": str(place.example)} if place.example else {},
        environ=os.environ,
    )

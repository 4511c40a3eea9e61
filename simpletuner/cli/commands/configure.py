"""`simpletuner configure`: questions and proposals, and from the answers a config that trains."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simpletuner.cli.wizard.asking import Asker
    from simpletuner.cli.wizard.existing import Existing
    from simpletuner.cli.wizard.flow import Walk
    from simpletuner.console import Console
    from simpletuner.options.sources import Setting

help = "answer questions, with a proposal for each, and get a config that trains"
example = "simpletuner configure --pictures datasets/my-cat"

SWITCHES = ("output", "pictures", "card", "edit", "defaults", "yes", "no-plan", "debug")
CONFIG_FOLDER = Path("config")
INTERRUPTED = 130
USUAL = "usual"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where the files go (default: config/ and the name that is asked)")
    parser.add_argument("--pictures", metavar="FOLDER", help="the pictures to learn from")
    parser.add_argument("--card", metavar="SIZE", help="propose for a card of this size, such as 12GB, or for `none`, rather than for this machine")
    parser.add_argument("--edit", metavar="PATH", nargs="?", const=USUAL, help="change a config that is there (default: where train looks for one)")
    parser.add_argument("--defaults", action="store_true", help="take all proposals, ask nothing")
    parser.add_argument("--yes", action="store_true", help="the same, and change files that are there")
    parser.add_argument("--no-plan", action="store_true", help="plan no memory on the way")
    parser.set_defaults(flags=[])
    parser.epilog = (
        "Options of config.json may be given as flags, and are not asked then: --model_family sdxl. At a terminal, arrow keys move, Enter takes,\n"
        "the left arrow goes back, ? explains; elsewhere the questions are plain lines. Ctrl-C keeps the answers: the next start offers them.\n"
        "Exit code 0; 130: stopped before anything was written."
    )


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.wizard.machine import Probe

    probe = None if args.card else Probe()  # first of all, so that it works while everything else is read
    try:
        return configure(args, probe)
    finally:
        if probe:
            probe.stop()


def configure(args: argparse.Namespace, probe: Any) -> int:
    from simpletuner.cli.flags import read_flags
    from simpletuner.cli.wizard.asking import Move, say
    from simpletuner.cli.wizard.ending import finish
    from simpletuner.cli.wizard.flow import Walk, check_given
    from simpletuner.console import Console

    takes_all = args.defaults or args.yes
    flags, _ = read_flags(args.flags, (), SWITCHES)
    console = Console()
    given = {**read_given(flags), **{key: value for key, value in (("pictures", args.pictures), ("card", args.card)) if value}}
    check_given(given)
    existing = open_config(args.edit) if args.edit else None
    draft_folder = existing.path.parent if existing else args.output or CONFIG_FOLDER
    walk = Walk(choose_asker(takes_all, console), console, draft_folder, probe, given, not args.no_plan, not takes_all, existing, args.output)
    if existing and not args.card:
        say(console, "Proposals are for this machine; for another one say its card again, as with --card 24GB.", indent="")
    if args.output:
        walk.chosen["name"] = args.output.name
    try:
        if not takes_all:
            greet(console, existing)
            offer_draft(walk)
        while True:
            walk.walk()
            if takes_all and walk.plans:
                fit_unasked(walk)
            outcome = finish(walk, takes_all=takes_all, agrees=args.yes)
            if not isinstance(outcome, Move):
                return outcome
    except KeyboardInterrupt:
        kept = f"; the answers are kept in {walk.draft_folder}, and the same command goes on from them" if walk.chosen and walk.keeps else ""
        say(console, f"stopped, nothing was written{kept}", indent="")
        return INTERRUPTED
    finally:
        walk.stop_planning()


def read_given(flags: Sequence[Setting]) -> dict[str, Any]:
    """Options that were given as flags, as they will stand in config.json.

    Raises:
        ConfigError: one is not what it should be; names all of them.
    """
    from simpletuner.cli.wizard.questions import read_value
    from simpletuner.errors import ConfigError
    from simpletuner.options.train_config import declared, spellings

    found, problems = {}, []
    for flag in flags:
        key = spellings().get(flag.key, flag.key)
        if key not in declared():
            problems.append(f"--{flag.key} is no option that the wizard could write")
            continue
        try:
            found[key] = read_value(declared()[key], str(flag.value))
        except ValueError as error:
            problems.append(f"--{flag.key}: {error}")
    if problems:
        raise ConfigError("; ".join(problems), hint="`simpletuner options WORD` explains the options whose name or help has that word.")
    return found


def open_config(asked: str) -> Existing:
    """Find and read the config to change.

    Raises:
        ConfigError: there is none, or it is wrong.
    """
    from simpletuner.cli.commands.train import read_options
    from simpletuner.cli.locate import find_config
    from simpletuner.cli.wizard.existing import open_existing
    from simpletuner.cli.wizard.steps import asked_keys

    place = find_config(None if asked == USUAL else asked, None, None, os.environ)
    loaded = read_options(place, [])
    variables = {"model_family": loaded.config.models.model_family, "output_dir": str(loaded.config.training.output_dir)}
    return open_existing(place.config, loaded, list(asked_keys()), variables)


def choose_asker(takes_all: bool, console: Console) -> Asker:
    """Whoever can ask here."""
    from simpletuner.cli.wizard.asking import Plain, Proposals

    if takes_all:
        return Proposals()
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        return Plain(console)
    from simpletuner.cli.wizard.terminal import Terminal

    return Terminal(console)


def greet(console: Console, existing: Existing | None) -> None:
    console.heading(f"Changing {existing.path}" if existing else "A new training")
    console.say("Enter takes what is proposed, ? explains. Nothing is written before the end.\n", style="dim")


def offer_draft(walk: Walk) -> None:
    """Take up the answers of a start that was not finished, if that is wished."""
    from simpletuner.cli.wizard.asking import Move
    from simpletuner.cli.wizard.drafts import drop, take_up
    from simpletuner.cli.wizard.pictures import problem_with
    from simpletuner.cli.wizard.questions import Choice, Question

    draft = take_up(walk.draft_folder)
    if draft is None or problem_with(str(draft.answers.get("pictures", ""))):
        return
    said = f"{len(draft.answers)} answers of {draft.when}" + (f", for {draft.answers['pictures']}" if "pictures" in draft.answers else "")
    choices = (Choice(True, "Go on from there"), Choice(False, "Begin anew, and forget them"))
    asked = walk.asker.ask(
        Question("There are answers of an earlier start. Go on?", True, choices, said, help="They are in " + str(walk.draft_folder))
    )
    if asked is False:
        drop(walk.draft_folder)
    elif asked is not Move.BACK:
        walk.chosen |= draft.answers
        walk.step = draft.step


def fit_unasked(walk: Walk) -> None:
    """Where nobody is asked, look for settings that fit if the plan says that these do not."""
    from simpletuner.cli.wizard.forecast import NO_FIT

    situation = walk.situation()
    if NO_FIT in walk.final_plan(situation):
        walk.fit(situation)

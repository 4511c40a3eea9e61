"""`simpletuner plan`: what memory a run will take, phase by phase, before anything is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from simpletuner.cli.commands.train import NAMED, add_place, read_options

if TYPE_CHECKING:
    from simpletuner.console import Console
    from simpletuner.options.train_config import TrainConfig
    from simpletuner.training.fit import Proposal
    from simpletuner.training.plan import Plan

help = "predict the memory of a run, and find options with which it fits"
example = "simpletuner plan --config config/config.json --fit 12GB"

UNUSED = ("bitsandbytes", "scipy", "boto3")
"""Packages that the libraries of models import where they are installed."""
SWITCHES = ("json", "fit", "device", "debug")
DOES_NOT_FIT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--fit", metavar="SIZE", help="propose the options, those that cost least time, with which it fits a card of this size")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the run would compute (default: cuda)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.set_defaults(flags=[])
    parser.epilog = (
        "Nothing is loaded but configuration files; options of config.json may be given as flags: --base_model_precision int8-quanto.\n"
        "Exit code 0; 4: --fit found nothing that fits."
    )


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.flags import read_flags
    from simpletuner.cli.locate import find_config
    from simpletuner.training.quiet import quiet_libraries

    flags, own = read_flags(args.flags, NAMED, SWITCHES)
    asked = {"config": args.config, "example": args.example, "env": args.env, **own}
    place = find_config(asked["config"], asked["example"], asked["env"], os.environ)
    config = read_options(place, flags).config
    variables = {"model_family": config.models.model_family, "output_dir": str(config.training.output_dir)}
    if place.example:
        variables["example"] = str(place.example)
    card_bytes = read_size(args.fit, args.device)
    quiet_libraries()
    is_alone = sys.argv[1:2] == ["plan"]  # not within another program, which may want them later
    with absent(unused(config)) if is_alone else nullcontext():
        return plan(args, config, variables, card_bytes)


def plan(args: argparse.Namespace, config: TrainConfig, variables: dict[str, str], card_bytes: int | None) -> int:
    """Plan, and say it."""
    import json

    from simpletuner.console import Console
    from simpletuner.training.building import build_family
    from simpletuner.training.fit import fit
    from simpletuner.training.plan import plan_run
    from simpletuner.training.plan_pictures import largest_batch

    console = Console(stream=sys.stderr if args.json else sys.stdout)
    console.say("planning on shapes alone, which takes some seconds")
    batch = largest_batch(config, build_family(config), variables)
    if card_bytes is None:
        found = plan_run(config, batch.size, batch.count, args.device, batch.references)
        said = {**found.as_json(), "notes": [*batch.notes, *found.notes]}
        fits = True
    else:
        proposal = fit(config, batch, card_bytes)
        said, fits, found = {"fit": proposal.as_json(), **proposal.plan.as_json()}, proposal.fits, proposal.plan
        show_proposal(proposal, args.fit, console)
    show(found, batch.notes, console)
    if args.json:
        print(json.dumps(said, indent=1))
    return 0 if fits else DOES_NOT_FIT


def unused(config: TrainConfig) -> tuple[str, ...]:
    """Packages that a plan can do without, and whose import takes as long as the plan itself."""
    asks_for_optimizers = config.adapters.model_type == "full" or config.optim.optimizer.startswith("bnb-")
    return tuple(name for name in UNUSED if not (asks_for_optimizers and name == "bitsandbytes"))


@contextmanager
def absent(packages: tuple[str, ...]) -> Iterator[None]:
    """Have packages seem not to be installed, those aside that are imported already."""
    hidden: dict[str, None] = {name: None for name in packages if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def read_size(text: str | None, device: str) -> int | None:
    """Read the size of a card.

    Raises:
        ConfigError: it is none, or the run would not be on a card.
    """
    from simpletuner.errors import ConfigError
    from simpletuner.options.memory import size_in_bytes

    if text is None:
        return None
    if device != "cuda":
        raise ConfigError("--fit is about a card, and --device cpu has none", hint="Leave one of them out.")
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--fit {error}", hint="Write --fit 12GB.") from error


def show(plan: Plan, notes: tuple[str, ...], console: Console) -> None:
    """Print a plan as a table, and the parts of its step."""
    console.heading(f"Memory, for {plan.batch_size} x {plan.size}")
    rows = [[phase.name, gigabytes(phase.vram_bytes), gigabytes(phase.ram_bytes)] for phase in plan.phases]
    rows.append(["peak", gigabytes(plan.peak_vram_bytes), gigabytes(plan.peak_ram_bytes)])
    if plan.peak_vram_bytes:
        rows.append(["with CUDA", gigabytes(plan.card_bytes), ""])
    console.table(["phase", "VRAM GB", "RAM GB"], rows)
    parts = plan.phase("step").parts
    console.say()
    console.facts({"step": ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())})
    if plan.peak_vram_bytes:
        taken = gigabytes(plan.card_bytes - plan.peak_vram_bytes)
        console.say(f"note: {gigabytes(plan.card_bytes)} GB must be free on the card, of which CUDA itself takes about {taken}; --fit goes by this")
    for note in (*notes, *plan.notes):
        console.say(f"note: {note}")


def show_proposal(proposal: Proposal, asked: str, console: Console) -> None:
    """Print what to change, what that costs, and the lines for config.json."""
    import json

    if not proposal.fits:
        nearest = "this comes nearest" if proposal.changes else "nothing comes nearer than the run as it is"
        console.heading(f"Nothing that is known here makes this run fit {asked}; {nearest}")
    elif not proposal.changes:
        console.heading(f"The run fits {asked} as it is")
        return
    else:
        console.heading(f"With this the run fits {asked}; a step takes about {proposal.time_factor:.2f} times as long")
    for change in proposal.changes:
        written = ", ".join(f"{key} {json.dumps(value)}" for key, value in change.settings.items())
        factor = "" if change.time_factor == 1 else f"x {change.time_factor:.2f}: "
        console.say(f"  {written}\n    {factor}{change.rule}")
    settings = {key: value for change in proposal.changes for key, value in change.settings.items()}
    if settings:
        console.say("\nLines for config.json:\n")
    for key, value in settings.items():
        console.say(f"  {json.dumps(key)}: {json.dumps(value)},")
    if not proposal.fits:
        console.say("\nA lower resolution, or a smaller model, is what is left.")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"

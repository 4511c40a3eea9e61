"""`simpletuner dataset check`: what is wrong with images and captions, before anything is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from simpletuner.cli.commands.train import NAMED, add_place, read_options

if TYPE_CHECKING:
    from pathlib import Path

    from simpletuner.console import Console
    from simpletuner.data.doctor.findings import ModelFacts, Report
    from simpletuner.models.family import ModelFamily
    from simpletuner.options.train_config import TrainConfig
    from simpletuner.types import Size

help = "check images and captions before training"
example = "simpletuner dataset check --config config/config.json --html check.html"

SWITCHES = ("json", "html", "only", "decode", "debug")
UNUSABLE = 3
STANDARD_OUTPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check",), help="what to do: check looks for broken, double, cut and badly captioned images")
    add_place(parser)
    parser.add_argument("--only", metavar="ID", action="append", default=[], help="this dataset alone; may be given several times")
    parser.add_argument("--decode", action="store_true", help="decode every image at full size, which finds more damage and takes longer")
    report = parser.add_argument_group("the report", "by default a table; nothing is loaded, and only the index of files in cache_dir is written")
    report.add_argument("--json", metavar="FILE", nargs="?", const=STANDARD_OUTPUT, help="everything as JSON, into a file or else to the screen")
    report.add_argument("--html", metavar="FILE", help="one page with thumbnails and crops, to open in a browser")
    parser.set_defaults(flags=[])
    parser.epilog = (
        "Options of config.json may be given as flags: --resolution 512. Exit code 0: usable, 3: a dataset is not, 2: the config is wrong."
    )


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.choices import family_of
    from simpletuner.cli.flags import read_flags
    from simpletuner.cli.locate import find_config
    from simpletuner.cli.preview import USUAL_ALIGNMENT_PX, knows_alignment
    from simpletuner.console import Console
    from simpletuner.data.doctor.examine import examine
    from simpletuner.data.plan import load_plan

    flags, own = read_flags(args.flags, NAMED, SWITCHES)
    asked = {"config": args.config, "example": args.example, "env": args.env, **own}
    place = find_config(asked["config"], asked["example"], asked["env"], os.environ)
    config = read_options(place, flags).config
    variables = {"model_family": config.models.model_family, "output_dir": str(config.training.output_dir)}
    if place.example:
        variables["example"] = str(place.example)
    console = Console(stream=sys.stderr if args.json == STANDARD_OUTPUT else sys.stdout)
    family = family_of(config.models.model_family)(config.models)
    family.check_source()
    alignment_px = family.alignment_px if knows_alignment(family) else USUAL_ALIGNMENT_PX
    plan = load_plan(config.data.data_backend_config, config.data, variables, alignment_px=alignment_px, checks_places=False)
    for note in plan.notes:
        console.say(f"note: {note}")
    report = examine(plan, place.name, config.data, config.training, facts_of(config, family), console, only=args.only, decodes=args.decode)
    write(report, args, console)
    return 0 if report.is_usable else UNUSABLE


def facts_of(config: TrainConfig, family: ModelFamily) -> ModelFacts:
    """What is known of the model without loading it."""
    from simpletuner.cli.preview import is_here, knows_alignment
    from simpletuner.data.doctor.findings import ModelFacts
    from simpletuner.errors import ConfigError
    from simpletuner.models.offline import shapes, text_bytes, token_counter

    def refuse_size(size: Size) -> str | None:
        try:
            family.check_size(size)
        except ConfigError as error:
            return f"{error.message}. {error.hint}" if "alignment" in str(error.hint) else error.message
        return None

    known = shapes(family)
    count_tokens = token_counter(family)
    assumed = list(known.assumed)
    if count_tokens is None:
        assumed.append("the tokenizer is not on this machine: tokens of captions are estimated from their length")
    if not knows_alignment(family) and not config.data.aspect_bucket_alignment:
        assumed.append("the model is not on this machine: sides of buckets are taken to be multiples of 64 px")
    is_live = config.adapters.train_text_encoder and not family.frozen_text
    return ModelFacts(
        text_tokens=family.text_tokens,
        latent_channels=known.latents.channels,
        stride_px=known.latents.stride_px,
        text_bytes=0 if is_live else text_bytes(known.text, 4 if config.memory.mixed_precision == "no" else 2),
        count_tokens=count_tokens,
        refuse_size=refuse_size if is_here(family) else lambda size: None,
        assumed=tuple(assumed),
    )


def write(report: Report, args: argparse.Namespace, console: Console) -> None:
    """Give the report in the forms that were asked for.

    Raises:
        ConfigError: a file cannot be written.
    """
    import json
    from pathlib import Path

    from simpletuner.data.doctor.as_json import as_json
    from simpletuner.data.doctor.page import page
    from simpletuner.data.doctor.table import show

    if args.json == STANDARD_OUTPUT:
        print(json.dumps(as_json(report), indent=1))
    else:
        show(report, console)
    texts = {}
    if args.json not in (None, STANDARD_OUTPUT):
        texts[args.json] = lambda: json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n"
    if args.html:
        texts[args.html] = lambda: page(report, console)
    for name, make in texts.items():
        save(Path(name), make())
        console.say(f"written: {name}")


def save(path: Path, text: str) -> None:
    """Write a report; bytes of a name or caption that are no text become question marks.

    Raises:
        ConfigError: it cannot be written.
    """
    from simpletuner.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Name a file in a folder that this user may write to.") from error

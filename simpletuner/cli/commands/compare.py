"""`simpletuner compare`: the checkpoints of a run side by side, at several strengths, on the prompts that it was validated with or others."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from simpletuner.errors import ConfigError

help = "lay checkpoints of a run side by side, by prompt and strength"
example = "simpletuner compare output/my-lora --checkpoints 500,1000 --strength 0.5,1"

SWITCHES = ("checkpoints", "strength", "prompts", "debug")
EPILOG = """\
Pictures go to RUN/compare, and are not rendered again while their checkpoint and settings stay; RUN/compare.html and RUN/compare.png show
them all. The base is loaded once. Without prompts those that the run was validated with are rendered. Ctrl-C keeps what is done: the same
command goes on.

Options of config.json may be given as flags, such as --validation_num_inference_steps 20, --validation_resolution 768, or
--pretrained_model_name_or_path where the model lies elsewhere.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'simpletuner compare RUN ["PROMPT" ...] [arguments]'
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a run")
    parser.add_argument("--checkpoints", metavar="STEP,...", default="all", help="which of its checkpoints (default: all)")
    parser.add_argument("--strength", metavar="NUMBER,...", default="", help="of the adapter, e.g. 0.5,1.0 (default: that of validation)")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="text with a prompt in each line, or .json as user_prompt_library")
    parser.set_defaults(flags=[])
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    from simpletuner.training.signals import EXIT_CODES, leave_at_once

    before = {number: signal.signal(number, leave_at_once) for number in EXIT_CODES}  # until the rendering takes them over
    try:
        return compare(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compare(args: argparse.Namespace) -> int:
    from simpletuner.cli.commands.export import read_run
    from simpletuner.cli.commands.generate import read_strengths
    from simpletuner.console import Console
    from simpletuner.options.sources import read_words
    from simpletuner.training.quiet import quiet_libraries

    strengths = read_strengths(args.strength)
    flags, prompts = read_words(args.flags, needs_dashes=True)
    if not args.run.is_dir():
        raise ConfigError(f"{args.run} is no folder", hint="Give the output_dir of a run.")
    quiet_libraries()
    from simpletuner.training.checkpoint_grid import Comparison, columns_of, compare_checkpoints
    from simpletuner.training.generate import prompts_of

    columns = columns_of(args.run, args.checkpoints)
    path = columns[-1].path
    assert path is not None
    config, has_settings = read_run(path, [f"--{flag.key}={flag.value}" for flag in flags], SWITCHES)
    if not has_settings:
        raise ConfigError(f"{args.run} has no simpletuner_config.json, which tells how it was trained", hint="Give the output_dir of a run.")
    return compare_checkpoints(Comparison(args.run, config, columns, strengths, prompts_of(prompts, args.prompts, config)), Console())

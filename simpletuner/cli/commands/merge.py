"""`simpletuner merge`: a whole diffusers pipeline with what was trained baked in."""

from __future__ import annotations

import argparse
from pathlib import Path

from simpletuner.errors import ConfigError

help = "write a whole pipeline with the adapter baked in"
example = "simpletuner merge output/my-lora --output my-model"

SWITCHES = ("output", "dtype", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_FILE", type=Path, help="output folder of a run, a checkpoint in it, or an adapter file")
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="folder to write; must not be there yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="number format of the denoiser's weights (default float32)"
    )
    parser.set_defaults(flags=[])
    parser.epilog = "Options of config.json may be given as flags, e.g. --pretrained_model_name_or_path."


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.commands.export import read_run
    from simpletuner.console import Console
    from simpletuner.training.quiet import quiet_libraries

    if args.output.exists():
        raise ConfigError(f"--output {args.output} is there already", hint="Name a folder that is not; nothing is overwritten.")
    quiet_libraries()
    from simpletuner.training.finished import find_weights, holds_adapter, open_finished
    from simpletuner.training.merge import merge_adapter, merge_full

    path = find_weights(args.run)
    config, has_settings = read_run(path, args.flags, SWITCHES)
    if holds_adapter(path):
        merge_adapter(open_finished(path, config, has_settings), args.output, args.dtype, Console())
    else:
        merge_full(path, config, args.output, args.dtype, Console())
    return 0

"""`simpletuner export`: write a trained adapter in the layout of other software, and check that it is read there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.options.train_config import TrainConfig

help = "write an adapter for ComfyUI, kohya's scripts, diffusers or LyCORIS"
example = "simpletuner export --format comfyui --check output/my-lora"

FORMATS = ("diffusers", "kohya", "comfyui", "lycoris")
SWITCHES = ("format", "output", "check", "overwrite", "debug")
EPILOG = """\
formats:
  diffusers   pipeline.load_lora_weights, PEFT; plain LoRA alone
  kohya       kohya's scripts and the WebUIs (lora_unet_...)
  comfyui     ComfyUI
  lycoris     the LyCORIS library (create_lycoris_from_weights)

RUN_OR_FILE is the output folder of a run, a checkpoint in it, or an adapter file of any of these layouts. Options of config.json may
be given as flags; for a file without its run, say which model it is for: --model_family flux --pretrained_model_name_or_path ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_FILE", type=Path, help="what was trained")
    parser.add_argument("--format", required=True, choices=FORMATS, help="the layout to write, see below")
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write; by default NAME-FORMAT.safetensors beside the adapter")
    parser.add_argument(
        "--check", action="store_true", help="read the file back as its reader does, and compare a denoiser call with the trained model's"
    )
    parser.add_argument("--overwrite", action="store_true", help="take the place of a file of that name")
    parser.set_defaults(flags=[])
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    from simpletuner.console import Console
    from simpletuner.training.quiet import quiet_libraries

    quiet_libraries()
    from simpletuner.training.export import export
    from simpletuner.training.finished import find_weights, open_finished

    path = find_weights(args.run)
    config, has_settings = read_run(path, args.flags, SWITCHES)
    finished = open_finished(path, config, has_settings)
    folder, name = (path.parent, path.stem) if path.is_file() else (path, path.resolve().name)
    output = args.output or folder / f"{name}-{args.format}.safetensors"
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output} is to be a .safetensors file", hint=f"Say --output {output}.safetensors.")
    export(finished, args.format, output, args.check, Console(), overwrites=args.overwrite)
    return 0


def read_run(path: Path, words: Sequence[str], switches: Sequence[str]) -> tuple[TrainConfig, bool]:
    """Read the settings of what was trained, under the flags that were given.

    Returns:
        The settings, and whether they tell how it was trained, and not only on what.

    Raises:
        ConfigError: the model's family is not told by anything.
    """
    from simpletuner.cli.choices import family_defaults, known_names
    from simpletuner.cli.flags import read_flags
    from simpletuner.options.load import load_config
    from simpletuner.options.sources import Setting, read_file
    from simpletuner.training.finished import settings_of

    flags, _ = read_flags(words, (), switches)
    saved, own = settings_of(path)
    settings = read_file(saved, os.environ)[0] if saved else []
    settings += [Setting(key, value, str(path)) for key, value in own.items()]
    if not any(setting.key == "model_family" for setting in (*settings, *flags)):
        raise ConfigError(
            f"{path} does not say which model it is for",
            hint="Add --model_family, and --pretrained_model_name_or_path or --model_flavour.",
        )
    return load_config([*settings, *flags], family_defaults, choices=known_names(), environ=os.environ).config, saved is not None

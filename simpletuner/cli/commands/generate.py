"""`simpletuner generate`: pictures by prompts, as validation renders them, with what a run left or any adapter file."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from simpletuner.options.sources import Setting
    from simpletuner.options.train_config import TrainConfig

help = "render pictures with what was trained, or with a model alone"
example = 'simpletuner generate "a photo of my subject on a beach" --adapter output/my-lora'

MEANS = {
    "seed": "validation_seed",
    "size": "validation_resolution",
    "steps": "validation_num_inference_steps",
    "guidance": "validation_guidance",
    "negative_prompt": "validation_negative_prompt",
    "count": "num_validation_images",
    "image": "validation_start_image",
}
"""Arguments to the options of validation that they set."""
SWITCHES = (*MEANS, "adapter", "prompts", "strength", "output", "overwrite", "debug")
EPILOG = """\
RUN_OR_FILE is the output folder of a run, a checkpoint in it, or an adapter file of diffusers, PEFT, kohya's scripts, ComfyUI or LyCORIS.
A run's own settings hold for all that is not given: a prompt that it was validated with gives the same picture, and without any prompt its own
are rendered. For a file without its run, and for a model alone, say which model: --model_family sdxl --pretrained_model_name_or_path ...
Words without dashes are prompts.

Other options of config.json may be given as flags too, such as --base_model_precision int8-quanto, --mixed_precision or --vae_enable_tiling.
--size, --steps and --guidance are short for validation_resolution, validation_num_inference_steps and validation_guidance, and so on.
Ctrl-C keeps the pictures that are done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'simpletuner generate ["PROMPT" ...] [arguments]'
    parser.add_argument("--adapter", "--run", metavar="RUN_OR_FILE", type=Path, help="what was trained; without it, the model alone")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="text with a prompt in each line, or .json as user_prompt_library")
    parser.add_argument("--strength", metavar="NUMBER,...", default="", help="of the adapter, or several to compare, e.g. 0.5,1.0; 0 is the base")
    parser.add_argument("--seed", metavar="NUMBER", help="of the first picture of each prompt")
    parser.add_argument("--size", metavar="WxH,...", help="e.g. 1024x768, or 1024 for a square, or several with commas")
    parser.add_argument("--steps", metavar="NUMBER", help="sampling steps")
    parser.add_argument("--guidance", metavar="NUMBER", help="how strongly a picture follows its prompt")
    parser.add_argument("--negative_prompt", "--negative-prompt", metavar="TEXT", help="what pictures should not show")
    parser.add_argument("--image", metavar="FILE", help="picture, or folder of them, for a model that improves pictures to start from")
    parser.add_argument("-n", "--count", metavar="NUMBER", help="pictures of each prompt and size, with seeds that follow one another")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("generated"), help="where pictures go (default: generated)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same name, which otherwise stay, and new ones get a number")
    parser.set_defaults(flags=[])
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    from simpletuner.training.signals import EXIT_CODES, leave_at_once

    before = {number: signal.signal(number, leave_at_once) for number in EXIT_CODES}  # until `generate` takes them over
    try:
        return generate(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def generate(args: argparse.Namespace) -> int:
    from simpletuner.console import Console
    from simpletuner.options.sources import read_words
    from simpletuner.training.quiet import quiet_libraries

    strengths = read_strengths(args.strength)
    flags, prompts = read_words(args.flags, needs_dashes=True)
    given = settings_of(args, flags)
    words = [f"--{key}={value}" for key, value in given.items()]
    quiet_libraries()
    from simpletuner.training import generate as rendering
    from simpletuner.training.finished import find_weights

    if args.adapter is None:
        trained, config = None, read_model(words)
    else:
        from simpletuner.cli.commands.export import read_run

        path = find_weights(args.adapter)
        config, has_settings = read_run(path, words, SWITCHES)
        trained = rendering.Trained(path, has_settings)
    if "validation_resolution" not in given and (trained is None or not trained.has_settings):
        raise ConfigError("nothing says how large the pictures are to be", hint="Add --size, e.g. --size 1024; Stable Diffusion 1 was made for 512.")
    named = rendering.prompts_of(prompts, args.prompts, config)
    wish = rendering.Wish(config, trained, named, strengths, args.output, args.overwrite)
    if args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a file", hint="Name a folder.")
    console = Console()
    for note in idle_notes(config, given):
        console.say(f"note: {note}")
    return rendering.generate(wish, console)


def idle_notes(config: TrainConfig, given: Collection[str]) -> list[str]:
    """What of the options of pictures that were given will do nothing, a sentence each."""
    from simpletuner.cli.choices import idle_of
    from simpletuner.options.effects import without_effect

    shown = config.validation.model_copy(update={"validation_prompt": "a prompt", "validation_disable": False})  # whatever the run's own settings are
    return without_effect(config.model_copy(update={"validation": shown}), set(given) & set(MEANS.values()), idle_of(config.models))


def settings_of(args: argparse.Namespace, flags: Sequence[Setting]) -> dict[str, str]:
    """The options that are set, by their keys; arguments of our own are short words for some.

    Raises:
        ConfigError: both words for one are given, and say different things.
    """
    found = {flag.key: str(flag.value) for flag in flags}
    for name, option in MEANS.items():
        value = getattr(args, name)
        if value is not None and found.get(option, value) != value:
            raise ConfigError(f"--{name} {value} and --{option} {found[option]} say the same thing differently", hint="Give one of them.")
        found |= {option: value} if value is not None else {}
    return found


def read_strengths(text: str) -> list[float]:
    """Read "0.5,1.0".

    Raises:
        ConfigError: it holds something else than numbers.
    """
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(f"--strength {text!r} is to be a number, or several with commas", hint="Say --strength 0.5,1.0.") from error


def read_model(words: list[str]) -> TrainConfig:
    """Read which model is meant, where there is no run that says it.

    Raises:
        ConfigError: no family is named.
    """
    from simpletuner.cli.choices import family_defaults, known_names
    from simpletuner.cli.flags import read_flags
    from simpletuner.options.load import load_config

    flags, _ = read_flags(words, (), SWITCHES)
    if not any(flag.key == "model_family" for flag in flags):
        raise ConfigError(
            "nothing says which model is to be used",
            hint="Add --adapter with what a run left, or --model_family and --pretrained_model_name_or_path.",
        )
    return load_config(flags, family_defaults, choices=known_names(), environ=os.environ).config

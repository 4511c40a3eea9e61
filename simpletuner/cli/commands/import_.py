"""`simpletuner import`: the settings of another trainer as a config of ours, and what of them could not be carried over."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import plugins
from simpletuner.errors import ConfigError, choose

if TYPE_CHECKING:
    from simpletuner.importers.importer import Imported

help = "write the config that is equal to another trainer's"
example = "simpletuner import kohya config.toml"

TOOLS = "simpletuner.importers.tools"
CONFIG, DATASETS, PROMPTS, LYCORIS = "config.json", "multidatabackend.json", "user_prompt_library.json", "lycoris_config.json"
EPILOG = """\
FILE is the config of the other trainer. COMMAND is the line that starts it, or one argument: a shell script that holds it, or the line in quotes.
Variables in a script are filled in from it and from the environment. Nothing is downloaded and nothing is trained.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "simpletuner import TOOL [--output FOLDER] [--force] FILE | -- COMMAND"
    parser.add_argument("tool", nargs="?", metavar="TOOL", help="whose settings these are")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="folder for the files (default: config/ and the name of the run)")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(flags=[])
    parser.epilog = f"tools: {', '.join(tools())}\n\n{EPILOG}"


def run(args: argparse.Namespace) -> int:
    from simpletuner.console import Console
    from simpletuner.importers.importer import Importer

    own, words = split(args.argv[1:])
    refused = next((word for word in args.flags if word.startswith("--") and len(word) > 2 and word in own), None)
    if refused:
        raise ConfigError(f"simpletuner import does not take {refused!r}", hint="What the other trainer is told stands after --.")
    known = tools()
    if args.tool not in known:
        problem = f"{args.tool!r} cannot be imported" if args.tool else "which tool's settings are to be imported?"
        raise ConfigError(problem, hint=choose(args.tool or "", known, "tools"))
    words = words if "--" in args.argv else args.flags
    importer: Importer = plugins.load(TOOLS, known[args.tool], Importer)()  # type: ignore[type-abstract]
    if not words:
        line = importer.example if importer.takes_file else f"-- {importer.example}"
        raise ConfigError(f"there is no {'file' if importer.takes_file else 'command'} to import", hint=f"simpletuner import {args.tool} {line}")
    found = importer.read(words, os.environ)
    settle_tracker(found)
    folder = args.output or Path("config") / (Path(found.config["output_dir"]).name or "imported")
    files = files_of(found, folder)
    write(files, folder, args.force)
    show(Console(), found, folder, [folder / name for name in files])
    return 0


def tools() -> dict[str, str]:
    """Names of the tools to those of their files."""
    return {name.replace("_", "-"): name for name in plugins.names(TOOLS)}


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Part our own words from those after `--`, which argparse would look at too."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def settle_tracker(found: Imported) -> None:
    """Let figures go where they can, if there is no such tracker here."""
    from simpletuner.cli.choices import known_names

    asked, known = found.config.get("report_to", "none"), known_names()["tracker"]
    if asked not in known:
        found.config["report_to"] = "tensorboard"
        found.lost.append(f"report_to {asked}: there are {', '.join(known)}; it is tensorboard now")


def files_of(found: Imported, folder: Path) -> dict[str, str]:
    """The files by name, once the options in them are understood.

    Raises:
        ConfigError: a value is none that may be; the other trainer would have failed on it, too.
    """
    from simpletuner.cli.choices import family_defaults, known_names
    from simpletuner.options.load import load_config
    from simpletuner.options.sources import Setting

    place = folder.as_posix()
    beside = {"user_prompt_library": (PROMPTS, found.prompts), "lycoris_config": (LYCORIS, found.lycoris)}
    named = {key: f"{place}/{name}" for key, (name, content) in beside.items() if content}
    config: Mapping[str, Any] = {**found.config, **named, "data_backend_config": f"{place}/{DATASETS}"}
    settings = [Setting(key, value, "what is imported") for key, value in config.items()]
    load_config(settings, family_defaults, choices=known_names(), environ=os.environ)
    contents: dict[str, object] = {CONFIG: config, DATASETS: found.datasets, **{name: content for name, content in beside.values() if content}}
    return {name: json.dumps(content, indent=4, ensure_ascii=False) + "\n" for name, content in contents.items()}


def write(files: Mapping[str, str], folder: Path, replaces: bool) -> None:
    """Write all files, or none if one is there that may not be replaced.

    Raises:
        ConfigError: there is one, or the folder cannot be written to.
    """
    there = [name for name in files if (folder / name).exists()]
    if there and not replaces:
        raise ConfigError(f"{', '.join(str(folder / name) for name in there)} would be overwritten", hint="Say --force, or another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}", hint="Choose another --output.") from error


def show(console: Any, found: Imported, folder: Path, files: list[Path]) -> None:
    """Say what was written, and line by line what is not in it."""
    for file in files:
        console.say(f"wrote {file}")
    for title, lines in (("Not carried over", found.lost), ("Not quite the same", found.notes)):
        if lines:
            console.heading(title)
            for line in lines:
                console.say(f"  - {line}")
    console.say(f"\nLook at what it would do, then train:\n\n  {shlex.join(['simpletuner', 'train', '--config', str(folder / CONFIG), '--dry-run'])}")

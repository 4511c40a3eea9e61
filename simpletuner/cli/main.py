"""Find the command, run it, and turn an error into a message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import keyword
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from simpletuner import __version__, plugins
from simpletuner.cli.failures import report
from simpletuner.errors import ConfigError, choose

COMMANDS = "simpletuner.cli.commands"
HEAD = """\
usage: simpletuner COMMAND [arguments]

Fine-tune diffusion models with LoRA, LyCORIS or all their weights.

commands:
"""
TAIL = """
simpletuner COMMAND --help     what a command takes, with an example
simpletuner --version          the version
"""


class Command(Protocol):
    """What a file in `cli/commands` is. Importing it imports nothing heavy."""

    help: str
    """One line."""
    example: str
    """A line to try, shown in its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare arguments. A command that also takes options sets a default for `flags`, and finds the rest of the line there."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and give the exit code."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words)
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except (Exception, KeyboardInterrupt) as error:  # the one place where any failure becomes an exit code
        return report(error, debug="--debug" in words)


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if words[0] in ("-v", "--version"):
        print(f"simpletuner {__version__}")
        return 0
    name, rest = words[0], list(words[1:])
    known = names()
    if name not in known:
        raise ConfigError(f"there is no command {name!r}", hint=choose(name, known, "commands"))
    command = load(name)
    parser = Parser(
        prog=f"simpletuner {name}",
        usage=f"simpletuner {name} [arguments]",
        description=f"{command.help}\n\nexample:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    command.add_arguments(parser)
    args, unknown = parser.parse_known_args(rest)
    args.argv = [name, *rest]
    if "flags" in args:
        args.flags = unknown
    elif unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(f"{parser.prog} does not take {unknown[0]!r}", hint=choose(unknown[0], flags, "flags"))
    return command.run(args)


def load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"{COMMANDS}.{name}_" if keyword.iskeyword(name) else f"{COMMANDS}.{name}"))


def names() -> list[str]:
    """The commands. A file whose command is a word of Python has an underscore behind its name."""
    return [name.rstrip("_") for name in plugins.names(COMMANDS)]


def overview() -> str:
    """The help of the whole program."""
    return HEAD + "".join(f"  {name:<12} {load(name).help}\n" for name in names()) + TAIL

"""`simpletuner options`: what may be set, as text, as a page of markdown, or as a JSON Schema."""

from __future__ import annotations

import argparse
import json

help = "list the options, search them, or write their JSON Schema"
example = "simpletuner options checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="show the options whose name, help or values have all these words")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", action="store_true", help="write a JSON Schema, for editors that complete config.json")
    form.add_argument("--markdown", action="store_true", help="write the reference page")


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.choices import described

    choices = described()
    if args.schema:
        from simpletuner.options.schema import schema

        print(json.dumps(schema(choices), indent=2))
    elif args.markdown:
        from simpletuner.options.reference import reference

        print(reference(choices), end="")
    else:
        print(listing(args.words, choices))
    return 0


def listing(words: list[str], choices: dict[str, dict[str, str]]) -> str:
    """The options that have all the words, section by section, and the members of open sets that do.

    Raises:
        ConfigError: there are none.
    """
    from simpletuner.cli.flags import describe_section
    from simpletuner.errors import ConfigError, nearest
    from simpletuner.options.option import options_of
    from simpletuner.options.train_config import SECTIONS, declared

    def matches(*texts: str) -> bool:
        return all(word.lower().lstrip("-").replace("-", "_") in "\n".join(texts).lower().replace("-", "_") for word in words)

    parts = []
    for section in SECTIONS.values():
        found = [option for option in options_of(section).values() if matches(option.key, option.help, *option.choices, *option.was)]
        if found:
            parts.append(describe_section(section, found))
    for what, members in choices.items():
        rows = [f"  {name:<20} {summary}" for name, summary in members.items() if matches(what, name, summary)]
        if rows:
            parts.append("\n".join([f"{'Families' if what == 'family' else what.capitalize() + 's'}:", *rows]))
    if not parts:
        best = nearest(words[0], declared())
        raise ConfigError(f"no option has {' and '.join(words)}", hint=f"Did you mean {best}?" if best else "Without words, all of them are listed.")
    return "\n\n".join(parts)

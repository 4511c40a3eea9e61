"""All options as a page of markdown: docs/options.md."""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.options.option import Option, Section, options_of
from simpletuner.options.train_config import SECTIONS

HEAD = """\
# Options

Written by `simpletuner options --markdown`; change the declarations in `simpletuner/options/` instead.

Every option is a key of `config.json` (or `config.toml`, or a variable of `config.env`) and a flag: `--learning_rate 1e-4`,
`--learning-rate=1e-4`; a truth value may stand alone, `--use_ema` or `--no-use_ema`. Stronger ones win:
defaults, the family's defaults, the file, environment variables (`SIMPLETUNER_LEARNING_RATE`, or `LEARNING_RATE`), flags.
Numbers and truth values may be quoted. Keys may begin with `--`; keys that begin with `_` are comments. `{env:NAME}` in a text is
replaced by that environment variable. `simpletuner train --dry-run` shows every value with where it came from.
"""


def reference(choices: Mapping[str, Mapping[str, str]]) -> str:
    """Write the page.

    Args:
        choices: the open sets that options name in `choices_from`, to their members and what they are.
    """
    parts = [HEAD, *(_section(section) for section in SECTIONS.values()), *(_members(what, members) for what, members in choices.items())]
    return "\n".join(parts)


def _section(section: type[Section]) -> str:
    head = f"## {section.__name__}\n\n{section.__doc__}\n\n| option | value | default | what it does |\n|---|---|---|---|\n"
    return head + "".join(_row(option) for option in options_of(section).values())


def _row(option: Option) -> str:
    value = f"{'an' if option.choices_from[0] in 'aeiou' else 'a'} {option.choices_from}, see below" if option.choices_from else option.rule
    if option.choices:
        value = ", ".join(f"`{choice}`" for choice in option.choices)
    default = "**required**" if option.is_required else f"`{option.default_text}`" if option.default_text else ""
    old = [*option.was, *(f"{name} (opposite)" for name in option.was_opposite)]
    was = f" Was called {', '.join(f'`{name}`' for name in old)}." if old else ""
    return f"| `{option.key}` | {value} | {default} | {option.help}{was} |\n"


def _members(what: str, members: Mapping[str, str]) -> str:
    title = "families" if what == "family" else f"{what}s"
    rows = "".join(f"| `{name}` | {summary} |\n" for name, summary in members.items())
    return f"## {title.capitalize()}\n\n| {what} | |\n|---|---|\n{rows}"

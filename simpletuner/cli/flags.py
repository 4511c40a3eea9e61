"""Flags made from the declarations of options: reading them, refusing unknown ones, and their help."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

from simpletuner.errors import ConfigError, nearest
from simpletuner.options.option import Option, Section, options_of
from simpletuner.options.retired import notice
from simpletuner.options.sources import Setting, read_words
from simpletuner.options.train_config import SECTIONS, declared, spellings

WIDTH = 100


def read_flags(words: Sequence[str], named: Collection[str], switches: Collection[str]) -> tuple[list[Setting], dict[str, str]]:
    """Read what a command leaves of its words as options.

    Args:
        words: e.g. ["--learning_rate", "1e-4", "env=mine"].
        named: the command's own arguments that may also be given as `name=value`.
        switches: the command's own flags that are meant by what is spelled nearly like them.

    Returns:
        The options, and the command's own arguments that were given as `name=value`.

    Raises:
        ConfigError: a word is neither; offers the nearest flag.
    """
    found, rest = read_words(words)
    if rest:
        before = words[words.index(rest[0]) - 1] if rest[0] in words else ""
        option = declared().get(before.lstrip("-")) if before.startswith("--") else None
        if option is not None:
            raise ConfigError(f"{before} is to be {option.rule}, not {rest[0]!r}", hint=f"`simpletuner options {option.key}` explains it.")
        raise ConfigError(f"{rest[0]!r} is neither a flag nor name=value", hint="Flags look like --learning_rate 1e-4; --help lists them.")
    for setting in found:
        if setting.key not in named and setting.key not in declared() and setting.key not in spellings() and notice(setting.key, "") is None:
            best = nearest(setting.key, [*declared(), *spellings(), *named, *switches])
            hint = f"Did you mean --{best}?" if best else "`simpletuner options` lists all flags."
            raise ConfigError(f"there is no flag --{setting.key}", hint=hint)
    own = {setting.key: setting.value for setting in found if setting.key in named}
    return [setting for setting in found if setting.key not in named], own


def describe_section(section: type[Section], options: Sequence[Option]) -> str:
    """Say what options of a section there are, a paragraph each."""
    title = f"{section.__name__}: {section.__doc__}"
    return "\n".join([title, *(describe_option(option) for option in options)])


def describe_option(option: Option) -> str:
    """Say what an option is called, takes and does."""
    default = "required" if option.is_required else f"default {option.default_text}" if option.default_text else ""
    rule = option.rule if option.choices_from is None else f"a known {option.choices_from}"
    head = f"  --{option.key}: {rule}" + (f" ({default})" if default else "")
    return "\n".join(
        [
            textwrap.fill(head, WIDTH, subsequent_indent="      ", break_on_hyphens=False),
            textwrap.fill(option.help, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False),
        ]
    )


def help_of_options() -> str:
    """The options that most runs set, section by section."""
    parts = []
    hidden = 0
    for section in SECTIONS.values():
        options = list(options_of(section).values())
        shown = [option for option in options if not option.advanced]
        hidden += len(options) - len(shown)
        parts.append(describe_section(section, shown))
    head = "Options, which are also the keys of config.json; a flag wins over the file:"
    return "\n\n".join([head, *parts, f"`simpletuner options` lists {hidden} more."])

"""Wildcards of captions: of `{red|blue|}` one option is taken. Groups may stand in groups; backslashes make braces and bars plain letters."""

from __future__ import annotations

import re
from collections.abc import Callable

Choose = Callable[[int, int, int], int]
"""From the level of a group (0 holds no other), its place on that level and its number of options, to the option to take."""

GROUP = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\[{}|]|\\(?![{}|]))*)\}")
"""A group that holds no other. A letter matches in one way only, so that no caption takes long."""
BAR = re.compile(r"(?<!\\)\|")
BRACE = re.compile(r"(?<!\\)[{}]")
ESCAPED = re.compile(r"\\([{}|])")


def resolve(text: str, choose: Choose) -> str:
    """Take an option of every group, innermost first; a brace without its partner stays as it is."""
    level = 0
    while groups := list(GROUP.finditer(text)):
        parts, end = [], 0
        for place, group in enumerate(groups):
            options = BAR.split(group[1])
            parts += [text[end : group.start()], options[choose(level, place, len(options))]]
            end = group.end()
        text = "".join([*parts, text[end:]])
        level += 1
    return ESCAPED.sub(r"\1", text)


def has_choice(text: str) -> bool:
    """Whether a group of this text has more than one option."""
    found = 1
    while found:
        if any(BAR.search(group) for group in GROUP.findall(text)):
            return True
        text, found = GROUP.subn("", text)
    return False


def has_lone_brace(text: str) -> bool:
    """Whether a brace of this text has no partner."""
    found = 1
    while found:
        text, found = GROUP.subn("", text)
    return BRACE.search(text) is not None

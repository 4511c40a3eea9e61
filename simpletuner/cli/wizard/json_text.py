"""Change values in the text of a JSON file and leave the rest of it, comments included, as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.relaxed_json import SPACE, STRING, WORD

Path = tuple[Any, ...]
"""Keys, and positions in lists, from the outermost."""
REMOVED = object()
"""A value that takes its key out."""
INDENT = "    "


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands in the text."""

    begin: int
    """Of its key, or of the value itself where it has none."""
    value: int
    end: int


def change(text: str, changes: Mapping[Path, Any]) -> str:
    """Set values, add members of objects that are there, or take them out.

    Args:
        text: that `relaxed_json` reads.
        changes: a path to its new value, or to `REMOVED`; what contains it must be there.
    """
    for path, value in changes.items():
        places = find(text)
        if value is REMOVED:
            text = _without(text, places, path) if path in places else text
        elif path in places:
            place = places[path]
            text = text[: place.value] + written(value, _indent_at(text, place.begin)) + text[place.end :]
        else:
            text = _with(text, places, path, value)
    return text


def written(value: Any, indent: str = "") -> str:
    """A value as JSON, further lines of it as deep as `indent`."""
    return json.dumps(value, indent=len(INDENT), ensure_ascii=False).replace("\n", "\n" + indent)


def find(text: str) -> dict[Path, Place]:
    """Where every value stands, the whole included, under the path ()."""
    found: dict[Path, Place] = {}
    _value(text, _skip(text, 0), (), None, found)
    return found


def _value(text: str, at: int, path: Path, begin: int | None, found: dict[Path, Place]) -> int:
    """Note the value that begins here, and all in it; give where it ends."""
    start, opening = at, text[at : at + 1]
    if opening in ("{", "["):
        at, number = _skip(text, at + 1), 0
        while text[at] not in "}]":
            key_at = at
            if opening == "{":
                key = _match(STRING, text, at)
                at = _skip(text, _skip(text, at + len(key)) + 1)  # over the colon
                at = _value(text, at, (*path, json.loads(key, strict=False)), key_at, found)
            else:
                at = _value(text, at, (*path, number), None, found)
                number += 1
            at = _skip(text, at)
            at = _skip(text, at + 1) if text[at] == "," else at
        end = at + 1
    else:
        end = at + len(_match(STRING if opening == '"' else WORD, text, at))
    found[path] = Place(start if begin is None else begin, start, end)
    return end


def _match(pattern: re.Pattern[str], text: str, at: int) -> str:
    match = pattern.match(text, at)
    assert match is not None, "the text was read before"
    return match[0]


def _skip(text: str, at: int) -> int:
    return at + len(_match(SPACE, text, at))


def _with(text: str, places: Mapping[Path, Place], path: Path, value: Any) -> str:
    """Add a member behind the last one of its object; on a line of its own if the object has lines."""
    whole = places[path[:-1]]
    members = [place for other, place in places.items() if other[:-1] == path[:-1] and len(other) == len(path)]
    if not members:
        inside = _indent_at(text, whole.begin) + INDENT
        line = f"\n{inside}{json.dumps(path[-1], ensure_ascii=False)}: {written(value, inside)}"
        return text[: whole.end - 1].rstrip(" \t\n") + line + "\n" + inside[: -len(INDENT)] + text[whole.end - 1 :]
    last = max(members, key=lambda place: place.end)
    indent = _indent_at(text, last.begin)
    added = f"{json.dumps(path[-1], ensure_ascii=False)}: {written(value, indent)}"
    comma = _comma(text, last.end)
    behind = last.end if comma is None else comma + 1
    line_end = text.find("\n", behind, whole.end)
    if line_end < 0:  # the object ends on this line
        return text[: last.end] + ", " + added + text[last.end :]
    rest = text[behind:line_end]
    opens = rest.rfind("/*")
    if opens >= 0 and "*/" not in rest[opens:]:  # a comment of several lines begins here
        line_end, rest = behind, ""
    between = "" if comma is None else text[last.end : comma]
    trailing = "" if comma is None else ","
    return f"{text[: last.end]}{between},{rest}\n{indent}{added}{trailing}{text[line_end:]}"


def _without(text: str, places: Mapping[Path, Place], path: Path) -> str:
    """Take a member out with its comma, and with its line if nothing else stands there."""
    place = places[path]
    comma = _comma(text, place.end)
    begin, end = place.begin, place.end if comma is None else comma + 1
    if comma is None:  # it is the last one: the comma before it goes
        before = [other for key, other in places.items() if len(key) == len(path) and key[:-1] == path[:-1] and other.end <= begin]
        if before:
            earlier = _comma(text, max(other.end for other in before))
            assert earlier is not None
            text = text[:earlier] + text[earlier + 1 :]
            begin, end = begin - 1, end - 1
    line = text.rfind("\n", 0, begin) + 1
    line_end = text.find("\n", end)
    if not text[line:begin].strip() and line_end >= 0 and not text[end:line_end].strip():
        return text[:line] + text[line_end + 1 :]
    return text[:begin] + text[end:]


def _comma(text: str, at: int) -> int | None:
    """Where the comma behind a value stands."""
    at = _skip(text, at)
    return at if text[at : at + 1] == "," else None


def _indent_at(text: str, at: int) -> str:
    """The blanks that the line begins with."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]

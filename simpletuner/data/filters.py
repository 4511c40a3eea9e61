"""Words to take out of captions, or to replace: the entries of a `caption_filter_list`, read, checked and applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.captions import decode
from simpletuner.errors import ConfigError
from simpletuner.relaxed_json import load_relaxed

SPECIAL = re.compile(r"[\\^$*+?{}\[\]()|]")
"""Letters by which an entry is known as a regular expression. A period alone is not among them: it ends sentences."""
REPLACEMENT = re.compile(r"s/((?:\\.|[^/\\])*)/((?:\\.|[^/\\])*)/([gi]*)", re.DOTALL)
LETTER = r"[^\W\u0e00-\u0eff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
"""A letter or digit of a script that puts blanks between words; in others (Thai, Chinese, Japanese, Korean) no word has a visible end."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One entry."""

    written: str
    """As the user wrote it, from which the rest follows."""
    pattern: re.Pattern[str]
    replacement: str = ""
    """What takes the place of each match, with `\\1` for the text of a group."""


def parse(written: str) -> Filter:
    """Tell what an entry is: `s/a/b/`, else a regular expression if it holds a special letter, else plain words.

    Raises:
        ValueError: it cannot be used; says why.
    """
    text = written.strip()
    if not text:
        raise ValueError("is empty")
    source, replacement, flags = (text if SPECIAL.search(text) else plain(text)), "", ""
    if text.startswith("s/"):
        parts = REPLACEMENT.fullmatch(text)
        if parts is None:
            raise ValueError(r"begins like s/pattern/replacement/ but is not of that form; a slash inside it is written \/")
        source, replacement, flags = parts[1].replace(r"\/", "/"), parts[2].replace(r"\/", "/"), parts[3]
    try:
        pattern = re.compile(source, re.IGNORECASE if "i" in flags else 0)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    try:
        pattern.sub(replacement, "")  # looks at the replacement whether or not anything matches
    except (re.error, IndexError) as error:
        raise ValueError(f"has a replacement that cannot be used: {error}") from error
    return Filter(written, pattern, replacement)


def plain(text: str) -> str:
    """A regular expression that finds a text where it does not begin or end within a word."""
    starts, ends = re.match(LETTER, text[0]), re.match(LETTER, text[-1])
    return (f"(?<!{LETTER})" if starts else "") + re.escape(text) + (f"(?!{LETTER})" if ends else "")


def read_filters(written: str | Sequence[object]) -> tuple[tuple[Filter, ...], list[str]]:
    """Give the filters of a list, or of the .txt or .json file that is named, and what is wrong with them."""
    filters, problems = [], []
    try:
        entries = entries_of(written)
    except ConfigError as error:
        return (), [f"caption_filter_list: {error.message}" + (f"; {error.hint}" if error.hint else "")]
    for where, entry in entries:
        if not isinstance(entry, str):
            problems.append(f"{where} is {entry!r}; it must be a text")
            continue
        try:
            filters.append(parse(entry))
        except ValueError as error:
            problems.append(f"{where}: {entry!r} {error}")
    return tuple(filters), problems


def entries_of(written: str | Sequence[object]) -> list[tuple[str, object]]:
    """Each entry, and where it stands.

    Raises:
        ConfigError: the file cannot be read, or is of another kind.
    """
    if not isinstance(written, str):
        return [(f"caption_filter_list, entry {number}", entry) for number, entry in enumerate(written, start=1)]
    path = Path(written).expanduser()
    if path.suffix.lower() == ".json":
        found = load_relaxed(path)
        if not isinstance(found, list):
            raise ConfigError(f"{path} must hold a list of texts", hint='write ["first", "second"]')
        return [(f"{path}, entry {number}", entry) for number, entry in enumerate(found, start=1)]
    if path.suffix.lower() == ".txt":
        try:
            text, _ = decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return [(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    raise ConfigError(f"{written!r} is neither a list nor a .txt or .json file", hint='put words into a list: ["first", "second"]')


def apply(filters: Sequence[Filter], text: str) -> tuple[str, set[Filter]]:
    """Give the text with every filter applied, in their order, and those that changed it."""
    result, used = text, set()
    for one in filters:
        changed = one.pattern.sub(one.replacement, result)
        if changed != result:
            used.add(one)
        result = changed
    return (tidy(result, text), used) if used else (text, used)


def tidy(text: str, before: str) -> str:
    """Take away blanks and separators between which nothing is left.

    Args:
        before: what the text was made from; it keeps a comma at its end if that had one.
    """
    lines = [tidy_line(line) for line in text.splitlines()]
    text = "\n".join(line for line in lines if line)
    kept = text if before.rstrip().endswith((",", ";")) else text.rstrip(" \t,;")
    return kept if kept == text else tidy(kept, before)  # a dot before that separator may stand alone now


def tidy_line(line: str) -> str:
    """`, a cat , , red .` is `a cat, red.`; dots without blanks between them, as in `...` and `.5`, belong to words."""
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\.(?: \.)+(?= |$)", ".", line)
    line = re.sub(r" (?=[,;]|\.(?: |$))", "", line)
    line = re.sub(r"[,;][,; ]*(?=[,;]|\.(?: |$))", "", line)  # the last separator of a run is the one that stays
    return re.sub(r"^(?:[,; ]|\.(?= |$))+", "", line).rstrip()

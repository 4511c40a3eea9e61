"""JSON as people write it by hand: comments, trailing commas, a byte-order mark; errors say line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from simpletuner.errors import ConfigError

SPACE = re.compile(r"(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
"""White space and comments: // and # to the end of the line, /* to */."""
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
WORD = re.compile(r"[^\s,:\[\]{}\"/#]+")
"""A number, true, false, null, or what stands where one of them should."""
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
NAMES = {"true": True, "false": False, "null": None}
MEANT = {"True": "true", "False": "false", "None": "null", "NaN": "null"}
DEEPEST = 100


def load_relaxed(path: str | Path) -> object:
    """Read a file of JSON with comments and trailing commas.

    Raises:
        ConfigError: the file cannot be read, or is no such JSON; says file, line, column and what was expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", hint=f"You are in {Path.cwd()}; correct the path, or make the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} cannot be read", hint="Save the file as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="It must be a file that you may read.") from error
    return parse_relaxed(text, str(path))


def parse_relaxed(text: str, name: str) -> object:
    """Read JSON with comments and trailing commas; `name` is what errors call the text."""
    reader = _Reader(text, name)
    value = reader.value()
    reader.skip_space()
    if reader.at < len(text):
        reader.expected("the end of the file")
    return value


class _Reader:
    """A place in a text, and the verbs that read on from there."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.at = 0
        self._open: list[int] = []
        """Where the brackets stand that are not closed yet."""

    def value(self) -> object:
        self.skip_space()
        start = self.text[self.at : self.at + 1]
        if start == "{":
            return self._object()
        if start == "[":
            return [self.value() for _ in self._items("]")]
        if start == '"':
            return self._string()
        return self._word()

    def skip_space(self) -> None:
        space = SPACE.match(self.text, self.at)
        assert space is not None  # it also matches nothing at all
        self.at = space.end()
        if self.text.startswith("/*", self.at):
            self.fail("the comment that begins here is never closed", hint="Close it with */.")

    def _object(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for _ in self._items("}"):
            key_at = self.at
            if not self.text.startswith('"', self.at):
                self.expected("a name in double quotes")
            key = self._string()
            self.skip_space()
            if not self.text.startswith(":", self.at):
                self.expected(f'":" after "{key}"')
            self.at += 1
            value = self.value()
            if key in found and found[key] != value:
                self.at = key_at
                self.fail(f'"{key}" stands here for the second time, with another value', hint="Remove one of them.")
            found[key] = value
        return found

    def _items(self, end: str) -> Iterator[None]:
        """Stop before each item between brackets, so that the caller reads it."""
        self._open.append(self.at)
        if len(self._open) > DEEPEST:
            self.fail(f"more than {DEEPEST} brackets stand inside each other")
        self.at += 1
        self.skip_space()
        while not self.text.startswith(end, self.at):
            yield
            last = self.at
            self.skip_space()
            if self.text.startswith(",", self.at):
                self.at += 1
                self.skip_space()
            elif not self.text.startswith(end, self.at):
                is_item = re.match(r'["\[{\w-]', self.text[self.at :])
                self.expected(f'"," or "{end}"', hint=f"A comma may be missing at the end of line {self._line(last)}." if is_item else None)
        self.at += 1
        self._open.pop()

    def _string(self) -> str:
        match = STRING.match(self.text, self.at)
        if match is None:
            self.fail("a text begins here that is not closed on its line", hint='Close it with ". A line break inside a text is written \\n.')
        try:
            value = json.loads(match[0], strict=False)
        except json.JSONDecodeError as error:
            self.at += error.pos
            self.expected("a known letter after the backslash", hint="Write \\\\ for a backslash itself, or use / in paths.")
        self.at = match.end()
        return str(value)

    def _word(self) -> object:
        match = WORD.match(self.text, self.at)
        if match is None:
            self.expected("a value")
        word = match[0]
        if word not in NAMES and not NUMBER.fullmatch(word):
            meant = f"JSON writes {word} as {MEANT[word]}." if word in MEANT else None
            self.expected("a value", hint=meant or "Text stands in double quotes; numbers look like 3, -0.5 or 4e-5.")
        self.at = match.end()
        return NAMES[word] if word in NAMES else json.loads(word)

    def expected(self, what: str, hint: str | None = None) -> NoReturn:
        rest = self.text[self.at : self.at + 30].split("\n")[0].rstrip()
        found = f"found {rest}" if rest else "the line ends" if self.at < len(self.text) else "the file ends"
        if self.at >= len(self.text) and self._open:
            hint = f'The "{self.text[self._open[-1]]}" of line {self._line(self._open[-1])} is not closed.'
        self.fail(f"expected {what}, but {found}", hint)

    def fail(self, problem: str, hint: str | None = None) -> NoReturn:
        column = self.at - self.text.rfind("\n", 0, self.at)
        raise ConfigError(
            f"{self.name}, line {self._line(self.at)}, column {column}: {problem}",
            hint=hint or "It is read as JSON; comments and trailing commas are allowed.",
        )

    def _line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

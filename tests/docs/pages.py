"""What stands in the pages for users: fenced blocks, code in lines, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("simpletuner/examples/*/README.md"))
    if path.name not in ("CHANGELOG.md",)  # speaks of what was
)
SHELLS = ("", "sh", "bash", "console")
FENCE = re.compile(r"^ *```(\w*) *\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^()\s]+)\)")
ENDS = re.compile(r"\s(?:&&|\|\||[|;>])\s?|(?<=\S);\s")
"""What ends a command inside of a line."""
OURS = re.compile(r"^(?:\$ )?((?:simpletuner|\./train\.sh|\./test\.sh|python (?:benchmarks|tests)/\S+\.py)(?:\s.*)?)$")


@dataclass(frozen=True)
class Command:
    """A command of ours as it stands in a page."""

    text: str
    line: int
    is_mention: bool
    """In the middle of a sentence, where it may lack what it needs."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def fences(text: str) -> Iterator[tuple[str, str, int]]:
    """Language, body and first line of each fenced block."""
    for match in FENCE.finditer(text):
        yield match[1], match[2], text[: match.start()].count("\n") + 2


def commands(text: str) -> Iterator[Command]:
    """Every command of ours, in blocks and in lines."""
    for language, body, first in fences(text):
        if language in SHELLS:
            for number, line in enumerate(body.replace("\\\n", "  ").splitlines()):
                yield from _of_line(line.strip(), first + number, False)
    plain = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in SPAN.finditer(plain):
        yield from _of_line(match[1].strip(), plain[: match.start()].count("\n") + 1, True)


def _of_line(line: str, number: int, is_mention: bool) -> Iterator[Command]:
    for part in ENDS.split(line):
        found = OURS.match(part.strip())
        if found:
            yield Command(found[1], number, is_mention)


def links(text: str) -> Iterator[str]:
    """Links to other pages and places in them; those to the network aside."""
    plain = SPAN.sub("", FENCE.sub("", text))
    return (link for link in LINK.findall(plain) if "://" not in link)


def anchors(text: str) -> set[str]:
    """The names of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

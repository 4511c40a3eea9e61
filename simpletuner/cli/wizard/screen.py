"""What a question looks like: lines of styled text that fit a terminal of some columns and rows. Pure: nothing is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prompt_toolkit.utils import get_cwidth

from simpletuner.cli.wizard.questions import Choice, Question

Line = tuple[str, str]
"""A style, and a text of one line."""
LEAST_ROWS = 3
"""Answers that are shown at least, whatever else there is to say."""
LONGEST_HELP = 9
LABEL_SHARE, ANSWER_SHARE = 0.4, 0.3


@dataclass(frozen=True, slots=True)
class Signs:
    """Letters that not every terminal has."""

    here: str
    more_above: str
    more_below: str
    back: str
    dots: str
    done: str
    keys: str
    typing: str


TYPING = "Enter take · typing replaces, arrows edit · Esc back · ? help · Ctrl-C stop"
FANCY = Signs("❯", "↑", "↓", "←", "…", "✓", "↑↓ move · Enter take · ← back · ? help · Ctrl-C stop, answers are kept", TYPING)
SIMPLE = Signs(
    ">", "^", "v", "<-", "...", "*", "Up/Down move, Enter take, Left back, ? help, Ctrl-C stop (answers are kept)", TYPING.replace(" ·", ",")
)


def signs_for(encoding: str | None) -> Signs:
    """Those that an output in this encoding can show."""
    try:
        "❯↑…✓".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return SIMPLE
    return FANCY


def head(question: Question, width: int) -> list[Line]:
    """The question, and why its default is what it is."""
    place = f"{question.place}  " if question.place else ""
    lines: list[Line] = [("class:title", text) for text in folded(f"{place}{question.title}", width)]
    return lines + [("class:reason", text) for text in folded(question.reason, width)]


def list_screen(question: Question, choices: Sequence[Choice], at: int, *, shows_help: bool, width: int, height: int, signs: Signs) -> list[Line]:
    """The question with its answers, of which one is marked.

    Args:
        at: position of the marked one.
        height: rows that may be used.
    """
    width = max(10, width - 1)  # a full line would wrap on some terminals
    above, below = head(question, width), tail(question, choices[at], shows_help, width, signs)
    room = max(LEAST_ROWS, height - len(above) - len(below) - 1)
    first, last = window(len(choices), at, room)
    rows = [
        (("class:here" if number == at else "class:row"), row(choices[number], choices, number == at, width, signs)) for number in range(first, last)
    ]
    if first > 0:
        rows[0] = ("class:dim", f"  {signs.more_above} {first + 1} more")
    if last < len(choices):
        rows[-1] = ("class:dim", f"  {signs.more_below} {len(choices) - last + 1} more")
    return [*above, *rows, ("", ""), *below][:height]


def typing_screen(question: Question, refused: str, *, shows_help: bool, width: int, signs: Signs) -> list[Line]:
    """What stands above the line that is typed in.

    Args:
        refused: what is wrong with what was typed.
    """
    width = max(10, width - 1)
    lines = head(question, width)
    lines += [("class:help", text) for text in help_lines(question.help, width)] if shows_help else []
    lines += [("class:footer", text) for text in folded(question.footer(), width)[:2]]
    lines += [("class:refused", text) for text in folded(refused, width)[:3]]
    return [*lines, ("class:dim", cropped(signs.typing, width, signs))]


def help_lines(help: str, width: int) -> list[str]:
    told = [text for paragraph in help.split("\n") for text in folded(paragraph, width)][:LONGEST_HELP]
    return told or folded("There is nothing more to say of this.", width)


def tail(question: Question, choice: Choice, shows_help: bool, width: int, signs: Signs) -> list[Line]:
    """What stands under the answers."""
    lines: list[Line] = []
    if shows_help:
        lines += [("class:help", text) for text in help_lines(choice.help or question.help, width)]
    elif choice.note and get_cwidth(row_of(choice, (choice,), 0, 0)) + 4 > width - 20:
        lines += [("class:help", text) for text in folded(choice.note, width)[:2]]
    lines += [("class:footer", text) for text in folded(question.footer(), width)[:2]]
    return [*lines, ("class:dim", cropped(signs.keys, width, signs))]


def row(choice: Choice, choices: Sequence[Choice], is_here: bool, width: int, signs: Signs) -> str:
    labels = min(max((get_cwidth(one.label) for one in choices if one.answer or one.note), default=0), int(width * LABEL_SHARE))
    answers = min(max(get_cwidth(one.answer) for one in choices), int(width * ANSWER_SHARE))
    mark = signs.here if is_here else " "
    return cropped(f"{mark} {row_of(choice, choices, labels, answers, signs)}", width, signs)


def row_of(choice: Choice, choices: Sequence[Choice], labels: int, answers: int, signs: Signs = FANCY) -> str:
    parts = [filled(choice.label, labels, signs) if choice.answer or choice.note else choice.label]
    if any(one.answer for one in choices) and (choice.answer or choice.note):
        parts.append(filled(choice.answer, answers, signs))
    return "  ".join([*parts, choice.note]).rstrip()


def window(count: int, at: int, room: int) -> tuple[int, int]:
    """Which of so many rows are shown, the marked one and its neighbours among them."""
    if count <= room:
        return 0, count
    first = min(max(0, at - room // 2), count - room)
    return first, first + room


def folded(text: str, width: int) -> list[str]:
    """A text in lines of at most so many columns, broken at blanks where there are any."""
    lines, line = [], ""
    for word in text.split():
        if line and get_cwidth(line) + 1 + get_cwidth(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while get_cwidth(line) > width:
            cut = next(number for number in range(len(line), 0, -1) if get_cwidth(line[:number]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line else lines


def filled(text: str, width: int, signs: Signs) -> str:
    """Exactly so many columns, or more where `width` is 0."""
    text = cropped(text, width, signs) if width else text
    return text + " " * (width - get_cwidth(text))


def cropped(text: str, width: int, signs: Signs) -> str:
    """At most so many columns of a text without control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if get_cwidth(text) <= width:
        return text
    while text and get_cwidth(text) + get_cwidth(signs.dots) > width:
        text = text[:-1]
    return text + signs.dots

"""Who asks: at a terminal (`terminal.py`), with plain lines where there is none, or nobody, where all proposals are taken."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from simpletuner.cli.wizard.questions import Choice, Question, pick, shown
from simpletuner.console import Console
from simpletuner.errors import ConfigError

POLL_SECONDS = 0.1
BACK_WORDS, HELP_WORD = ("<", "back"), "?"


class Move(Enum):
    """An answer that is none."""

    BACK = "back"


class Asker(Protocol):
    """One who asks. Ctrl-C is a KeyboardInterrupt."""

    def ask(self, question: Question) -> Any:
        """Give the answer, or `Move.BACK`."""

    def wait(self, text: Callable[[], str], is_done: Callable[[], bool], *, may_skip: bool) -> bool:
        """Wait; False if whoever is asked did not want to."""


class Proposals:
    """Nobody is asked: what is proposed is taken."""

    def ask(self, question: Question) -> Any:
        return question.default

    def wait(self, text: Callable[[], str], is_done: Callable[[], bool], *, may_skip: bool) -> bool:
        while not is_done():
            time.sleep(POLL_SECONDS)
        return True


class Plain(Proposals):
    """Numbered answers and plain lines: for pipes, screen readers and terminals that cannot move their cursor."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ask(self, question: Question) -> Any:
        self._head(question)
        while True:
            text = self._line(question)
            if text.strip() == HELP_WORD:
                self._console.say(question.help)
            elif text.strip().lower() in BACK_WORDS:
                return Move.BACK
            elif not text.strip() and (question.choices or question.shown):
                return question.default
            else:
                try:
                    return pick(question.choices, text) if question.choices else question.read(text)
                except ValueError as error:
                    self._console.say(f"  {error}")

    def wait(self, text: Callable[[], str], is_done: Callable[[], bool], *, may_skip: bool) -> bool:
        self._console.say(text())
        return super().wait(text, is_done, may_skip=may_skip)

    def _head(self, question: Question) -> None:
        self._console.say(f"\n{question.place} {question.title}".rstrip())
        if question.reason:
            self._console.say(f"  {question.reason}")
        for number, choice in enumerate(question.choices, start=1):
            self._console.say(f"  {number:>2}  {plain_row(choice)}")
        if footer := question.footer():
            self._console.say(f"  {footer}")

    def _line(self, question: Question) -> str:
        label = next((choice.label for choice in question.choices if choice.value == question.default), question.shown)
        try:
            return input(f"[{label or 'nothing'}] (? help, < back) > ")
        except EOFError as error:
            hint = "Answer it, or take all proposals with --defaults; options may be given as flags: --model_family sdxl."
            raise ConfigError(f"the input ended at the question {question.title!r}", hint=hint) from error


def say(console: Console, text: str, style: str | None = None, indent: str = "  ") -> None:
    """Print a text, broken at blanks where a terminal's line ends."""
    width = console.rich.width if console.is_live else 10_000
    console.say(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False), style)


def plain_row(choice: Choice) -> str:
    return "  ".join(part for part in (choice.label, choice.answer, choice.note) if part)


def answered(question: Question, value: Any) -> str:
    """An answer as one line of what was said so far; empty where more is to come."""
    if question.summary:
        return f"{question.title}: {question.summary}" if value == question.choices[0].value else ""
    label = next((choice.label for choice in question.choices if choice.value == value), shown(value))
    return f"{question.title}  {label or '-'}"

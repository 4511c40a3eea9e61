"""Questions at a terminal: lists that arrow keys move in, and lines to type, drawn where the cursor is: what was said stays above."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from prompt_toolkit.application import Application, get_app
from prompt_toolkit.completion import PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import Layout, Window
from prompt_toolkit.layout.controls import FormattedTextControl
from prompt_toolkit.shortcuts import PromptSession
from prompt_toolkit.styles import Style
from prompt_toolkit.validation import ValidationError, Validator

from simpletuner.cli.wizard.asking import POLL_SECONDS, Move, answered, say
from simpletuner.cli.wizard.questions import Choice, Question
from simpletuner.cli.wizard.screen import Line, cropped, list_screen, signs_for, typing_screen
from simpletuner.console import Console

STYLE = Style.from_dict(
    {
        "title": "bold",
        "reason": "ansicyan",
        "here": "bold ansigreen",
        "row": "",
        "dim": "ansibrightblack",
        "help": "ansiyellow",
        "footer": "ansicyan",
        "refused": "bold ansired",
        "validation-toolbar": "noreverse",
    }
)
QUIET_POLL_SECONDS = 0.02
SPINNER = "|/-\\"
ESCAPE_SECONDS = 0.1
"""After which an Esc is a key of its own and not the beginning of another; slow lines send what belongs together at once all the same."""


class Terminal:
    """One who asks at a terminal."""

    quiet_seconds = 0.3
    """A wait shows itself when it takes longer than this."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._signs = signs_for(sys.stdout.encoding)

    def ask(self, question: Question) -> Any:
        value = self._choose(question) if question.choices else self._type(question)
        if value is not Move.BACK and (told := answered(question, value)):
            say(self._console, f"{self._signs.done} {told}", style="dim", indent="")
        elif value is Move.BACK:
            say(self._console, f"{self._signs.back} back; of two answers to a question, the lower one counts", style="dim", indent="")
        return value

    def wait(self, text: Callable[[], str], is_done: Callable[[], bool], *, may_skip: bool) -> bool:
        begun = time.monotonic()
        while time.monotonic() - begun < self.quiet_seconds:  # what is soon done need not flicker, nor swallow what is typed ahead
            if is_done():
                return True
            time.sleep(QUIET_POLL_SECONDS)
        turns = iter(range(10**9))
        keys = self._keys()
        if may_skip:
            for key in ("escape", "enter", "s"):
                keys.add(key, eager=True)(lambda event: event.app.exit(result=False))

        def draw() -> StyleAndTextTuples:
            tail = "  (Enter skips this)" if may_skip else ""
            width = get_app().output.get_size().columns - 1
            return [("class:footer", cropped(f"{SPINNER[next(turns) % len(SPINNER)]} {text()}{tail}", width, self._signs))]

        app: Application[bool] = Application(
            Layout(Window(FormattedTextControl(draw), height=1)), style=STYLE, key_bindings=keys, erase_when_done=True, refresh_interval=POLL_SECONDS
        )

        async def watch() -> None:
            while not is_done():
                await asyncio.sleep(POLL_SECONDS)
            if not app.is_done:
                app.exit(result=True)

        def begin() -> None:
            app.create_background_task(watch())

        return app.run(pre_run=begin)

    def _choose(self, question: Question) -> Any:
        choices = (*question.choices, Choice(Move.BACK, f"{self._signs.back} back"))
        state = {"at": next((number for number, choice in enumerate(choices) if choice.value == question.default), 0), "help": 0}
        keys = self._keys()

        def move(by: int) -> Callable[[KeyPressEvent], None]:
            def moved(event: KeyPressEvent) -> None:
                state["at"] = max(0, min(len(choices) - 1, state["at"] + by)) if abs(by) > 1 else (state["at"] + by) % len(choices)

            return moved

        for key, by in (("up", -1), ("k", -1), ("c-p", -1), ("down", 1), ("j", 1), ("c-n", 1), ("tab", 1), ("pageup", -10), ("pagedown", 10)):
            keys.add(key)(move(by))
        for key, by in (("home", -len(choices)), ("end", len(choices))):
            keys.add(key)(move(by))
        for key in ("left", "escape", "backspace", "s-tab"):
            keys.add(key)(lambda event: event.app.exit(result=Move.BACK))
        for key in ("enter", "right", " "):
            keys.add(key)(lambda event: event.app.exit(result=choices[state["at"]].value))
        for key in ("?", "h", "f1"):
            keys.add(key)(lambda event: state.update(help=1 - state["help"]))

        def draw() -> StyleAndTextTuples:
            size = get_app().output.get_size()
            lines = list_screen(
                question, choices, state["at"], shows_help=bool(state["help"]), width=size.columns, height=size.rows - 1, signs=self._signs
            )
            return joined(lines)

        app: Application[Any] = Application(
            Layout(Window(FormattedTextControl(draw, focusable=True, show_cursor=False), dont_extend_height=True)),
            style=STYLE,
            key_bindings=keys,
            erase_when_done=True,
            refresh_interval=0.5,
        )
        app.ttimeoutlen = ESCAPE_SECONDS
        return app.run()

    def _type(self, question: Question) -> Any:
        state, keys = {"help": False, "untouched": True, "asks": False}, self._keys()
        is_untouched = Condition(lambda: state["untouched"])

        @keys.add("escape", eager=True)
        @keys.add("s-tab")
        def _back(event: KeyPressEvent) -> None:
            event.app.exit(result=Move.BACK)

        @keys.add("<any>", filter=is_untouched)
        @keys.add("<bracketed-paste>", filter=is_untouched)
        def _replace(event: KeyPressEvent) -> None:  # what is proposed is taken whole, or not at all, until an arrow moves into it
            text = " ".join(event.data.splitlines())
            if text.isprintable():
                event.current_buffer.text = ""
                event.current_buffer.insert_text(text)

        @keys.add("f1")
        def _help(event: KeyPressEvent) -> None:
            state.update(help=not state["help"], asks=True)

        @keys.add("?")
        def _question_mark(event: KeyPressEvent) -> None:
            if event.current_buffer.text in (question.shown, ""):
                _help(event)
            else:
                event.current_buffer.insert_text("?")

        judge = Judge(question)

        def above() -> StyleAndTextTuples:
            lines = typing_screen(question, judge.refused, shows_help=state["help"], width=get_app().output.get_size().columns, signs=self._signs)
            return [*joined(lines), ("", "\n"), ("class:here", f"{self._signs.here} ")]

        session: PromptSession[Any] = PromptSession(
            above,
            style=STYLE,
            key_bindings=keys,
            validator=judge,
            validate_while_typing=False,
            completer=PathCompleter(only_directories=True, expanduser=True) if question.is_path else None,
            complete_while_typing=False,
            reserve_space_for_menu=6 if question.is_path else 0,
            refresh_interval=0.5,
            erase_when_done=True,
        )
        session.app.ttimeoutlen = ESCAPE_SECONDS

        def touched(_: object) -> None:
            state.update(untouched=state["untouched"] and state["asks"], asks=False)

        session.app.key_processor.after_key_press += touched
        text = session.prompt(default=question.shown)
        return text if isinstance(text, Move) else question.read(text)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("c-c", eager=True)
        @keys.add("<sigint>")
        def _stop(event: KeyPressEvent) -> None:
            event.app.exit(exception=KeyboardInterrupt())

        return keys


class Judge(Validator):
    """Says what is wrong with what was typed."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self.refused = ""

    def validate(self, document: Document) -> None:
        try:
            self._question.read(document.text)
        except ValueError as error:
            self.refused = str(error)
            raise ValidationError(len(document.text), "") from error


def joined(lines: list[Line]) -> StyleAndTextTuples:
    """Lines as prompt_toolkit takes them."""
    found: StyleAndTextTuples = []
    for number, (style, text) in enumerate(lines):
        found += [("", "\n")] if number else []
        found.append((style, text))
    return found

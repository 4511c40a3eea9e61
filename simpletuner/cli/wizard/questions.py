"""Questions, made of the declarations of options: what is asked, which answers there are, which are refused, and the help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from simpletuner.cli.choices import described, family_of
from simpletuner.cli.preview import written
from simpletuner.cli.wizard.own import Own
from simpletuner.cli.wizard.proposals import Situation
from simpletuner.data.captions import STRATEGIES
from simpletuner.errors import choose
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.options.option import UNRULED, Option, Section, options_of
from simpletuner.options.sources import TRUTHS
from simpletuner.options.train_config import SECTIONS, declared

ANOTHER = "another model: a hub id, a folder or a single file"
CAPTIONS = {
    "filename": "the names of the pictures",
    "textfile": "a .txt file of the same name beside each picture",
    "instanceprompt": "one caption for all pictures",
}
WORDS = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer."""

    value: Any
    label: str
    note: str = ""
    answer: str = ""
    """On a page of several: what stands there so far."""
    help: str = ""
    """Of this one, where it has more to say than its question."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and how an answer is judged."""

    title: str
    default: Any
    choices: tuple[Choice, ...] = ()
    """None: it is typed."""
    reason: str = ""
    help: str = ""
    place: str = ""
    """Where in the whole this is: 3/14."""
    read: Callable[[str], Any] = str
    """Makes a value of what was typed, or raises ValueError that says what is wrong with it."""
    is_path: bool = False
    summary: str = ""
    """Of a page: what was said so far tells this rather than that one went on."""
    footer: Callable[[], str] = field(default=lambda: "")
    """A line that may change while the question stands."""

    @property
    def shown(self) -> str:
        """The default as one would type it."""
        return "" if self.default is None else shown(self.default)


def option_of(key: str) -> Option:
    return declared().get(key) or options_of(Own)[key]


def ask_text(key: str) -> str:
    """The question that an option declares, or one made of its name."""
    return option_of(key).ask or f"{key}?"


def question(
    key: str, situation: Situation, *, place: str = "", footer: Callable[[], str] = lambda: "", check: Callable[[str], str | None] | None = None
) -> Question:
    """The question about an option, with what is answered or proposed as its default.

    Args:
        check: says what else is wrong with what was typed, or None.
    """
    option, proposal = option_of(key), situation.found.get(key)
    default = situation.value(key)
    reason = proposal.reason if proposal else ""
    if proposal and key in situation.chosen and proposal.value != default:
        reason = "" if proposal.value in (None, "") else f"proposed: {shown(proposal.value)}" + (f" ({reason})" if reason else "")

    def read(text: str) -> Any:
        value = read_value(option, text)
        if check and (refused := check(text.strip())):
            raise ValueError(refused)
        return value

    return Question(
        title=ask_text(key),
        default=default,
        choices=choices_of(option, situation),
        reason=reason,
        help=help_of(option, situation),
        place=place,
        read=read,
        is_path=key in ("pictures", "output_dir"),
        footer=footer,
    )


def help_of(option: Option, situation: Situation) -> str:
    """The option's own help, what it may be, and where its values come from."""
    proposal = situation.found.get(option.key)
    lines = [option.help, f"It is {option.rule}." if not option.choices_from else ""]
    if option.key in declared():
        default = option.default_text or "none"
        lines.append(f"In config.json: {option.key}. Without a line there: {default}.")
    if proposal and proposal.reason:
        lines.append(f"Proposed here: {shown(proposal.value)}, because: {proposal.reason}.")
    return "\n".join(line for line in lines if line)


def choices_of(option: Option, situation: Situation) -> tuple[Choice, ...]:
    """The answers to choose from; none where anything may be typed."""
    if option.key == "model_flavour":
        kind = family_of(situation.value("model_family"))
        known = [Choice(name, name, location, billions(kind.billions.get(name))) for name, location in kind.flavours.items()]
        return (*known, Choice("", "another", ANOTHER))
    if option.kind == "bool":
        return tuple(Choice(value, word) for value, word in WORDS.items())
    if option.choices_from == "optimizer":
        return tuple(Choice(row.name, row.name, row.summary) for row in OPTIMIZERS if row.is_installed)
    if option.choices_from == "family":
        return tuple(Choice(name, name, sentence, billions(*family_of(name).billions.values())) for name, sentence in families().items())
    if option.key == "caption_strategy":
        of_files = {name: CAPTIONS.get(name, "") for name, strategy in STRATEGIES.items() if not strategy.is_of_place}
        now = situation.value(option.key)
        return tuple(Choice(name, name, note) for name, note in (of_files if now in of_files else {**of_files, now: "as it is"}).items())
    if option.choices_from and option.choices_from != "tracker":
        return tuple(Choice(name, name, sentence) for name, sentence in described()[option.choices_from].items())
    if option.choices_from == "tracker":
        names = described()["tracker"]
        default = situation.value(option.key)
        several = () if default in names else (Choice(default, str(default), "as it is"),)
        return (*several, *(Choice(name, name, sentence) for name, sentence in names.items()))
    return tuple(Choice(name, name) for name in option.choices)


def billions(*numbers: float | None) -> str:
    """How large models are: 6.8 B, 2.5-8.1 B."""
    known = sorted({number for number in numbers if number is not None})
    return f"{'-'.join(f'{number:g}' for number in (known[0], known[-1])[: len(known)])} B" if known else ""


@lru_cache(maxsize=1)
def families() -> dict[str, str]:
    """The families, without their flavours."""
    return {name: sentence.split(" Flavours:")[0].split(": ", 1)[-1] for name, sentence in described()["family"].items()}


def read_value(option: Option, text: str) -> Any:
    """Judge one answer as its section does.

    Raises:
        ValueError: says what it should be.
    """
    section: type[Section] = SECTIONS[option.section] if option.key in declared() else Own
    text = text.strip()
    if not text and not option.is_required and (option.may_be_none or option.may_be_empty):
        return "" if option.kind == "text" else None
    if option.kind == "bool":
        if text.lower() not in TRUTHS:
            raise ValueError("yes or no")
        return TRUTHS[text.lower()]
    if not text:
        raise ValueError(f"this needs {option.rule}")
    needed = {key: "needed" for key, other in options_of(section).items() if other.is_required}
    try:
        made = section.model_validate({**needed, option.key: text}, context=UNRULED)
    except ValueError as error:  # pydantic's own, whose words are for programmers
        raise ValueError(f"{text!r} is not {option.rule}") from error
    value = getattr(made, option.key)
    return value.as_posix() if option.kind == "path" else value


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return WORDS[value]
    return "" if value in (None, "") else written(value)


def pick(choices: Sequence[Choice], text: str) -> Any:
    """Read a choice by its number, its label or the beginning of it.

    Raises:
        ValueError: it is none; offers the nearest.
    """
    text = text.strip().lower()
    if text.isdigit() and 1 <= int(text) <= len(choices):
        return choices[int(text) - 1].value
    named = [choice for choice in choices if choice.label.lower() == text] or [choice for choice in choices if choice.label.lower().startswith(text)]
    if len(named) == 1 and text:
        return named[0].value
    raise ValueError(choose(text, [choice.label for choice in choices], "answers"))

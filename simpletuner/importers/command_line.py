"""Read the command that starts another trainer: from a shell script or in words, with its launcher and its variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.errors import ConfigError, choose, nearest

UNQUOTED, QUOTED, END, REDIRECTION, DEFAULT, OF_SHELL = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
"""Stand around the name of a variable and what it is where it is not set, for `>` and the like, and before what only a shell can fill in, while a
line is split into words."""
VARIABLE = re.compile(r"\$(?:\{(\w+)(:?-[^}\"'\s]*)?\}|([A-Za-z_]\w*))")
"""$NAME, ${NAME}, ${NAME:-default}."""
SEPARATORS = frozenset({"&&", "||", ";", "|", "&", ";;"})
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
LAUNCHERS = ("accelerate", "torchrun", "python", "python3", "launch")
SWITCHES = ("multi_gpu", "cpu", "use_deepspeed", "use_fsdp", "tpu", "mps", "m", "dynamo_use_dynamic", "debug", "quiet")
"""Flags of launchers that take no value."""
TRUTHS = {"true": True, "false": False}
QUOTED_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Command:
    """A command taken apart."""

    launcher: Mapping[str, str]
    """Flags of `accelerate launch` or torchrun by their names, with underscores; a switch is "true"."""
    program: str
    """The script's file name."""
    words: tuple[str, ...]
    """What the script was told."""
    variables: Mapping[str, str]
    """What was set in front of the command."""


def read_command(words: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Read a command: in words, or as one text or the path of one.

    Args:
        environ: variables that a text may refer to, besides those that it sets itself.

    Raises:
        ConfigError: there is no script in it, or it refers to a variable that is not set.
    """
    if len(words) == 1 and (re.search(r"\s", words[0]) or (Path(words[0]).is_file() and not words[0].endswith(".py"))):
        text = words[0]
        if Path(text).is_file():
            try:
                text = Path(text).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{words[0]} cannot be read: {error}", hint="Give a shell script in UTF-8, or the command itself.") from error
        return take_apart(*read_text(text, environ))
    return take_apart(list(words), {})


def read_text(text: str, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Find the one command of a script that starts a Python program, and the variables that are set before it."""
    variables: dict[str, str] = {}
    found: list[list[str]] = []
    for statement in statements(text):
        words = [part for word in statement for part in _filled(word, {**environ, **variables})]
        words = words[1:] if words[:1] == ["export"] else words
        words = words[: words.index(REDIRECTION)] if REDIRECTION in words else words
        if words and all(ASSIGNMENT.fullmatch(word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
        elif any(_is_program(word) for word in words):
            found.append(words)
    if len(found) > 1:
        raise ConfigError(f"there are {len(found)} commands that start a Python program", hint="Leave one of them, and import the others after it.")
    if not found:
        raise _without_program(text)
    unknown = next((word for word in found[0] if OF_SHELL in word), None)
    if unknown is not None:
        said = unknown.replace(OF_SHELL, "")
        raise ConfigError(f"only a shell can say what is meant by {said!r}", hint="Write in its place what that command prints.")
    return found[0], variables


def statements(text: str) -> Iterator[list[str]]:
    """Split a script into commands, and these into words in which variables are marked."""
    joined = re.sub(r"\\[ \t]*\n", " ", _without_comments(text))  # a blank after the backslash is a slip that is often seen
    lexer = shlex.shlex(_marked(joined), posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    try:
        for word in lexer:
            if word.strip("\n") in SEPARATORS or not word.strip("\n"):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError as error:
        raise ConfigError(f"the command cannot be read: {str(error).lower()}", hint="Close every quote in it.") from error
    yield words


def _without_comments(text: str) -> str:
    """Leave out what stands after a `#` that begins a word, not between quotes.

    A command goes on after a line that is all comment, and after a comment behind a backslash: a shell would end it there, which nobody means.
    """
    kept: list[str] = []
    quote = ""
    for line in text.splitlines():
        at, before, is_continued = 0, quote, bool(kept) and kept[-1].rstrip().endswith("\\")
        while at < len(line):
            letter = line[at]
            if letter == "#" and not quote and (at == 0 or line[at - 1].isspace()):
                break
            if letter in "'\"" and quote in ("", letter):
                quote = "" if quote else letter
            at += 2 if letter == "\\" and quote != "'" else 1
        if not (at < len(line) and not line[:at].strip() and not before and is_continued):
            kept.append(line[:at] if at < len(line) else line)
    return "\n".join(kept)


def _marked(text: str) -> str:
    """Mark `$NAME`, `${NAME}` and redirections where a shell would look at them: not between quotes, not after a backslash."""
    found, quote, at = [], "", 0
    while at < len(text):
        letter = text[at]
        match = re.match(VARIABLE, text[at:]) if letter == "$" and quote != "'" else None
        if match is None and quote != "'" and re.match(r"\$[({]|`[^`]+`", text[at:]):
            found.append(OF_SHELL)
        if match:
            found.append(f"{QUOTED if quote else UNQUOTED}{match[1] or match[3]}{DEFAULT}{match[2] or ''}{END}")
            at += len(match[0])
            continue
        if letter == "\\" and quote != "'":
            found.append(text[at : at + 2])
            at += 2
            continue
        redirection = re.match(r"\d?(?:>>?|<)(?:&\d?)?", text[at:]) if not quote and (at == 0 or text[at - 1].isspace() or letter in "<>") else None
        if redirection:
            found.append(f" {REDIRECTION} ")
            at += len(redirection[0])
            continue
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        found.append(letter)
        at += 1
    return "".join(found)


def _filled(word: str, values: Mapping[str, str]) -> list[str]:
    """Put values where variables are marked; one that stands alone and unquoted may be several words, or none."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values and match[2]:
            return match[2].lstrip(":")[1:]
        if match[1] not in values:
            raise ConfigError(f"the command refers to ${match[1]}, which is not set", hint=f"Put {match[1]}=... before it.")
        return values[match[1]]

    text = re.sub(f"[{UNQUOTED}{QUOTED}](\\w+){DEFAULT}([^{END}]*){END}", value, word)
    is_alone = re.fullmatch(f"{UNQUOTED}[^{END}]+{END}", word) is not None
    return text.split() if is_alone else [text]


def take_apart(words: Sequence[str], variables: Mapping[str, str]) -> Command:
    """Part a command in words into variables, launcher, script and what the script is told."""
    at = next((number for number, word in enumerate(words) if _is_program(word)), None)
    if at is None:
        raise _without_program(" ".join(words))
    before = list(words[:at])
    own = dict(variables)
    while before and (match := ASSIGNMENT.fullmatch(before[0])):
        own[match[1]] = match[2]
        before = before[1:]
    return Command(_launcher(before), Path(words[at]).name, tuple(words[at + 1 :]), own)


def _launcher(words: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    waiting = [word for word in words if Path(word).name not in LAUNCHERS]
    while waiting:
        name, sign, value = waiting.pop(0).partition("=")
        key = name.lstrip("-").replace("-", "_")
        if name.startswith("-") and key:
            takes = not sign and key not in SWITCHES and waiting and not waiting[0].startswith("-")
            flags[{"nproc_per_node": "num_processes"}.get(key, key)] = value if sign else waiting.pop(0) if takes else "true"
    return flags


def _is_program(word: str) -> bool:
    return word.endswith(".py") and not word.startswith("-")


def _without_program(text: str) -> ConfigError:
    said = " ".join(text.split())[:QUOTED_LETTERS]
    return ConfigError(
        f"there is no Python script in {said!r}" if said else "there is no command",
        hint="Give the whole command, such as: accelerate launch train_text_to_image.py --pretrained_model_name_or_path ...",
    )


def read_flags(words: Sequence[str], known: Mapping[str, tuple[type | tuple[type], object]], program: str) -> dict[str, object]:
    """Read the flags of a script as argparse does: `--name value`, `--name=value`, switches, lists, and names cut short.

    Args:
        known: name to type and default; bool is a switch, a tuple of a type a list.

    Raises:
        ConfigError: every flag that is unknown or has a wrong value.
    """
    found: dict[str, object] = {}
    problems: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r} belongs to no flag")
            continue
        written, sign, text = word[2:].partition("=")
        name = _full_name(written.replace("-", "_"), known)
        if name is None:
            best = nearest(written, known)
            problems.append(f"{program} has no flag --{written}" + (f"; did you mean --{best}?" if best else ""))
            while waiting and not waiting[0].startswith("--"):
                waiting.pop(0)
            continue
        kind = known[name][0]
        if kind is bool and text.lower() in TRUTHS:  # argparse would not take it, and everybody knows what is meant
            found[name] = TRUTHS[text.lower()]
            continue
        values = [text] if sign else []
        while kind is not bool and waiting and not waiting[0].startswith("--") and (isinstance(kind, tuple) or not values):
            values.append(waiting.pop(0))
        try:
            found[name] = _switch(values) if kind is bool else _typed(values, kind)
        except ValueError:
            wanted = {int: "a whole number", float: "a number", bool: "no value"}.get(kind[0] if isinstance(kind, tuple) else kind, "a value")
            problems.append(f"--{name} needs {wanted}" + (f", not {values[0]!r}" if values and values[0] else "; was its variable set?"))
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems in the command", *problems]) if len(problems) > 1 else problems[0])
    return found


def _switch(values: Sequence[str]) -> bool:
    if values:
        raise ValueError
    return True


def _typed(values: Sequence[str], kind: type | tuple[type]) -> object:
    if not values or values == [""]:
        raise ValueError
    return [kind[0](value) for value in values] if isinstance(kind, tuple) else kind(values[0])


def _full_name(written: str, known: Collection[str]) -> str | None:
    if written in known:
        return written
    longer = [name for name in known if name.startswith(written)] if written else []
    return longer[0] if len(longer) == 1 else None


def choose_program(program: str, known: Collection[str], hint: str = "") -> ConfigError:
    """Say that a script is not one of those that are understood."""
    return ConfigError(f"{program} is not a script that can be imported", hint=" ".join(filter(None, [choose(program, known, "scripts"), hint])))

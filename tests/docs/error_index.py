"""Write docs/errors.md, every error that the source raises on purpose: `python tests/docs/error_index.py`.

Read from the source by `ast`, so what a message is made of while running stands as <words>.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner import errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/errors.md"
PACKAGE = ROOT / "simpletuner"
PROBLEM = "Problem"
"""What a section of options says of values that do not go together; a ConfigError lists them."""
FINDING = "problems.append"
"""What is wrong with a file, all at once; a ConfigError lists them, too."""
KINDS = {"ConfigError": 2, PROBLEM: 2, FINDING: 2, "DatasetError": 3, "MemoryLimitError": 4, "SimpleTunerError": 1}
TRANSPARENT = ("len", "str", "sorted", "repr", "type", "int", "max", "min", "list", "dict", "tuple", "set")
"""Calls that are read as what they are given."""
TITLES = {
    2: "Exit code 2: configuration",
    3: "Exit code 3: pictures, captions, caches",
    4: "Exit code 4: memory and disk",
    1: "Exit code 1: anything else",
}
HEAD = """\
# Errors

Written by `python tests/docs/error_index.py` from the source; change the messages there instead.

What simpletuner says when it stops on purpose, by exit code and by the part of the program that says it, and what to do. What stands in
`<angle brackets>` is filled in, in `[square ones]` at times. Codes 130 and 143 are stops by a signal, after which the same command
goes on; a failure that is not listed is a fault of ours or of a library's: run again with `--debug`, and please report it.
`simpletuner train --dry-run` finds most of code 2 without loading anything.
"""
ROOMS = {
    "adapters": "adapters",
    "cli": "commands",
    "data": "datasets",
    "diffusion": "objectives",
    "importers": "configs of other trainers",
    "memory": "memory and precision",
    "models": "models",
    "optim": "optimizers",
    "options": "options",
    "reporting": "trackers, webhooks, the hub",
    "training": "the run",
}


@dataclass(frozen=True, order=True)
class Entry:
    """An error of the source."""

    code: int
    room: str
    message: str
    hint: str


def entries() -> list[Entry]:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        if inside.startswith("examples/"):
            continue
        room = ROOMS.get(inside.split("/")[0], "the program")
        for kind, message, hint in raised(ast.parse(path.read_text(encoding="utf-8"))):
            if re.search(r"[^\W\d_]{2,}", re.sub(r"<[^<>]*>", "", message)):  # a message that is handed on has no words of its own
                found.add(Entry(KINDS[kind], room, message, hint))
    return sorted(found)


def raised(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Kind, message and hint of each error that is made."""
    texts = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.JoinedStr))]
    constants = {node.targets[0].id: node.value for node in texts if isinstance(node.targets[0], ast.Name)}
    for node in ast.walk(tree):
        kind = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        kind = FINDING if kind.endswith("problems.append") else kind
        if not isinstance(node, ast.Call) or kind not in KINDS:
            continue
        first = 1 if kind == PROBLEM else 0
        positional = [*node.args, None, None, None]
        named = {word.arg: word.value for word in node.keywords}
        message, hint = positional[first], named.get("hint", positional[first + 1])
        if message is not None:
            yield kind, words_of(message, constants), "" if hint is None else words_of(hint, constants)


def words_of(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """An expression of text as it is read: literals as they are, what is there at times in [brackets], everything else as <words>.

    Args:
        constants: texts of the file, by name.
    """
    if isinstance(node, ast.Constant):
        return str(node.value) if node.value is not None else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        text = words_of(node.value, constants)
        return f"'{text}'" if node.conversion == ord("r") and text.startswith("<") else text
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and not isinstance(getattr(node.right, "value", ""), int):
        return words_of(node.left, constants) + words_of(node.right, constants)
    if isinstance(node, ast.IfExp):
        sides = [side for side in (words_of(node.body, constants), words_of(node.orelse, constants)) if side]
        return f"[{sides[0]}]" if len(sides) == 1 else " / ".join(sides)
    if isinstance(node, ast.Name) and node.id in constants:
        return words_of(constants[node.id], {})
    return f"<{named(node)}>"


def named(node: ast.expr) -> str:
    """What an expression is called: the last name in it."""
    if isinstance(node, ast.Name):
        return plain(node.id)
    if isinstance(node, ast.Attribute):
        return plain(node.attr)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
            return named(node.args[0])
        if ast.unparse(node.func) in ("dict.fromkeys", "map"):
            return named(node.args[-1])
        if isinstance(node.func, ast.Name) and node.func.id in TRANSPARENT and node.args:
            return ("number of " if node.func.id == "len" else "") + named(node.args[0])
        if isinstance(node.func, ast.Name) and node.func.id == "choose":
            return "the nearest, and all there are"
        return named(node.func)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return named(node.generators[0].iter)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return named(node.value)
    if isinstance(node, ast.BinOp):
        return named(node.left)
    if isinstance(node, ast.BoolOp):
        return named(node.values[0])
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "value"


def plain(name: str) -> str:
    return name.strip("_").replace("_", " ").lower() or "value"


def page(found: list[Entry]) -> str:
    lines = [HEAD]
    for code, title in TITLES.items():
        lines.append(f"## {title}\n")
        for room in sorted({entry.room for entry in found if entry.code == code}):
            lines.append(f"### {room[0].upper()}{room[1:]}\n")
            mine = [entry for entry in found if (entry.code, entry.room) == (code, room)]
            lines += [f"- {code_span(entry.message)}" + (f"<br>{escaped(entry.hint)}" if entry.hint else "") for entry in mine]
            lines.append("")
    return "\n".join(lines)


def code_span(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def escaped(text: str) -> str:
    """Angle brackets outside of code would be taken for HTML."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    assert {kind for kind in KINDS if kind not in (PROBLEM, FINDING)} <= set(dir(errors))
    PAGE.write_text(page(entries()), encoding="utf-8")

"""Every command, JSON block and link in README and docs: parsed by what would read it, and run where that takes no time."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pages
import pytest

from simpletuner.cli import main as program
from simpletuner.cli.commands import train
from simpletuner.cli.flags import read_flags
from simpletuner.cli.locate import Place, examples, find_config
from simpletuner.cli.recipes.table import RECIPES
from simpletuner.data.plan import load_plan
from simpletuner.errors import ConfigError
from simpletuner.options.sources import read_words
from simpletuner.options.train_config import declared, spellings
from simpletuner.relaxed_json import load_relaxed, parse_relaxed

RUNS = ("options", "families", "optimizers")
"""Commands that only print."""
PROMPTED = ("generate", "compare")
"""Commands to which words without dashes are prompts."""
NAMES = [path.relative_to(pages.ROOT).as_posix() for path in pages.PAGES]
INCOMPLETE = re.compile("arguments are required|expected one argument|which tool's")
"""What the parser says of a command that is only named in a sentence: `simpletuner merge`."""
HOLDERS = re.compile(r"^(?:[A-Z_]+|\.\.\.|…)$")
"""Words that stand for what a reader fills in."""
DIGITS = examples()["digits"]


def read(page: str) -> str:
    return (pages.ROOT / page).read_text(encoding="utf-8")


def parse(words: list[str], monkeypatch) -> None:
    """Have the program read a command line, and check the options in it; nothing is run.

    Raises:
        ConfigError: it is wrong.
    """
    if not words or words[0] in ("-h", "--help", "--version", "-v"):
        return
    seen = []
    with monkeypatch.context() as patched:
        real = program.load(words[0]) if words[0] in program.names() else None
        if real is not None:
            patched.setattr(real, "run", lambda args: seen.append(args) or 0)
        try:
            program.run(words)
        except SystemExit as stop:
            assert stop.code == 0  # --help
            return
    args = seen[0]
    if words[0] == "import" and args.tool:  # what stands behind the tool's name is in that tool's words
        assert args.tool in real.tools(), f"no tool {args.tool} can be imported"
    elif words[0] in PROMPTED:
        flags, _ = read_words(args.flags, needs_dashes=True)
        train.read_options(find_config(None, "digits", None, {}), flags)
    elif "flags" in args and words[0] != "examples":
        flags, own = read_flags(args.flags, getattr(real, "NAMED", train.NAMED), getattr(real, "SWITCHES", ()))
        train.read_options(find_config(None, "digits", None, {}), flags)
        if name := own.get("example") or getattr(args, "example", None):
            find_config(None, name, None, {})
    if words[0] == "examples" and args.name and not HOLDERS.match(args.name):
        assert args.name.partition("/")[0] in (*examples(), *RECIPES), f"there is no example {args.name}"


def parse_script(words: list[str]) -> None:
    """A script of this repository: it is there, and declares the flags that it is given."""
    path = pages.ROOT / words[1]
    assert path.is_file(), f"{words[1]} is not there"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    takes = {
        word.value
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        for word in node.args
        if isinstance(word, ast.Constant)
    }
    for word in words[2:]:
        assert not word.startswith("--") or word.partition("=")[0] in takes, f"{words[1]} does not take {word}"


@pytest.mark.parametrize("page", [name for name in NAMES if name != "docs/errors.md"])  # that one quotes messages
def test_every_command_of_a_page_is_one_that_the_program_takes(page, monkeypatch):
    wrong = []
    for command in pages.commands(read(page)):
        try:
            words = [word for word in command.words if word not in ("...", "…")]
            if words[0] == "simpletuner" and not (len(words) > 1 and HOLDERS.match(words[1])):
                parse(words[1:], monkeypatch)
            elif words[0] == "./train.sh":
                parse(words[1:] if words[1:2] == ["configure"] else ["train", *words[1:]], monkeypatch)
            elif words[0] == "python":
                parse_script(words)
        except (ConfigError, AssertionError, ValueError) as error:
            if command.is_mention and INCOMPLETE.search(str(error)):
                continue
            wrong.append(f"{page}:{command.line}: {command.text}\n    {error}")

    assert not wrong, "\n".join(wrong)


def test_commands_that_only_print_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = {tuple(command.words[1:]) for name in NAMES for command in pages.commands(read(name)) if command.words[0] == "simpletuner"}
    prints = sorted(words for words in found if words and words[0] in RUNS and not any(HOLDERS.match(word) or "<" in word for word in words))
    dry = sorted(words for words in found if words[:3] in (("train", "--example", "digits"), ("examples", "copy", "digits")))

    assert len(prints) >= 4 and len(dry) >= 2
    for words in [*prints, *dry, ("examples",), ("examples", "list")]:
        assert program.main([*words, *(["--dry-run"] if words[0] == "train" else [])]) == 0, words
    assert not capsys.readouterr().err


def test_extras_that_pages_install_exist():
    declared_extras = read("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", declared_extras, re.MULTILINE)
    named = {word for name in NAMES for found in re.findall(r"simpletuner\[([\w,]+)\]", read(name)) for word in found.split(",")}

    assert named <= set(extras)
    assert "examples" in named


# JSON.


def values(text: str) -> object:
    """A block of JSON; parts of an object or of a list, too."""
    for opened, closed in (("", ""), ("{", "}"), ("[", "]")):
        try:
            return parse_relaxed(f"{opened}{text}{closed}", "block")
        except ConfigError as error:
            last = error
    raise last


def check_settings(found: dict[str, object], folder: Path) -> None:
    """Keys of config.json through the loader, on top of the digits example's where the block is not a whole config."""
    settings = {} if "model_family" in found else dict(load_relaxed(DIGITS / "config.json"))
    path = folder / "config.json"
    path.write_text(json.dumps({**settings, "data_backend_config": "d.json", "output_dir": "output/x", **found}), encoding="utf-8")
    train.read_options(Place(path, DIGITS), [])


def check_datasets(found: list[dict[str, object]], folder: Path) -> None:
    """Entries of multidatabackend.json through the loader, with the datasets that they speak of beside them."""
    here, path = {entry["id"] for entry in found}, folder / "multidatabackend.json"
    named = {name for entry in found for key in ("source_dataset_id", "conditioning_data") for name in [entry.get(key)] if isinstance(name, str)}
    if not any(entry.get("dataset_type", "image") == "image" for entry in found):
        named.add("my-cat")
    beside = [{"id": name, "instance_data_dir": f"datasets/{name}"} for name in sorted(named - here)]
    path.write_text(json.dumps([*found, *beside]), encoding="utf-8")
    options = train.read_options(find_config(None, "digits", None, {}), []).config.data
    load_plan(path, options, {"model_family": "auraflow", "output_dir": "output"}, alignment_px=64, checks_places=False)


@pytest.mark.parametrize("page", NAMES)
def test_every_json_block_of_a_page_is_read(page, tmp_path, monkeypatch):
    wrong = []
    for name in re.findall(r"\{env:(\w+)\}", read(page)):
        monkeypatch.setenv(name, "https://example.org/hook")
    for language, body, line in pages.fences(read(page)):
        if language not in ("json", "jsonc"):
            continue
        try:
            found = values(body)
            entries = found if isinstance(found, list) else [found]
            if all(isinstance(entry, dict) and "id" in entry for entry in entries):
                check_datasets(entries, tmp_path)
            elif isinstance(found, dict) and any(key in declared() or key in spellings() for key in found):
                check_settings(found, tmp_path)
        except ConfigError as error:
            wrong.append(f"{page}:{line}: {error}")

    assert not wrong, "\n".join(wrong)


# Links.


@pytest.mark.parametrize("page", NAMES)
def test_every_link_of_a_page_leads_somewhere(page):
    here, text = pages.ROOT / page, read(page)
    wrong = []
    for link in pages.links(text):
        name, _, anchor = link.partition("#")
        target = (here.parent / name).resolve() if name else here
        if not target.exists():
            wrong.append(link)
        elif anchor and anchor not in pages.anchors(target.read_text(encoding="utf-8")):
            wrong.append(f"{link} (there is no such heading)")

    assert not wrong, f"{page}: {wrong}"

"""The end of the wizard: what is to be known, a check by the run's own rules, the differences, and the writing."""

from __future__ import annotations

import io
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import Place
from simpletuner.cli.preview import preview
from simpletuner.cli.wizard.asking import Move, say
from simpletuner.cli.wizard.drafts import drop
from simpletuner.cli.wizard.files import CONFIG, changed, differences, write
from simpletuner.cli.wizard.flow import Walk
from simpletuner.cli.wizard.forecast import NO_FIT
from simpletuner.cli.wizard.pitfalls import pitfalls
from simpletuner.cli.wizard.proposals import Situation
from simpletuner.cli.wizard.questions import Choice, Question
from simpletuner.console import Console
from simpletuner.errors import ConfigError, DatasetError

WRITE, STOP = "write", "stop"
WROTE, KEPT = 0, 130
HELP = "The files are written as the lines above say. Back goes to the last page; nothing was written yet."
NOTE = re.compile(r"^note: (.*)$", re.MULTILINE)
DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def check(files: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Read a config as `simpletuner train --dry-run` does.

    Args:
        files: by name, with `{folder}` for where they lie.

    Returns:
        What a run would refuse, or None; and what it would note.
    """
    with tempfile.TemporaryDirectory(prefix="simpletuner-check-") as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text.replace("{folder}", Path(folder).as_posix()), encoding="utf-8")
        place, out = Place(Path(folder) / CONFIG), io.StringIO()
        try:
            loaded = read_options(place, [])
            variables = {"model_family": loaded.config.models.model_family, "output_dir": str(loaded.config.training.output_dir)}
            preview(loaded, CONFIG, variables, Console(stream=out), lists_all=False)
        except (ConfigError, DatasetError) as error:
            return str(error).replace(f"{folder}/", "").replace(folder, "."), []
        return None, NOTE.findall(out.getvalue())


def finish(walk: Walk, *, takes_all: bool, agrees: bool) -> int | Move:
    """Say what there is to know, check, show what changes, write.

    Args:
        takes_all: nobody is asked.
        agrees: files that are there may be changed without being asked.

    Raises:
        ConfigError: nobody is asked, and a run would refuse the config, or files would be changed.
        DatasetError: nobody is asked, and no picture can be used.
    """
    situation, console = walk.situation(), walk.console
    refused, notes = check(walk.texts(situation, "{folder}"))
    unusable = no_pictures(situation)
    plan = walk.final_plan(situation)
    files = target_files(walk, situation)
    others = changed(files)
    show(console, situation, [*([unusable] if unusable else []), *pitfalls(situation), *notes], plan, refused)
    show_files(console, files, others)
    if takes_all:
        if unusable:
            raise DatasetError(f"nothing was written: {unusable}", hint="`simpletuner dataset check` says what is wrong with each picture.")
        refuse_unasked(refused, others, agrees)
    else:
        asked = ask_to_write(walk, refused or unusable, bool(others), is_same(files, others))
        if asked is Move.BACK:
            return Move.BACK
        if not asked:
            say(console, f"Nothing was written; the answers are kept in {walk.draft_folder}.", indent="")
            return KEPT
    write(files)
    if walk.keeps:
        drop(walk.draft_folder)
    say_next(console, walk.existing.path if walk.existing else next(iter(files)))
    return WROTE


def no_pictures(s: Situation) -> str | None:
    """Why there is nothing to learn from, or None; a folder that is not on this machine was not looked at."""
    found = s.pictures
    if s.trained.count or not found.folder:
        return None
    if found.count:
        return f"none of {found.count} pictures in {found.folder} is left by caption_strategy {s.value('caption_strategy')} and minimum_image_size"
    faults = ", ".join(f"{number} {rule}" for rule, number in found.faults.items())
    return f"no picture in {found.folder} can be used" + (f" ({faults})" if faults else "")


def target_files(walk: Walk, situation: Situation) -> dict[Path, str]:
    """Every file with its new text, config.json first."""
    if walk.existing:
        return walk.edited(situation)
    folder = walk.fixed_folder or Path("config") / situation.value("name")
    return {folder / name: text for name, text in walk.texts(situation, folder.as_posix()).items()}


def is_same(files: Mapping[Path, str], others: Mapping[Path, str]) -> bool:
    """Whether every file is there and stays as it is."""
    return not others and all(path.exists() for path in files)


def show(console: Console, situation: Situation, notes: list[str], plan: str, refused: str | None) -> None:
    if notes or plan or refused:
        console.heading("Before you begin")
    if plan:
        say(console, plan, style="bold red" if NO_FIT in plan else "green")
    for note in dict.fromkeys(notes):
        say(console, f"! {note}", style="yellow")
    if refused:
        console.error(f"a run would refuse this: {refused}")


def show_files(console: Console, files: Mapping[Path, str], others: Mapping[Path, str]) -> None:
    """List the files, and show line by line what changes in those that are there."""
    console.heading("Files")
    for path, text in files.items():
        state = "new" if not path.exists() else "changed" if path in others else "stays as it is"
        console.say(f"  {path}  ({state})")
        for line in differences(others[path], text, path.name) if path in others else ():
            console.say(f"    {line}", style=DIFF_STYLES.get(line[:1]))


def refuse_unasked(refused: str | None, others: Mapping[Path, str], agrees: bool) -> None:
    if refused:
        raise ConfigError(f"nothing was written, since a run would refuse it: {refused}", hint="Change the answers by flags: --resolution 512.")
    if others and not agrees:
        names = ", ".join(str(path) for path in others)
        raise ConfigError(f"{names} would be changed as shown above", hint="Say --yes to have it so, or name another folder.")


def ask_to_write(walk: Walk, refused: str | None, changes: bool, nothing: bool) -> Any:
    """Whether to write; False to stop, or back."""
    if nothing:
        title, word = "Nothing changes. Done?", "Done"
    else:
        title, word = ("Write these changes?" if changes else "Write these files?"), "Write"
    default = Move.BACK if refused else WRITE
    choices = (
        Choice(WRITE, f"{word}, although a run would refuse it" if refused else word),
        Choice(STOP, "Stop, and keep the answers for next time"),
    )
    said = walk.asker.ask(Question(title, default, choices, help=HELP))
    return said if said is Move.BACK else said == WRITE


def say_next(console: Console, config: Path) -> None:
    """The commands to go on with."""
    name = shlex.quote(str(config))
    console.heading("Next")
    for line, why in (
        (f"simpletuner dataset check --config {name}", "looks at every picture and caption"),
        (f"simpletuner plan --config {name}", "memory, phase by phase"),
        (f"simpletuner train --config {name}", "trains; the same command goes on after a stop"),
    ):
        console.say(f"  {line}")
        console.say(f"      {why}", style="dim")

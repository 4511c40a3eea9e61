"""The page of a model (README.md): what was trained on what, how, what it makes, and how to use it.

Facts come as texts; which they are is settled by `training/card_facts.py`, how they read by `templates/model_card.md`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

CARD_FILE, PICTURES_FOLDER = "README.md", "card"
PICTURE_PX, PICTURE_QUALITY = 768, 92
"""The longest side of the page's pictures, and the quality of their JPEG."""
MARK = "FOLDER-OF-THE-ADAPTER"
"""Stands in a snippet for the folder that holds what was trained."""
PLACE = re.compile(r"(`{3,}python\n)(?:from huggingface_hub import snapshot_download\n\n)?folder = [^\n]*\n")
"""The lines of a page's snippet that say where that is."""
NOT_FOR_ALL = "not-for-all-audiences"


@dataclass(frozen=True, slots=True)
class CardPicture:
    """A prompt of the validation, and what it makes."""

    prompt: str
    negative_prompt: str
    settings: str
    """Size, seed and such, in a line."""
    after: Path
    before: Path | None = None
    """By the untouched model."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that a page tells. Texts are plain: the page escapes them."""

    title: str
    family: str
    """Of the base model."""
    base_on_hub: str | None
    """The base model's id on the hub, if that is where it is from."""
    licence: Mapping[str, str]
    """`license`, `license_name` and `license_link` of the base; empty if it is not known."""
    is_adapter: bool
    what: str
    """What was trained, in words: a LoRA, all weights."""
    progress: str
    """How far, in words: `after 500 of 1000 steps`."""
    pipeline_tag: str
    tags: Sequence[str]
    is_safe_for_work: bool
    triggers: Sequence[str]
    note: str
    """Of the user's own, in Markdown."""
    pictures: Sequence[CardPicture]
    snippet: str | None
    """Python that renders a picture, with MARK for the folder; None where no few lines do."""
    folder: str
    """The folder that holds what was trained, as somebody on this machine may write it; without a path that tells of it."""
    generate: str
    """A command line that renders a picture, with MARK for the folder."""
    trained: Mapping[str, str]
    settings: Mapping[str, str]
    datasets: Sequence[Mapping[str, str]]
    """A row each, all with the same columns."""
    losses: Sequence[Mapping[str, str]]
    """Of held-out pictures, alike."""
    versions: Mapping[str, str]


def write_card(folder: Path, facts: CardFacts, repository: str | None = None) -> Path:
    """Write the page into a folder, its pictures beside it, in place of an earlier one.

    Args:
        repository: where it will stand on the hub; then its snippet loads from there.
    """
    shown = write_pictures(folder / PICTURES_FOLDER, facts.pictures)
    text = render(facts, shown)
    staged = folder / f".{CARD_FILE}.tmp"
    staged.write_text(located(text, repository) if repository else text, encoding="utf-8")
    staged.replace(folder / CARD_FILE)
    return folder / CARD_FILE


def write_pictures(folder: Path, pictures: Sequence[CardPicture]) -> list[dict[str, Any]]:
    """Write small copies by number, so that no name of a prompt is a name of a file; one that cannot be read is left out.

    Returns:
        Rows for the template, each with the paths of its files in the page's folder.
    """
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    for picture in pictures:
        number, files = len(rows) + 1, {}
        for key, path in (("after", picture.after), ("before", picture.before)):
            try:
                if path is not None:
                    with Image.open(path) as image:
                        files[key] = image.convert("RGB")
            except OSError:
                continue
        if "after" in files:
            folder.mkdir(parents=True, exist_ok=True)
            paths = {key: save_small(image, folder / f"{number}{'-before' if key == 'before' else ''}.jpg") for key, image in files.items()}
            rows.append({"picture": picture, **paths})
    return rows


def save_small(image: Image.Image, path: Path) -> str:
    """Write a picture that a page can show, and give its path as the page names it."""
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    image.save(path, quality=PICTURE_QUALITY)
    return f"{path.parent.name}/{path.name}"


def render(facts: CardFacts, shown: Sequence[Mapping[str, Any]] = ()) -> str:
    """Make the page of the facts.

    Args:
        shown: the pictures, as `write_pictures` gives them.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("simpletuner.reporting"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = cell
    code = "" if facts.snippet is None else f"folder = {facts.folder!r}  # what was trained\n\n{at_folder(facts.snippet)}"
    text = environment.get_template("model_card.md").render(
        facts=facts,
        shown=shown,
        has_before=any("before" in row for row in shown),
        code=code.strip("\n"),
        fence="`" * max(3, 1 + longest_run(code + facts.generate)),
        generate=facts.generate.replace(MARK, shlex.quote(facts.folder)),
        folder=shlex.quote(facts.folder),
        metadata=ModelCardData(**front_matter(facts, shown)).to_yaml(),
    )
    return without_surrogates(text)


def front_matter(facts: CardFacts, shown: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What the hub reads of a page, by its keys."""
    widget = [
        {
            "text": tidy(row["picture"].prompt),
            **({"parameters": {"negative_prompt": tidy(row["picture"].negative_prompt)}} if row["picture"].negative_prompt else {}),
            "output": {"url": row["after"]},
        }
        for row in shown
    ]
    return {
        **({"base_model": facts.base_on_hub, "base_model_relation": "adapter" if facts.is_adapter else "finetune"} if facts.base_on_hub else {}),
        **facts.licence,
        "library_name": "diffusers",
        "pipeline_tag": facts.pipeline_tag,
        "tags": [*facts.tags, *([] if facts.is_safe_for_work else [NOT_FOR_ALL])],
        **({"instance_prompt": tidy(facts.triggers[0])} if facts.triggers else {}),
        **({"widget": widget} if widget else {}),
    }


def at_folder(snippet: str) -> str:
    """Let Python that names the folder MARK use the variable `folder` instead."""
    inside = re.sub(rf"(['\"]){MARK}/([^'\"\n]*)\1", r'f"{folder}/\2"', snippet)
    return re.sub(rf"(['\"]){MARK}\1", "folder", inside)


def located(page: str, repository: str) -> str:
    """Let a page's snippet load from a repository on the hub."""
    load = f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({repository!r})\n"
    return PLACE.sub(lambda found: found[1] + load, page, count=1)


def cell(text: object) -> str:
    """Any text as one line of Markdown that shows just that text, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|&~$!])", r"\\\1", tidy(str(text)))


def tidy(text: str) -> str:
    """A text in one line, without characters that control something."""
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)
    return " ".join(plain.split())


def longest_run(code: str) -> int:
    """The most backticks that follow one another."""
    return max((len(found) for found in re.findall("`+", code)), default=0)


def without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")

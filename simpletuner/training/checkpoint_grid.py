"""Checkpoints of a run side by side: each prompt by each checkpoint at each strength, from the same seeds, on one page and in one picture.

The base is loaded once, and one checkpoint's weights take the place of another's. A picture that is there is not rendered again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from simpletuner.adapters import weights
from simpletuner.adapters.adapter import Adapter
from simpletuner.console import Console
from simpletuner.errors import ConfigError, Stopped, choose
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.report.page import MOST_BYTES, as_html, as_uri, small, texts_of
from simpletuner.reporting.report.state import write_whole
from simpletuner.training.assistant import find_assistant
from simpletuner.training.attention import attention_of
from simpletuner.training.base import keeps_quantised
from simpletuner.training.building import build_family
from simpletuner.training.caching import Vae
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.evaluations import WORDS, Book, best_of
from simpletuner.training.finished import holds_adapter, open_finished
from simpletuner.training.generate import Trained, Wish, encode, load_trained, refuse_missing_model, settings
from simpletuner.training.identities import learn_identities
from simpletuner.training.machine import start_accelerator
from simpletuner.training.prompts import Picture, Prompt, pictures_of, prompts_to_show
from simpletuner.training.signals import StopRequest
from simpletuner.training.starts import check_starts, with_starts
from simpletuner.training.validation import Renderer, facts_of, grid, write_picture

BASE = "base"
LONGEST_PX = (448, 320, 224, 160, 96)
"""Sides of pictures in the page, tried until all together are small enough."""
SHEET_PX, SHEET_COLUMNS = 256, 40
"""Of pictures in compare.png, and how many stand side by side at most."""
Texts = Mapping[str, Mapping[str, Tensor]]
"""What prompts became."""


@dataclass(frozen=True, slots=True)
class Column:
    """One state of what was trained."""

    name: str
    path: Path | None
    """Of its weights; None is the base."""
    step: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is to be laid side by side."""

    run: Path
    config: TrainConfig
    columns: Sequence[Column]
    strengths: Sequence[float]
    prompts: Mapping[str, Prompt]


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture."""

    column: Column
    strength: float
    picture: Picture
    file: Path


def columns_of(run: Path, asked: str) -> list[Column]:
    """The checkpoints that are asked for: steps or names with commas, or `all`.

    Raises:
        ConfigError: there is none of that name, none at all, or one is damaged.
    """
    there = {checkpoint.folder.name: checkpoint for checkpoint in CheckpointFolder(run, None, lambda text: None).all()}
    if not there:
        raise ConfigError(f"there is no checkpoint in {run}", hint="Give the output_dir of a run that has saved some (checkpoint_step_interval).")
    words = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    names = list(there) if words in ([], ["all"]) else [f"checkpoint-{word}" if word.isdigit() else word for word in words]
    for name in names:
        if name not in there:
            raise ConfigError(f"there is no {name} in {run}", hint=choose(name, list(there), "checkpoints"))
        if problem := there[name].problem():
            raise ConfigError(f"{name} is damaged: {problem}", hint="Leave it out with --checkpoints.")
    chosen = sorted((there[name] for name in names), key=lambda one: one.step)
    return [Column(one.folder.name, one.folder, one.step) for one in chosen]


def compare_checkpoints(asked: Comparison, console: Console) -> int:
    """Render what is missing, and lay out all of it; gives the exit code, 0.

    Raises:
        SimpleTunerError: anything a user can cause, with a hint.
        Stopped: Ctrl-C or SIGTERM; what was rendered is kept, and found again.
    """
    config, folder = asked.config, asked.run / "compare"
    first = asked.columns[0].path
    assert first is not None
    is_adapter = holds_adapter(first)
    wish = Wish(config, Trained(first, True), asked.prompts, asked.strengths, folder, True)
    family = build_family(config)
    refuse_missing_model(family, wish)
    family.check_source()
    strengths = list(asked.strengths) or [config.validation.validation_lycoris_strength if is_adapter else 1.0]
    if not is_adapter and strengths != [1.0]:
        raise ConfigError("--strength is an adapter's, and this run trained all weights", hint="Leave --strength out.")
    shown = pictures_of(asked.prompts, config.validation, config.training.seed, family)
    check_starts(config, family, shown)
    shown = with_starts(shown, config, family, None)
    cells = cells_of(asked.columns, strengths, shown, folder, has_base=is_adapter)

    def facts(cell: Cell) -> dict[str, str]:
        of_picture = facts_of(cell.picture, config.models.model_family, config.validation, cell.strength)
        return {**of_picture, **settings(wish, config, family, None), "trained": cell.column.name, "step": str(cell.column.step)}

    due = [cell for cell in cells if not is_there(cell, facts(cell))]
    console.facts({"run": str(asked.run), "pictures": f"{len(cells)}, {len(due)} to render", "output": str(asked.run / "compare.html")})
    if due:
        stopped_at: list[Cell] = []

        def stopped(exit_code: int) -> Stopped:
            return Stopped(f"stopped: {len(stopped_at)} of {len(due)} pictures are made", "The same command makes the others.", exit_code=exit_code)

        with StopRequest(stopped=stopped).listening() as stop, stop.settling():
            render_cells(wish, due, facts, stopped_at, stop, console)
    lay_out(asked, cells, strengths, console)
    return 0


def cells_of(columns: Sequence[Column], strengths: Sequence[float], shown: Sequence[Picture], folder: Path, *, has_base: bool) -> list[Cell]:
    """Every picture, the base's first, checkpoint by checkpoint and strength by strength."""
    base = [Cell(Column(BASE, None, 0), 0.0, picture, folder / f"{BASE}_{picture.file_stem}.png") for picture in shown] if has_base else []
    return base + [
        Cell(column, strength, picture, folder / f"{column.name}_strength_{strength:g}_{picture.file_stem}.png")
        for column in columns
        for strength in strengths
        for picture in shown
    ]


def is_there(cell: Cell, facts: Mapping[str, str]) -> bool:
    """Whether a picture was rendered from the same settings, and since its checkpoint was written."""
    try:
        file = weights.file_of(cell.column.path) if cell.column.path is not None else None
        is_newer = file is None or not file.is_file() or cell.file.stat().st_mtime >= file.stat().st_mtime
        return is_newer and texts_of(cell.file) == dict(facts)
    except (OSError, ValueError, SyntaxError):
        return False


def render_cells(
    wish: Wish, due: Sequence[Cell], facts: Callable[[Cell], Mapping[str, str]], made: list[Cell], stop: StopRequest, console: Console
) -> None:
    """Render pictures and write each into its file.

    Args:
        made: gets each one that is there.
    """
    config = wish.config
    family, accelerator = build_family(config), start_accelerator(config)
    assistant, attention = find_assistant(config, family, trains=False), attention_of(config.memory, family, accelerator.device, trains=False)
    strengths = list(dict.fromkeys(cell.strength for cell in due))
    prompts = prompts_to_show(list({cell.picture.file_stem: cell.picture for cell in due}.values()))
    texts: dict[str, Mapping[float, Texts]] = {}
    assert wish.trained is not None
    first = open_finished(wish.trained.path, config, True) if holds_adapter(wish.trained.path) else None
    for column in {cell.column.name: cell.column for cell in due}.values():
        is_own = first is not None and bool(first.text) and column.path is not None  # its text encoders learned, too
        finished = open_finished(column.path, config, True) if is_own and column.path is not None else first
        if is_own or not texts or (first is not None and first.text):
            texts[column.name] = encode(config, family, finished, strengths, prompts, accelerator, console)
        else:
            texts[column.name] = next(iter(texts.values()))
    if keeps_quantised(config, family):
        learn_identities(family, [family.denoiser_folder], Path(config.data.cache_dir), console)
    denoiser, effect = load_trained(wish, config, family, first, assistant, accelerator)
    attention.attach(denoiser)
    vae = Vae(family, config.memory, accelerator.device, Path(config.data.cache_dir), stays=True)
    renderer = Renderer(
        family=family,
        denoiser=denoiser,
        adapter=effect,
        load_vae=vae.get,
        text=lambda prompt: {},
        options=config.validation,
        diffusion=config.diffusion,
        device=accelerator.device,
        assistant=assistant,
        attention=attention,
        is_stopped=lambda: stop.is_made,
    )
    due[0].file.parent.mkdir(parents=True, exist_ok=True)
    loaded = wish.trained.path
    with console.bar("pictures", len(due), "pictures") as bar:
        for cell in due:
            if cell.column.path is not None and cell.column.path != loaded:
                assert isinstance(effect, Adapter)
                effect.load(cell.column.path)
                loaded = cell.column.path
            own = replace(renderer, text=texts[cell.column.name][cell.strength].__getitem__)
            image = own.render([cell.picture], cell.strength, lambda: None)[0]
            with stop.deferred():
                write_picture(cell.file, image, facts(cell))
                made.append(cell)
            bar.advance(1, cell.file.name)


def lay_out(asked: Comparison, cells: Sequence[Cell], strengths: Sequence[float], console: Console) -> None:
    """Write compare.html and compare.png, and say which checkpoint is the best by evaluation."""
    steps = {column.step: column.name for column in asked.columns}
    best = best_of(Book(asked.run), asked.config.validation.best_checkpoint, list(steps))
    metric = asked.config.validation.best_checkpoint
    value = abs(Book(asked.run).values(metric)[best]) if best is not None else 0.0
    said = f"best by {WORDS[metric]}: {steps[best]} ({value:.4f})" if best is not None else ""
    page, sheet = asked.run / "compare.html", asked.run / "compare.png"
    write_whole(page, as_html("compare", content_of(asked, cells, strengths, said, best)))
    write_picture(sheet, sheet_of(cells), {})
    console.say(f"\n  {page}\n  {sheet}")
    if said:
        console.say(said)


def content_of(asked: Comparison, cells: Sequence[Cell], strengths: Sequence[float], said: str, best: int | None) -> dict[str, Any]:
    """What the page's script reads."""
    data, longest_px = pictures_within(list(dict.fromkeys(cell.file for cell in cells)))
    names = {cell.column.name: cell.column.step for cell in cells}
    prompts = []
    for picture in {cell.picture.file_stem: cell.picture for cell in cells}.values():
        mine = [cell for cell in cells if cell.picture.file_stem == picture.file_stem]
        sources = {cell.column.name if cell.column.path is None else f"{cell.column.name} {cell.strength:g}": data[cell.file] for cell in mine}
        prompts.append({"text": picture.prompt, "seed": str(picture.seed), "size": str(picture.size), "pictures": sources})
    return {
        "title": f"{asked.run.resolve().name}: checkpoints side by side",
        "about": f"{asked.config.models.model_family}, {len(asked.columns)} checkpoints at {len(strengths)} strengths, from the same seeds",
        "best": said,
        "notes": [f"Pictures are at most {longest_px} pixels wide or high here; in full size they are in compare/."],
        "strengths": [f"{strength:g}" for strength in strengths],
        "columns": [{"name": name, "is_best": name != BASE and step == best} for name, step in names.items()],
        "prompts": prompts,
    }


def pictures_within(files: Sequence[Path], most_bytes: int = MOST_BYTES) -> tuple[dict[Path, str], int]:
    """Pictures as data URIs, as small as it takes for all of them together; and their longest side."""
    for longest_px in LONGEST_PX:
        made = {file: small(file, longest_px) for file in files}
        if sum(map(len, made.values())) <= most_bytes:
            break
    return {file: as_uri(data) for file, data in made.items()}, longest_px


def sheet_of(cells: Sequence[Cell]) -> Image.Image:
    """All pictures in one: a row a prompt, a column a checkpoint and strength."""
    columns: dict[str, list[Image.Image]] = {}
    for cell in cells:
        label = cell.column.name if cell.column.path is None else f"{cell.column.name.removeprefix('checkpoint-')} at {cell.strength:g}"
        if label in columns or len(columns) < SHEET_COLUMNS:
            with Image.open(cell.file) as image:
                plain = image.convert("RGB")
            plain.thumbnail((SHEET_PX, SHEET_PX))
            columns.setdefault(label, []).append(plain)
    rows = list({cell.picture.file_stem: cell.picture.prompt for cell in cells}.values())
    return grid(list(columns.values()), list(columns), rows)

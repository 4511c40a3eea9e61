"""Pictures by prompts, with or without what was trained: rendered as validation renders them, in the same order of memory.

Text encoders in, prompts encoded, encoders out; then the denoiser in, quantised, adapter on; the VAE with the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from simpletuner import __version__
from simpletuner.adapters.effect import Effect, FileEffect
from simpletuner.adapters.ranks import all_ranks_note, has_ranks_by_time
from simpletuner.console import Console
from simpletuner.data.row_encoder import RowEncoder
from simpletuner.errors import ConfigError, Stopped
from simpletuner.memory.offload import Offload
from simpletuner.models.family import ModelFamily
from simpletuner.models.source import INDEX_FILE, is_local
from simpletuner.optim.rules import trains_in
from simpletuner.options.memory import TRAINED, WEIGHTS
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.assemble import attach_adapter
from simpletuner.training.assistant import Assistant, find_assistant
from simpletuner.training.attention import attention_of
from simpletuner.training.base import keeps_quantised, load_frozen
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.caching import TextEncoders, Vae
from simpletuner.training.finished import Finished, holds_adapter, open_finished
from simpletuner.training.identities import learn_identities
from simpletuner.training.machine import start_accelerator
from simpletuner.training.prompts import (
    Picture,
    Prompt,
    file_name_of,
    free_name,
    named_prompts,
    pictures_of,
    prompts_to_show,
    read_library,
    rounded_sizes,
)
from simpletuner.training.run_folder import without_paths
from simpletuner.training.signals import StopRequest
from simpletuner.training.starts import check_starts, with_starts
from simpletuner.training.validation import Renderer, facts_of, grid, write_picture

NAME_LETTERS = 48
"""Letters of a prompt that its picture is called by."""
QUOTED_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained, where it lies."""

    path: Path
    """As `find_weights` found it."""
    has_settings: bool
    """Whether the options tell how it was trained, and not only on what."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be rendered."""

    config: TrainConfig
    """The model, and in its section `validation` how pictures are made."""
    trained: Trained | None
    """None is the model as it is."""
    prompts: Mapping[str, Prompt]
    """By names that are fit for files."""
    strengths: Sequence[float]
    """Of the adapter; nothing is what validation takes."""
    folder: Path
    overwrites: bool
    """Whether pictures of the same name are replaced; otherwise new ones get a number."""


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to render, and its file."""

    picture: Picture
    strength: float
    file: Path


def generate(wish: Wish, console: Console) -> int:
    """Render what is wished, each picture into its file as soon as it is there.

    Returns:
        The exit code, 0.

    Raises:
        SimpleTunerError: anything a user can cause, with a hint.
        Stopped: Ctrl-C or SIGTERM; what was rendered is kept.
    """
    config = with_trained_model(wish)
    family = build_family(config)
    refuse_missing_model(family, wish)
    family.check_source()
    trained = wish.trained
    finished = open_finished(trained.path, config, trained.has_settings) if trained and holds_adapter(trained.path) else None
    assistant = find_assistant(config, family, trains=False)
    strengths = strengths_of(wish, finished)
    wanted = pictures_of(wish.prompts, config.validation, config.training.seed, family)
    if wish.strengths:  # they hold for all prompts, whatever a library says
        wanted = [picture.without("validation_lycoris_strength") for picture in wanted]
    for note in rounded_sizes(config.validation, family.alignment_px):
        console.say(f"note: {note}")
    check_starts(config, family, wanted)
    shown = with_starts(wanted, config, family, None)
    jobs = plan(shown, strengths, wish.folder, wish.overwrites)
    accelerator = start_accelerator(config)
    attention = attention_of(config.memory, family, accelerator.device, trains=False)
    show_wish(console, wish, config, family, shown, strengths)
    if finished and finished.adapter is None and has_ranks_by_time(finished.changes) and finished.rank_rule() is None:
        console.say(all_ranks_note("the file"))
    for note in assistant.notes:
        console.say(f"note: {note}")
    made: list[tuple[Job, Image.Image]] = []

    def stopped(exit_code: int) -> Stopped:
        where = f"They are in {wish.folder}." if made else None
        return Stopped(f"stopped: {len(made)} of {len(jobs)} pictures are made", where, exit_code=exit_code)

    with StopRequest(stopped=stopped).listening() as stop, stop.settling():
        texts = encode(config, family, finished, strengths, prompts_to_show(shown), accelerator, console)
        if keeps_quantised(config, family):
            learn_identities(family, [family.denoiser_folder], Path(config.data.cache_dir), console)
        denoiser, effect = load_trained(wish, config, family, finished, assistant, accelerator)
        attention.attach(denoiser)
        vae = Vae(family, config.memory, accelerator.device, Path(config.data.cache_dir), stays=True)
        renderer = Renderer(
            family=family,
            denoiser=denoiser,
            adapter=effect,
            load_vae=vae.get,
            text=texts[strengths[0]].__getitem__,
            options=config.validation,
            diffusion=config.diffusion,
            device=accelerator.device,
            assistant=assistant,
            attention=attention,
            is_stopped=lambda: stop.is_made,
        )
        render(renderer, texts, jobs, settings(wish, config, family, finished), made, stop, console)
    if len(strengths) > 1:
        compare(made, strengths, wish)
    console.say()
    for job in jobs:
        console.say(f"  {job.file}")
    return 0


def with_trained_model(wish: Wish) -> TrainConfig:
    """Let a run that trained all weights and has ended be its own model: the pipeline that it left is whole."""
    config, pipeline = wish.config, pipeline_of(wish.trained)
    if pipeline is None:
        return config
    return config.model_copy(update={"models": config.models.at_folder(pipeline)})


def pipeline_of(trained: Trained | None) -> Path | None:
    """The whole model that a run left, if it trained all weights and has ended."""
    if trained is None or holds_adapter(trained.path):
        return None
    return next((folder for folder in (trained.path, trained.path / "pipeline") if (folder / INDEX_FILE).is_file()), None)


def refuse_missing_model(family: ModelFamily, wish: Wish) -> None:
    """Say what is the matter where a run's saved settings name a model of which they keep the last part of its path alone."""
    location = family.source.location
    if wish.trained is not None and is_local(location) and not Path(location).expanduser().exists():
        raise ConfigError(
            f"the model {location} that {wish.trained.path} was trained on is not here",
            hint="What a run leaves names no absolute paths. Add --pretrained_model_name_or_path with the model's folder, file or hub id.",
        )


def strengths_of(wish: Wish, finished: Finished | None) -> list[float]:
    """At which strengths pictures are rendered.

    Raises:
        ConfigError: there is nothing that has a strength.
    """
    if finished is not None:
        return list(wish.strengths) or [wish.config.validation.validation_lycoris_strength]
    if any(strength != 1 for strength in wish.strengths):
        what = "there is no adapter" if wish.trained is None else f"{wish.trained.path} is no adapter, but a model of which all weights were trained"
        raise ConfigError(f"--strength is an adapter's, and {what}", hint="Leave --strength out, or name an adapter with --adapter.")
    return [1.0]


def plan(shown: Sequence[Picture], strengths: Sequence[float], folder: Path, overwrites: bool) -> list[Job]:
    """Name the files, strength by strength; one that is there already keeps its name unless it is to be replaced."""
    jobs: list[Job] = []
    taken: set[Path] = set()
    for picture in shown:
        for strength in strengths:
            stem = picture.file_stem + (f"_strength_{strength:g}" if len(strengths) > 1 else "")
            file, number = folder / f"{stem}.png", 2
            while file in taken or (file.exists() and not overwrites):
                file, number = folder / f"{stem}-{number}.png", number + 1
            taken.add(file)
            jobs.append(Job(picture, strength, file))
    return sorted(jobs, key=lambda job: list(strengths).index(job.strength))


def show_wish(console: Console, wish: Wish, config: TrainConfig, family: ModelFamily, shown: Sequence[Picture], strengths: Sequence[float]) -> None:
    """Say what is about to be made of what."""
    options, memory, trained = config.validation, config.memory, wish.trained
    sizes = ", ".join(dict.fromkeys(str(picture.size) for picture in shown))
    precision = "" if memory.base_model_precision == "no_change" else f", base in {memory.base_model_precision}"
    is_full = config.adapters.model_type == "full" and trained
    weights = TRAINED[trains_in(config.optim, memory)] if is_full else WEIGHTS[memory.mixed_precision]
    rows = {"model": f"{config.models.model_family} from {family.source_name()}, {weights}{precision}"}
    if trained is not None and pipeline_of(trained) is None:
        rows["trained"] = str(trained.path) + (f", strength {', '.join(f'{strength:g}' for strength in strengths)}" if strengths != [1.0] else "")
    seeds = list(dict.fromkeys(picture.seed for picture in shown))
    rows["pictures"] = f"{len(shown) * len(strengths)} of {sizes}, seed {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")
    real = f", real guidance {options.validation_guidance_real:g}" if options.validation_guidance_real != 1 else ""
    rows["sampling"] = f"{options.validation_num_inference_steps} steps, guidance {options.validation_guidance:g}{real}"
    if options.validation_negative_prompt:
        rows["negative prompt"] = options.validation_negative_prompt
    rows["output"] = str(wish.folder)
    console.facts(rows)
    replaced = [job for job in plan(shown, strengths, wish.folder, overwrites=True) if job.file.exists()]
    if replaced:
        done = "will be replaced" if wish.overwrites else "stay; the new ones get a number"
        console.say(f"note: {len(replaced)} pictures of these names are there and {done}")


def encode(
    config: TrainConfig,
    family: ModelFamily,
    finished: Finished | None,
    strengths: Sequence[float],
    prompts: Sequence[str],
    accelerator: Accelerator,
    console: Console,
) -> dict[float, dict[str, dict[str, Tensor]]]:
    """Encode each prompt, without a batch axis, on the CPU, and let the text encoders go: once, or where they were trained at each strength."""
    encoders = TextEncoders(family, config.memory, accelerator.device, Path(config.data.cache_dir))
    texts = list(dict.fromkeys(prompts))
    size, hint = config.data.text_encoder_batch_size, "Set text_encoder_1_precision (and those of further encoders) to int8-quanto."
    rows = RowEncoder[Sequence[str]](encoders.encode, size, console.warn, noun="prompts", option="text_encoder_batch_size", hint=hint)
    effects = finished.put_on_text(encoders.get()) if finished else []
    encoded: dict[float, dict[str, dict[str, Tensor]]] = {}
    with console.bar("text embeddings", len(texts) * (len(strengths) if effects else 1), "prompts") as bar:
        counts = family.count_tokens(encoders.get(), texts)
        for strength in strengths:
            if encoded and not effects:
                encoded[strength] = encoded[strengths[0]]
                continue
            for effect in effects:
                effect.set_strength(strength)
            found: dict[str, dict[str, Tensor]] = {}
            while len(found) < len(texts):
                part = texts[len(found) : len(found) + rows.batch_size]
                found.update(zip(part, rows.rows(part)))
                bar.advance(len(part))
            encoded[strength] = found
    encoders.release()
    for prompt, count in zip(texts, counts):
        if count > family.text_tokens:
            console.warn(f"a prompt has {count} tokens, the model reads {family.text_tokens} ({prompt[:QUOTED_LETTERS]}...)")
    return encoded


def load_trained(
    wish: Wish, config: TrainConfig, family: ModelFamily, finished: Finished | None, assistant: Assistant, accelerator: Accelerator
) -> tuple[nn.Module, Effect]:
    """Load the denoiser in its final precision, move it, and put on it what was trained, as the run itself did where its settings are known."""
    if wish.trained is not None and (finished is None or finished.adapter is not None):
        adapter = build_adapter(config, family) if finished is None or finished.adapter is None else finished.adapter
        if finished is None and not adapter.trains_base:
            raise ConfigError(
                f"there is nothing in {wish.trained.path} that was trained", hint="Give the output folder of a run, or a checkpoint in it."
            )
        denoiser, *_ = attach_adapter(at_rest(config), family, adapter, accelerator, assistant)
        if pipeline_of(wish.trained) is None:
            adapter.load(wish.trained.path)
        return denoiser, adapter
    denoiser, device = load_frozen(config, family, accelerator, lambda text: None), accelerator.device
    assistant.attach(denoiser, device)
    effect = FileEffect(finished.changes, finished.rank_rule()) if finished else FileEffect({})
    effect.attach(denoiser, device)
    Offload(denoiser, config.memory, device)
    return denoiser, effect


def at_rest(config: TrainConfig) -> TrainConfig:
    """The same without what only training wants of a denoiser."""
    adapters = config.adapters.model_copy(update={"init_lora": None})
    return config.model_copy(update={"adapters": adapters, "memory": config.memory.model_copy(update={"gradient_checkpointing": False})})


def settings(wish: Wish, config: TrainConfig, family: ModelFamily, finished: Finished | None) -> dict[str, str]:
    """What the files say of the model and of what was trained; no absolute paths."""
    said = {"software": f"SimpleTuner {__version__}", "base_model": str(without_paths(family.source_name()))}
    if config.memory.base_model_precision != "no_change":
        said["base_model_precision"] = config.memory.base_model_precision
    if wish.trained is not None:
        said["adapter" if finished else "trained"] = str(without_paths(str(wish.trained.path)))
    step = finished.metadata().get("step") if finished else None
    return {**said, **({"step": step} if step else {})}


def render(
    renderer: Renderer,
    texts: Mapping[float, Mapping[str, Mapping[str, Tensor]]],
    jobs: Sequence[Job],
    said: Mapping[str, str],
    made: list[tuple[Job, Image.Image]],
    stop: StopRequest,
    console: Console,
) -> None:
    """Render and write picture by picture, so that whoever stops has those that are done.

    Args:
        texts: by strength, what prompts became.
        made: gets each picture.
        stop: waits while a picture is written.
    """
    jobs[0].file.parent.mkdir(parents=True, exist_ok=True)
    options = renderer.options
    with console.bar("pictures", len(jobs), "pictures") as bar:
        stepped = replace(renderer, after_step=lambda step: bar.advance(0, f"step {step} of {options.validation_num_inference_steps}"))
        for job in jobs:
            image = replace(stepped, text=texts[job.strength].__getitem__).render([job.picture], job.strength, lambda: None)[0]
            facts = {**facts_of(job.picture, renderer.family.options.model_family, options, job.strength), **said}
            with stop.deferred():
                write_picture(job.file, image, facts)
                made.append((job, image))
            bar.advance(1, job.file.name)


def compare(made: Sequence[tuple[Job, Image.Image]], strengths: Sequence[float], wish: Wish) -> None:
    """Lay pictures of several strengths side by side: a row a picture, a column a strength."""
    columns = [[image for job, image in made if job.strength == strength] for strength in strengths]
    rows = [job.picture.prompt for job, _ in made if job.strength == strengths[0]]
    file, number = wish.folder / "grid.png", 2
    while file.exists() and not wish.overwrites:
        file, number = wish.folder / f"grid-{number}.png", number + 1
    write_picture(file, grid(columns, [f"strength {strength:g}" for strength in strengths], rows), {})


def prompts_of(words: Sequence[str], file: Path | None, config: TrainConfig) -> dict[str, Prompt]:
    """Prompts as they were given, or else those that the run itself showed, by names that are fit for files.

    Args:
        file: a line a prompt; a .json file holds nicknames and prompts, as `user_prompt_library`.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    found: dict[str, Prompt] = {}
    if file is not None:
        for nickname, prompt in read_prompts(file).items():
            found[free_name(file_name_of(nickname), found)] = prompt
    for text in words:
        found[free_name(file_name_of(text)[:NAME_LETTERS], found)] = Prompt(text)
    found = found or named_prompts(config.validation)
    if not found:
        raise ConfigError("there is no prompt", hint='Give one: simpletuner generate "a photo of a lighthouse", or --prompts FILE.')
    return found


def read_prompts(file: Path) -> dict[str, Prompt]:
    """Read nicknames and prompts, or a line a prompt.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    if file.suffix == ".json":
        found = read_library(file)
    else:
        lines = enumerate(map(str.strip, read_lines(file)), start=1)
        found = {f"{number:03d}_{line[:NAME_LETTERS]}": Prompt(line) for number, line in lines if line}
    if not found:
        raise ConfigError(f"--prompts {file} has no prompt in it", hint="Write one in each line, or leave --prompts out.")
    return found


def read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts {file} cannot be read: {error}", hint="Give a UTF-8 text with a prompt in each line, or a .json file."
        ) from error

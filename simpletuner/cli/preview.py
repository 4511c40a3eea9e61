"""What `train --dry-run` prints: every option with its source, the datasets, and what would be loaded."""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.adapters.adapter import kind_of
from simpletuner.adapters.lycoris_file import read_lycoris
from simpletuner.cli.choices import family_of
from simpletuner.console import Console
from simpletuner.data.held_out import held_out_of, idle_notes
from simpletuner.data.plan import load_plan
from simpletuner.models.family import ModelFamily
from simpletuner.optim import catalogue, notes, rules, scaling
from simpletuner.options.load import DEFAULT, Loaded
from simpletuner.options.memory import TRAINED, WEIGHTS
from simpletuner.options.option import options_of
from simpletuner.options.train_config import SECTIONS, TrainConfig, declared
from simpletuner.reporting.custom import find_custom
from simpletuner.training.assistant_rules import assistant_notes
from simpletuner.training.prompts import named_prompts, parse_size, pictures
from simpletuner.training.starts import check_starts
from simpletuner.training.text_rules import check_text_training

USUAL_ALIGNMENT_PX = 64
"""What sizes are rounded to here when only the hub could say."""


def preview(loaded: Loaded, name: str, variables: Mapping[str, str], console: Console, *, lists_all: bool) -> None:
    """Print what a run would do, and refuse what it would refuse before it loads anything.

    Raises:
        ConfigError, DatasetError: as the run would.
    """
    config = loaded.config
    console.heading(f"Options, from {name}")
    show_options(loaded, console, lists_all=lists_all)
    family = family_of(config.models.model_family)(config.models)
    family.check_source()
    catalogue.find(config.optim.optimizer)
    if config.reporting.custom_tracker is not None:
        find_custom(config.reporting.custom_tracker)
    of_release = rules.check_release(config.optim) if config.adapters.model_type == "full" else []
    console.heading("Would load")
    console.facts(parts_of(config, family))
    alignment_px = family.alignment_px if knows_alignment(family) else USUAL_ALIGNMENT_PX
    plan = load_plan(config.data.data_backend_config, config.data, variables, alignment_px=alignment_px)
    held_out_of(config.validation, plan)
    console.heading("Datasets")
    text_notes = check_text_training(config, family)
    for line in plan.describe(caches_text=not text_notes, caches_latents=not config.data.vae_cache_disable):
        console.say(f"  {line}")
    console.say()
    of_model = (*family.notes(), *family.objective_notes(config.diffusion), *assistant_notes(config, family))
    of_data = (*plan.notes, *idle_notes(config.validation, config.data, plan))
    of_rate = (*notes.notes(config.optim), *scaling.scaling_notes(config.optim, config.training.images_per_step), *of_release)
    for note in (*loaded.notes, *of_model, *text_notes, *of_rate, *of_data):
        console.say(f"note: {note}")
    console.say("\nNothing was loaded or written, and no picture was opened: `simpletuner dataset check` does that. Without --dry-run this trains.")


def show_options(loaded: Loaded, console: Console, *, lists_all: bool) -> None:
    """List, section by section, what was set and by whom, and on demand the rest."""
    values = {**loaded.config.flat(), **{key: "(not shown)" for key in loaded.origins if declared()[key].is_secret and loaded.config.value(key)}}
    shown = [key for key in values if lists_all or loaded.origins[key] != DEFAULT]
    width = max(len(key) for key in shown)
    value_width = min(40, max(len(written(values[key])) for key in shown))
    for name, section in SECTIONS.items():
        mine = [key for key in options_of(section) if key in shown]
        if mine:
            console.say(f"  {name}", style="bold")
        for key in sorted(mine, key=lambda key: loaded.origins[key] == DEFAULT):
            origin = loaded.origins[key]
            console.say(f"    {key:<{width}}  {written(values[key]):<{value_width}}  {origin}", style="dim" if origin == DEFAULT else None)
    if not lists_all:
        console.say(f"  and {len(values) - len(shown)} defaults (--all lists them)", style="dim")


def written(value: object) -> str:
    """A value as it would stand in config.json."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def is_here(family: ModelFamily) -> bool:
    """Whether every part of the model is on this machine, so that asking for its facts asks no hub."""
    return family.source.is_here


def knows_alignment(family: ModelFamily) -> bool:
    return is_here(family) or (family.source.is_released and not any(family.source.is_replaced(part) for part in (family.denoiser_folder, "vae")))


def count_pictures(config: TrainConfig, family: ModelFamily) -> int:
    """How many pictures a validation would render.

    Raises:
        ConfigError: a size is none, or the model, if it is here, cannot take it; or it improves pictures and has none to start from.
    """
    if is_here(family):
        shown = pictures(config.validation, config.training.seed, family)
        check_starts(config, family, shown)
        return len(shown)
    options = config.validation
    prompts = {} if options.validation_disable else named_prompts(options)
    sizes = [parse_size(text, USUAL_ALIGNMENT_PX) for text in options.validation_resolution.split(",")]
    return len(prompts) * len(sizes) * options.num_validation_images


def parts_of(config: TrainConfig, family: ModelFamily) -> dict[str, str]:
    """The parts of the run and where each comes from."""
    models, memory, kind = config.models, config.memory, kind_of(config.adapters)
    replaced = models.pretrained_unet_model_name_or_path or models.pretrained_transformer_model_name_or_path
    precision = "" if memory.base_model_precision == "no_change" else f", quantised to {memory.base_model_precision}"
    dtype = WEIGHTS[memory.mixed_precision]
    full = TRAINED[rules.trains_in(config.optim, memory)] if kind == "full" else dtype
    held = f"{full}, computed with in {dtype}" if dtype != full else f"{dtype}{precision}"
    how = f"{'random ' if family.starts_random else ''}weights in {held}"
    adapter = "all weights"
    if kind == "lycoris":
        read = read_lycoris(config.adapters.lycoris_config)
        adapter = f"lycoris {read.recipe.algo} by {read.source}"
    elif kind in ("standard", "with_text"):
        adapter = f"plain LoRA of rank {config.adapters.lora_rank}{', on text encoders too' if kind == 'with_text' else ''}"
    shown = count_pictures(config, family)
    return {
        "model": f"{models.model_family} from {family.source_name()}",
        "text encoders": models.pretrained_t5_model_name_or_path or family.source_name(),
        "VAE": models.pretrained_vae_model_name_or_path or family.source_name() if family.source.has_vae else "none: trains on pixels",
        family.denoiser_folder: f"{replaced or family.source_name()}, {how}",
        "learns": adapter,
        "optimizer": config.optim.optimizer,
        "pictures": f"{shown} every {config.validation.validation_step_interval} steps" if shown else "none",
    }

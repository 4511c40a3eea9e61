"""What a run tells on the page of its model: gathered from its settings, its data and what it has come to."""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from simpletuner import __version__
from simpletuner.adapters.adapter import Adapter, Attached
from simpletuner.adapters.lycoris_file import FULL_DIMENSION, read_lycoris
from simpletuner.console import amount
from simpletuner.diffusion.denoising import Denoising
from simpletuner.models.family import ModelFamily
from simpletuner.models.hub import fetch_file
from simpletuner.models.source import is_local
from simpletuner.optim.scaling import scaled
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.model_card import MARK, CardFacts, CardPicture, tidy
from simpletuner.training.datasets import Datasets
from simpletuner.training.evaluations import FILE as LOSSES_FILE
from simpletuner.training.finish import triggers_of
from simpletuner.training.layouts import OWN
from simpletuner.training.prompts import Picture
from simpletuner.training.run_folder import without_paths
from simpletuner.training.validation import BASE_LABEL, SUFFIXES, step_of

PICTURES_SHOWN, TARGETS_SHOWN = 12, 12
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "lycoris-lora")
LYCORIS_SETTINGS = {"rank": "linear_dim", "alpha": "linear_alpha", "factor": "factor"}
ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa", "lora": "LoRA", "locon": "LoCon", "glora": "GLoRA", "tlora": "T-LoRA", "dylora": "DyLoRA"}
"""How people write what LyCORIS calls so."""
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class CardSource:
    """Where the facts of a run's page come from."""

    config: TrainConfig
    family: ModelFamily
    adapter: Adapter
    attached: Attached
    datasets: Datasets
    shown: Sequence[Picture]
    """What validation renders."""
    arguments: Mapping[str, object]
    """Of the plain pipeline's call."""
    total_steps: int

    def facts(self, step: int, folder: Path, inside: str = "", *, asks_hub: bool = False, is_end: bool = False) -> CardFacts:
        """What there is to tell after a step.

        Args:
            folder: holds what was trained by then.
            inside: which folder in it is to be used, as that of the averaged weights.
            asks_hub: whether the page of the base may be fetched for its licence.
            is_end: whether the run took no step after it.
        """
        config, family = self.config, self.family
        base, is_full = str(without_paths(family.source_name())), self.adapter.trains_base
        output_dir, starts_from_picture = Path(config.training.output_dir), "image" in self.arguments
        tag = "image-to-image" if starts_from_picture else "text-to-image"
        kind = self.kind()
        prompt = shlex.quote(tidy(next((picture.prompt for picture in self.shown), "your prompt")))
        return CardFacts(
            title=(config.hub.hub_model_id or "").rpartition("/")[2] or output_dir.resolve().name,
            family=config.models.model_family,
            base_on_hub=None if is_local(family.source_name()) or family.starts_random else family.source_name(),
            licence=licence_of(family, asks_hub=asks_hub),
            is_adapter=not is_full,
            what="a model of which all weights were trained" if is_full else f"a {kind}",
            progress=progress_of(step, self.total_steps, is_end=is_end),
            pipeline_tag=tag,
            tags=[tag, "diffusers", "simpletuner", config.models.model_family, *(["full"] if is_full else ["lora", *kind.lower().split()[:1]])],
            is_safe_for_work=config.hub.model_card_safe_for_work,
            triggers=triggers_of(self.datasets.plan),
            note=config.hub.model_card_note or "",
            pictures=self._pictures(step, output_dir / "validation_images"),
            snippet=self._snippet(base, f"{MARK}/{inside}" if inside else MARK),
            folder=str(without_paths(folder)),
            generate=f"simpletuner generate {prompt} --adapter {MARK}{f'/{inside}' if inside else ''}",
            trained=self._trained(kind),
            settings=self._settings(f"{step} of {self.total_steps}" if is_end and step < self.total_steps else str(self.total_steps)),
            datasets=self._data(),
            losses=losses_of(output_dir / LOSSES_FILE, step),
            versions={"SimpleTuner": __version__, "Python": platform.python_version(), **versions()},
        )

    def kind(self) -> str:
        """What is trained, by the name that people know."""
        options = self.config.adapters
        if options.model_type == "full":
            return "all weights"
        if options.lora_type == "lycoris":
            algorithm = read_lycoris(options.lycoris_config).recipe.algo
            return f"{ALGORITHMS.get(algorithm, algorithm)} (LyCORIS)"
        return "DoRA" if options.use_dora else "LoRA"

    def _snippet(self, base: str, folder: str) -> str | None:
        if not self.family.source.loads_by_name or self.config.adapters.lora_format != OWN:
            return None
        whole = folder if self.adapter.trains_base else base  # what all weights were trained of is written as a whole pipeline
        arguments = {name: without_paths(value) if name == "image" else value for name, value in self.arguments.items()}
        return self.adapter.snippet(self.family.pipeline_class, whole, arguments, folder)

    def _pictures(self, step: int, folder: Path) -> list[CardPicture]:
        """The newest picture of each prompt up to a step, and the base model's."""
        found: list[CardPicture] = []
        for picture in self.shown:
            shape = re.compile(rf"step_\d+(_ema)?_{re.escape(picture.file_stem)}({'|'.join(map(re.escape, SUFFIXES.values()))})")
            made = [path for path in folder.glob("step_*") if shape.fullmatch(path.name) and step_of(path.name) <= step]
            if not made or len(found) == PICTURES_SHOWN:
                continue
            newest = max(made, key=lambda path: (step_of(path.name), path.name))
            base = folder / f"{BASE_LABEL}_{picture.file_stem}{newest.suffix}"
            options = picture.options(self.config.validation)
            settings = f"{picture.size}, seed {picture.seed}, in {options.validation_num_inference_steps} steps"
            guidance = options.validation_guidance
            told = settings if guidance is None else f"{settings}, guidance {guidance:g}"
            found.append(CardPicture(picture.prompt, picture.negative_prompt, told, newest, base if base.is_file() else None))
        return found

    def _trained(self, kind: str) -> dict[str, str]:
        options, attached = self.config.adapters, self.attached
        rows = {"base model": str(without_paths(self.family.source_name())), "family": self.config.models.model_family, "trained": kind}
        if options.model_type == "lora" and options.lora_type == "lycoris":
            settings = read_lycoris(options.lycoris_config).recipe.settings
            known = {name: settings[key] for name, key in LYCORIS_SETTINGS.items() if settings.get(key) is not None}
            is_whole = known.get("rank", 0) >= FULL_DIMENSION  # and then alpha has no effect
            rows |= {"matrices": "whole"} if is_whole else {}
            rows |= {name: f"{value:g}" for name, value in known.items() if not (is_whole and name in ("rank", "alpha"))}
        elif options.model_type == "lora":
            alpha = options.lora_rank if options.lora_alpha is None else options.lora_alpha
            rows |= {"rank": str(options.lora_rank), "alpha": f"{alpha:g}"}
            rows |= {"dropout": f"{options.lora_dropout:g}"} if options.lora_dropout else {}
        if attached.layers:
            names = list(dict.fromkeys(short_name(layer) for layer in attached.layers))
            rows["layers"] = ", ".join([*names[:TARGETS_SHOWN], *(["..."] if len(names) > TARGETS_SHOWN else [])])
        rows["parameters"] = f"{amount(attached.parameters)} on {attached.modules} of {attached.modules_total} modules"
        return rows | ({"text encoders": "trained, too"} if options.train_text_encoder else {})

    def _settings(self, steps: str) -> dict[str, str]:
        config = self.config
        training, memory, diffusion, data = config.training, config.memory, config.diffusion, config.data
        optim = scaled(config.optim, training.images_per_step)
        process = self.family.process(diffusion)
        shift = "by the picture's size" if diffusion.flow_schedule_auto_shift else diffusion.flow_schedule_shift
        unit = {"pixel": "px on the shorter edge", "area": "megapixels", "pixel_area": "px, as area"}[data.resolution_type]
        batch = (training.train_batch_size, training.gradient_accumulation_steps, training.num_processes)
        return {
            "resolution": f"{data.resolution:g} {unit}",
            "steps": steps,
            "pictures a step": " x ".join(str(count) for count in batch) + " (batch x accumulation x processes)",
            "learning rate": f"{optim.learning_rate:g}, {optim.lr_scheduler}, {optim.lr_warmup_steps} steps of warm-up",
            "optimizer": optim.optimizer,
            "gradient norm": f"at most {optim.max_grad_norm:g}" if optim.max_grad_norm else "not limited",
            "precision": memory.mixed_precision if memory.mixed_precision != "no" else "fp32",
            **({"base in": memory.base_model_precision} if memory.base_model_precision != "no_change" else {}),
            "objective": process.prediction if isinstance(process, Denoising) else "flow matching",
            **({"shift": str(shift)} if shift is not None and not isinstance(process, Denoising) else {}),
            **({"snr_gamma": f"{diffusion.snr_gamma:g}"} if diffusion.snr_gamma else {}),
            "loss": diffusion.loss_type,
            "caption dropout": f"{data.caption_dropout_probability:g}",
            **({"average of the weights": f"decay {training.ema_decay:g}"} if training.use_ema else {}),
            "seed": str(training.seed),
        }

    def _data(self) -> list[dict[str, str]]:
        return [
            {
                "dataset": dataset.id + (" (regularisation)" if dataset.is_regularisation else ""),
                "pictures": str(facts.images),
                "repeats": str(facts.repeats),
                "captions": dataset.captions.strategy,
                "resolution": str(dataset.geometry),
                "buckets": ", ".join(f"{size} x{count}" for size, count in facts.buckets),
            }
            for (dataset, _), facts in zip(self.datasets.trained, self.datasets.facts(self.config.training.train_batch_size, {}))
        ]


def progress_of(step: int, total_steps: int, *, is_end: bool) -> str:
    """How far a run has come after a step, in words.

    Args:
        is_end: whether it took no step after it.
    """
    if step >= total_steps:
        return f"after {step} steps"
    return f"ended at {step} of {total_steps} steps" if is_end else f"after {step} of {total_steps} steps"


def licence_of(family: ModelFamily, *, asks_hub: bool) -> dict[str, str]:
    """What the page of the base says of its licence, where that page can be had; otherwise nothing, since a guess would bind nobody."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    location, revision = family.source_name(), family.options.revision
    try:
        if is_local(location):
            page: object = Path(location).expanduser() / "README.md"
        elif asks_hub:
            page = fetch_file(location, "README.md", revision)
        else:
            page = try_to_load_from_cache(location, "README.md", revision=revision)
        told = metadata_load(page) if isinstance(page, (str, Path)) and Path(page).is_file() else None
    except Exception:  # whatever is wrong with the network, or with somebody else's page: then it says nothing
        told = None
    found = {key: told[key] for key in LICENCE_KEYS if isinstance(told, dict) and isinstance(told.get(key), str)}
    return found if "license" in found else {}


def losses_of(file: Path, step: int) -> list[dict[str, str]]:
    """Held-out losses at the start, at best and now, a row a dataset."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a power failure cut it short
            continue
    rows = sorted((row for row in rows if row["step"] <= step), key=lambda row: row["step"])
    found = []
    for name in dict.fromkeys(key for row in rows for key in row if key.startswith("loss/val/") and "/noise_" not in key):
        known = [(row[name], row["step"]) for row in rows if name in row]
        told = {"first": known[0], "best": min(known), "last": known[-1]}
        figures = {column: f"{loss:.4f} (step {at})" for column, (loss, at) in told.items()}
        found.append({"dataset": name.removeprefix("loss/val/"), **figures})
    return found


def short_name(layer: str) -> str:
    """A layer's name without the blocks that it is in: `attn.to_q` of transformer_blocks.3.attn.to_q."""
    parts = layer.split(".")
    last_block = max((number for number, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[last_block + 1 :])


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

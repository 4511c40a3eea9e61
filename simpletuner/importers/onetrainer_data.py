"""OneTrainer's concepts as datasets, and its samples as prompts of validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.importers.importer import Imported
from simpletuner.importers.onetrainer_keys import CONCEPT, IMAGE, NO_EQUAL, SAMPLE, SILENT, TEXT
from simpletuner.importers.pictures import Look, count_pictures, new_name, use_looks
from simpletuner.importers.settings import Settings, beside, read_settings

STEP_PX = 64
SEPARATORS = {",": "comma", ".": "period", " ": "space"}
MASK_SUFFIX = "-masklabel.png"
MOST_VERSIONS = 4


def use_concepts(told: Settings, parts: Mapping[str, Settings], file: Path, found: Imported) -> int:
    """Write the datasets.

    Returns:
        Optimizer steps of an epoch, 0 if the folders are not here.
    """
    concepts = listed(told, "concepts", "concept_file_name", CONCEPT, file, found)
    if not concepts:
        found.lose("concepts: none are here; give them to a dataset in multidatabackend.json")
        found.datasets.append({"id": "concept", "type": "local", "instance_data_dir": "datasets/concept", "caption_strategy": "textfile"})
    draws: float | None = 0
    for concept in concepts:
        sizes = sizes_of(concept, told)
        if len(sizes) > 1:
            found.note(
                f"{len(sizes)} sizes: an epoch shows each picture at each of them here, at one of them there; divide num_train_epochs by {len(sizes)}"
            )
        for size in sizes:
            found.datasets.append(dataset(concept, size, len(sizes) > 1, told["aspect_ratio_bucketing"], found))
        count = count_pictures(concept["path"]) if concept["enabled"] and not concept["validation_concept"] else 0
        amount = concept["balancing"] if concept.says("balancing") else concept["repeats"]
        is_repeated = concept["balancing_strategy"] == "REPEATS"
        draws = None if draws is None or count is None else draws + len(sizes) * (count * amount if is_repeated else amount)
        concept.leave(found, NO_EQUAL, SILENT)
    config = found.config
    if any(entry.get("dataset_type") == "eval" for entry in found.datasets):
        evaluation(told, found)
    dropped = max((parts[name]["dropout_probability"] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")), default=0.0)
    config |= {"caption_dropout_probability": dropped, "aspect_bucket_alignment": STEP_PX}
    sizes = [entry["resolution"] for entry in found.datasets if "resolution" in entry]
    config |= {"resolution": sizes[0] if sizes else 512, "resolution_type": "pixel_area"}
    if told["masked_training"]:
        config["masked_loss_probability"] = round(1 - told["unmasked_probability"], 6)
        found.lose(f"masked_training: masks lie beside the pictures there (name{MASK_SUFFIX}); move them into a dataset of conditioning_type mask")
    batch = told.positive("batch_size") * told.positive("gradient_accumulation_steps")
    return math.ceil(draws / batch) if draws else 0


def evaluation(told: Settings, found: Imported) -> None:
    """When held-out pictures are looked at."""
    if not told["validation"]:
        found.config["eval_loss_disable"] = True
        return
    every = between(told, "validate_after", "eval_steps_interval", "eval_epoch_interval")
    found.config |= every or {}
    if every is None:
        found.lose(by_the_clock(told, "validate_after", "eval_steps_interval"))


def between(told: Settings, name: str, steps: str, epochs: str) -> dict[str, int] | None:
    """Options for the time between two events, or None if a clock counts it.

    Args:
        name: of the setting, beside which stands its unit. A step is a batch there; epochs are whole.
        steps: our option of optimizer steps.
        epochs: our option of epochs.
    """
    amount, unit = int(told[name]), told[f"{name}_unit"]
    if unit == "EPOCH":
        return {steps: 0, **({epochs: amount} if amount > 0 else {})}
    if unit == "STEP":
        return {steps: max(0, math.ceil(amount / told.positive("gradient_accumulation_steps")))}
    return {"NEVER": {steps: 0}, "ALWAYS": {steps: 1}}.get(unit)


def by_the_clock(told: Settings, name: str, option: str) -> str:
    return f"{name} {told[name]:g} {told[f'{name}_unit'].lower()}s: counted in steps or epochs here; set {option}"


def listed(told: Settings, name: str, file_name: str, known: Mapping[str, tuple[Any, Any]], file: Path, found: Imported) -> list[Settings]:
    """Parts that stand in the config, or in a file that it names."""
    if told.says(name):
        told.asked.add(file_name)
        return told.parts(name, known)
    told.asked.add(name)
    place = beside(told[file_name], file)
    if not place.is_file():
        if told.says(file_name):
            found.lose(f"{file_name} {told[file_name]}: it is not here")
        return []
    content = read_settings(place)
    return [Settings(item, known, f"{name}.", told.problems) for item in content if isinstance(item, Mapping)]


def sizes_of(concept: Settings, told: Settings) -> list[tuple[int, float]]:
    """Sizes as (edge of a square of the same area, width / height), of `768`, "768,1024" or "1024x768"."""
    image = concept.part("image", IMAGE)
    said = image["resolution_override"] if image["enable_resolution_override"] else told["resolution"]
    sizes = []
    for text in str(said).split(","):
        edges = [edge.strip() for edge in text.lower().split("x")]
        if not 1 <= len(edges) <= 2 or not all(edge.isdigit() and int(edge) for edge in edges):
            told.problems.append(f"resolution {said} is no size such as 768 or 1024x768")
            return []
        width, height = int(edges[0]), int(edges[-1])
        sizes.append((round(math.sqrt(width * height)), width / height))
    return sizes


def dataset(concept: Settings, size: tuple[int, float], is_one_of_several: bool, in_buckets: bool, found: Imported) -> dict[str, Any]:
    """One dataset at one size."""
    image, text = concept.part("image", IMAGE), concept.part("text", TEXT)
    folder, (edge, aspect) = concept["path"], size
    if not folder:
        concept.problems.append("concepts: one has no path")
    stem = concept["name"] or folder.rstrip("/")
    name = new_name(f"{stem}-{edge}" if is_one_of_several else stem, [entry["id"] for entry in found.datasets])
    entry: dict[str, Any] = {"id": name, "type": "local", "instance_data_dir": folder, "resolution": edge, "resolution_type": "pixel_area"}
    if aspect == 1 and not in_buckets:
        entry |= {"crop": True, "crop_aspect": "square", "crop_style": "center"}
    elif aspect != 1:
        entry |= {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [round(aspect, 2)], "crop_style": "center"}
    if concept["validation_concept"] or concept["type"] == "VALIDATION":
        entry["dataset_type"] = "eval"
    if not concept["enabled"]:
        entry["disabled"] = True
    entry |= captions_of(text, found)
    entry |= varied(text, concept["text_variations"], found)
    amount = concept["balancing"] if concept.says("balancing") else concept["repeats"]
    if concept["balancing_strategy"] != "REPEATS":
        entry["max_num_samples"] = max(1, int(amount))
        found.note(f"{name}, balancing {amount:g} samples: always the same ones here")
    elif amount >= 2:
        entry["repeats"] = round(amount) - 1
    if concept["balancing_strategy"] == "REPEATS" and amount != max(1, round(amount)):
        found.lose(f"concepts.balancing {amount:g}: pictures are shown {max(1, round(amount))} times; probability shows a dataset less often")
    if concept["type"] == "PRIOR_PREDICTION":
        entry["is_regularisation_data"] = True
    image.asked |= {"enable_crop_jitter", "enable_resolution_override", "resolution_override"}
    if image["enable_random_flip"]:
        found.lose(
            f"concepts.image.enable_random_flip true{'' if image.says('enable_random_flip') else ' by itself'}: {NO_EQUAL['enable_random_flip']}"
        )
    image.leave(found, NO_EQUAL, SILENT)
    text.leave(found, NO_EQUAL, SILENT)
    return entry


def captions_of(text: Settings, found: Imported) -> dict[str, Any]:
    """Captions in files beside the pictures, of one file for all, or in names."""
    source = text["prompt_source"]
    if source == "filename":
        return {"caption_strategy": "filename"}
    if source == "concept":
        place = Path(text["prompt_path"]).expanduser()
        if not place.is_file():
            found.lose(f"concepts.text.prompt_path {text['prompt_path']}: it is not here; write its lines into instance_prompt")
            return {"caption_strategy": "filename"}
        lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return {"caption_strategy": "instanceprompt", "instance_prompt": lines if len(lines) != 1 else lines[0]}
    if source != "sample":
        text.problems.append(f"concepts.text.prompt_source {source!r} is not one of sample, concept, filename")
    text.asked.add("prompt_path")
    return {"caption_strategy": "textfile"}


def varied(text: Settings, variations: int, found: Imported) -> dict[str, Any]:
    """How captions change from draw to draw."""
    made: dict[str, Any] = {}
    drops = text["tag_dropout_enable"] and text["tag_dropout_probability"]
    if text["enable_tag_shuffling"] or drops:
        if text["tag_delimiter"].strip() not in SEPARATORS and text["tag_delimiter"] != " ":
            found.lose(f"concepts.text.tag_delimiter {text['tag_delimiter']!r}: tags are split at commas, periods or blanks; it is a comma now")
        made["caption_shuffle"] = {
            "enable": text["enable_tag_shuffling"],
            "count": max(variations, MOST_VERSIONS),
            "include_original": False,
            "split_on": SEPARATORS.get(text["tag_delimiter"].strip() or " ", "comma"),
            "position_start": text["keep_tags_count"],
        }
    if drops:
        made["caption_tag_dropout"] = text["tag_dropout_probability"]
    text.asked |= {"keep_tags_count", "tag_delimiter", "tag_dropout_probability"}
    return made


def use_samples(told: Settings, file: Path, found: Imported) -> None:
    """Write the prompts of validation, and when they are rendered."""
    samples = [sample for sample in listed(told, "samples", "sample_definition_file_name", SAMPLE, file, found) if sample["enabled"]]
    looks = []
    for sample in samples:
        size = (sample["width"], sample["height"])
        looks.append(Look(sample["prompt"], sample["negative_prompt"], *size, sample["diffusion_steps"], sample["cfg_scale"], max(0, sample["seed"])))
        sample.leave(found, NO_EQUAL, SILENT)
    use_looks(found, looks)
    if not looks:
        return
    every = between(told, "sample_after", "validation_step_interval", "validation_epoch_interval")
    found.config |= every or {}
    if every is None:
        found.lose(by_the_clock(told, "sample_after", "validation_step_interval"))
    elif told["sample_skip_first"] and told["sample_after_unit"] in ("STEP", "EPOCH"):
        first, batches = told["sample_skip_first"], told.positive("gradient_accumulation_steps")
        is_step = told["sample_after_unit"] == "STEP"
        found.config |= {"validate_after_step": math.ceil(first / batches)} if is_step else {"validate_after_epoch": first}

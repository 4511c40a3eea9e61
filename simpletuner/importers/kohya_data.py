"""The datasets of kohya's sd-scripts: a dataset_config, DreamBooth folders such as `10_sks cat`, or one folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError
from simpletuner.importers.importer import Imported
from simpletuner.importers.kohya_flags import DATASET, NO_EQUAL, RENAMED, SILENT
from simpletuner.importers.pictures import captions, count_pictures, new_name
from simpletuner.importers.settings import Settings, beside, read_settings

REPEATED = re.compile(r"(\d+)_(.*)")
"""A DreamBooth folder: how often its pictures are shown, and their caption."""
SEPARATORS = {",": "comma", ".": "period", " ": "space"}
VERSIONS = 4
"""Of each caption whose tags vary: there each draw has an order of its own, here texts are encoded once."""
STEP_PX, LEAST_STEP_PX = 64, 8
FIRST_LINE_NOTE = "of a caption file with several lines the first is trained there; here each is an alternative: leave one"


@dataclass(frozen=True, slots=True)
class Epoch:
    """How long an epoch is, as far as the folders are here."""

    pictures: int | None
    """Draws, repeats included."""

    def steps(self, batch: int) -> int:
        """Optimizer steps at so many pictures each; 0 if it is not known."""
        return math.ceil(self.pictures / batch) if self.pictures else 0


def use_datasets(flags: Settings, file: Path | None, found: Imported) -> Epoch:
    """Write the datasets.

    Args:
        flags: of the script.
        file: the config that they stand in, beside which others may lie.

    Raises:
        ConfigError: the dataset_config cannot be read.
    """
    common = {RENAMED.get(name, name): value for name, value in flags.given.items() if RENAMED.get(name, name) in DATASET}
    flags.asked |= {name for name in flags.given if RENAMED.get(name, name) in DATASET}
    subsets: list[Settings] = []
    if flags["dataset_config"]:
        subsets = configured(beside(flags["dataset_config"], file), common, found, flags.problems)
        folders = ("train_data_dir", "reg_data_dir")
        for name in folders:
            if flags.says(name):
                found.lose(f"{name} {flags[name]}: has no effect beside dataset_config, there as here")
    elif flags["train_data_dir"]:
        for name in ("train_data_dir", "reg_data_dir"):
            if flags[name]:
                subsets += folders_in(flags[name], name == "reg_data_dir", common, found, flags.problems)
    else:
        flags.problems.append("there are no pictures: neither dataset_config nor train_data_dir is set")
    counts = {id(subset): count_pictures(str(subset["image_dir"])) for subset in subsets}
    trained = total(subsets, counts, is_reg=False)
    for subset in subsets:
        found.datasets.append(entry(subset, found, counts[id(subset)], trained, total(subsets, counts, is_reg=True)))
    share_settings(subsets, found)
    for subset in subsets:
        subset.leave(found, NO_EQUAL, SILENT)
    has_reg = any(subset["is_reg"] for subset in subsets)
    return Epoch(trained * 2 if trained and has_reg else trained)


def configured(path: Path, common: Mapping[str, Any], found: Imported, problems: list[str]) -> list[Settings]:
    """The subsets of a dataset_config; what a subset does not say, its dataset says, or [general], or the command."""
    content = read_settings(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list):
        raise ConfigError(f"{path} holds no datasets", hint="A dataset_config has [[datasets]] with [[datasets.subsets]] in them.")
    for name in content.keys() - {"general", "datasets"}:
        found.lose(f"{path.name}, {name}: unknown; a dataset_config has general and datasets")
    subsets: list[Settings] = []
    whole = Settings(content, {"general": (dict, {}), "datasets": (object, [])}, f"{path.name}, ", problems)
    for dataset in whole.parts("datasets", DATASET):
        shared = {**common, **whole["general"], **{name: value for name, value in dataset.given.items() if name != "subsets"}}
        subsets += [Settings({**shared, **subset.given}, DATASET, "", problems) for subset in dataset.parts("subsets", DATASET)]
    for subset in subsets:
        if not subset["image_dir"]:
            problems.append(f"{path}: a subset has no image_dir" + (f" (metadata_file {subset['metadata_file']})" if subset["metadata_file"] else ""))
    return subsets


def folders_in(folder: str, is_reg: bool, common: Mapping[str, Any], found: Imported, problems: list[str]) -> list[Settings]:
    """The subsets of a DreamBooth folder, each of which says in its name how often it is shown and what is in it."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        found.note(f"{folder} is not here, so folders such as 10_sks cat in it are not seen: it is one dataset now. Import again where it is")
        return [Settings({**common, "image_dir": folder, "is_reg": is_reg}, DATASET, "", problems)]
    subsets = []
    for inner in sorted(path for path in place.iterdir() if path.is_dir()):
        match = REPEATED.fullmatch(inner.name)
        if match and int(match[1]) > 0:
            own = {"image_dir": f"{folder.rstrip('/')}/{inner.name}", "class_tokens": match[2], "num_repeats": int(match[1]), "is_reg": is_reg}
            subsets.append(Settings({**common, **own}, DATASET, "", problems))
        else:
            found.lose(f"{folder}/{inner.name}: its name has no number of repeats, as in 10_sks cat; it is left out, there as here")
    if not subsets:  # fine_tune.py takes the pictures in the folder itself
        subsets.append(Settings({**common, "image_dir": folder, "is_reg": is_reg}, DATASET, "", problems))
    return subsets


def total(subsets: Sequence[Settings], counts: Mapping[int, int | None], is_reg: bool) -> int | None:
    """Draws of an epoch, repeats included; None if a folder is not here."""
    draws = [(counts[id(subset)], subset["num_repeats"]) for subset in subsets if bool(subset["is_reg"]) is is_reg]
    return None if any(count is None for count, _ in draws) else sum((count or 0) * repeats for count, repeats in draws)


def entry(subset: Settings, found: Imported, count: int | None, trained: int | None, kept: int | None) -> dict[str, Any]:
    """A dataset of ours.

    Args:
        count: pictures in its folder.
        trained: draws of an epoch of all that are no regularisation.
        kept: the same of those that are, before they are made as many.
    """
    folder = str(subset["image_dir"])
    name = new_name(folder, [dataset["id"] for dataset in found.datasets])
    made: dict[str, Any] = {"id": name, "type": "local", "instance_data_dir": folder}
    tokens = subset["class_tokens"]
    spare = " ".join(filter(None, (subset["caption_prefix"], tokens))) if tokens else None
    made |= captions(found, folder, subset["caption_extension"], spare)
    if made["caption_strategy"] == "textfile":
        found.note(FIRST_LINE_NOTE)
        if subset["caption_prefix"]:
            made |= {"instance_prompt": subset["caption_prefix"], "prepend_instance_prompt": True}
    made |= varied(subset, found) | shape(subset, found)
    repeats = subset["num_repeats"] - 1
    if subset["is_reg"]:
        repeats = regular(name, made, repeats, count, trained, kept, found)
    if repeats > 0:
        made["repeats"] = repeats
    return made


def regular(name: str, made: dict[str, Any], repeats: int, count: int | None, trained: int | None, kept: int | None, found: Imported) -> int:
    """Repeats of regularisation pictures, which are shown as often as the others, all of them together."""
    said = f"{name}: regularisation pictures are a dataset like the others, shown as often as these"
    found.note(f"{said}; is_regularisation_data in its entry would keep them as the base model has them instead, which is not what sd-scripts does")
    if not count or not trained or not kept:
        found.note(f"{name}: how many pictures there are is not known here; set its repeats so that it is shown as often as the others")
        return repeats
    wanted = max(1, round(trained * (count * (repeats + 1) / kept)))
    if wanted < count:
        made["max_num_samples"] = wanted
    return max(0, round(wanted / count) - 1)


def varied(subset: Settings, found: Imported) -> dict[str, Any]:
    """How captions change from draw to draw."""
    made: dict[str, Any] = {}
    dropped, separator = subset["caption_tag_dropout_rate"], subset["caption_separator"]
    if subset["shuffle_caption"] or dropped:
        if separator not in SEPARATORS:
            found.lose(f"caption_separator {separator!r}: tags are split at commas, periods or blanks; it is a comma now")
        made["caption_shuffle"] = {
            "enable": bool(subset["shuffle_caption"]),
            "count": VERSIONS,
            "include_original": False,
            "split_on": SEPARATORS.get(separator, "comma"),
            "position_start": subset["keep_tokens"],
        }
        found.note(f"captions vary in {VERSIONS} versions each, which are encoded before training; caption_shuffle.count makes more")
    if dropped:
        made["caption_tag_dropout"] = dropped
    if subset["enable_wildcard"]:
        made["caption_wildcards"] = True
    return made


def size_of(subset: Settings) -> tuple[int, int] | None:
    """Width and height that pictures are trained at, as `1024`, "1024,768" or [1024, 768] say it."""
    said = subset["resolution"]
    if said is None:
        return None
    parts = said if isinstance(said, list) else str(said).split(",")
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1:
        subset.problems.append(f"resolution {said} is neither a size nor a width and a height")
        return None
    return numbers[0], numbers[-1]


def shape(subset: Settings, found: Imported) -> dict[str, Any]:
    """Size, crop and batch of a dataset."""
    size = size_of(subset)
    made: dict[str, Any] = {}
    if size is None:
        subset.problems.append("resolution is missing")
    else:
        made |= {"resolution": round(math.sqrt(size[0] * size[1])), "resolution_type": "pixel_area"}
    style = "random" if subset["random_crop"] else "center"
    if not subset["enable_bucket"]:
        width, height = size or (1, 1)
        aspect = {"crop_aspect": "square"} if width == height else {"crop_aspect": "closest", "crop_aspect_buckets": [round(width / height, 2)]}
        made |= {"crop": True, "crop_style": style, **aspect}
        if subset["random_crop"]:
            found.note("crops are random, as there, but each image keeps its place; crops_per_image in multidatabackend.json gives it several")
    elif subset["random_crop"]:
        found.lose(
            "random_crop: with buckets only what rounding leaves over is cropped, in equal parts; set crop and crop_aspect preserve for a place"
        )
    made["train_batch_size"] = subset.positive("batch_size")
    return made


def share_settings(subsets: Sequence[Settings], found: Imported) -> None:
    """Write what is one for all datasets here: dropped captions, and the step of sides."""
    config = found.config
    rates = [subset["caption_dropout_rate"] for subset in subsets] or [0.0]
    config["caption_dropout_probability"] = rates[0]
    if len(set(rates)) > 1:
        found.lose(f"caption_dropout_rate {', '.join(f'{rate:g}' for rate in rates)}: one for all datasets here, {rates[0]:g}")
    steps = [subset["bucket_reso_steps"] if subset["enable_bucket"] else fixed_step(size_of(subset)) for subset in subsets] or [STEP_PX]
    config["aspect_bucket_alignment"] = min(steps)
    if len(set(steps)) > 1:
        found.lose(f"bucket_reso_steps {', '.join(map(str, steps))}: one for all datasets here, {min(steps)}")
    batches = [subset.positive("batch_size") for subset in subsets] or [1]
    config["train_batch_size"] = batches[0]
    sizes = [dataset.get("resolution") for dataset in found.datasets if dataset.get("resolution")]
    if sizes:
        config |= {"resolution": sizes[0], "resolution_type": "pixel_area"}
    if len(set(batches)) == 1:
        for dataset in found.datasets:
            dataset.pop("train_batch_size", None)


def fixed_step(size: tuple[int, int] | None) -> int:
    """The step of sides that have one size."""
    return STEP_PX if size is None or not (size[0] % STEP_PX or size[1] % STEP_PX) else LEAST_STEP_PX

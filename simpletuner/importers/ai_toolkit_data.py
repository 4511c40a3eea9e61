"""The datasets of ostris' ai-toolkit: folders, each at one resolution or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.importers.ai_toolkit_keys import DATASET, NO_EQUAL, SILENT
from simpletuner.importers.importer import Imported
from simpletuner.importers.pictures import captions, new_name
from simpletuner.importers.settings import Settings


def data(process: Settings, train: Settings, found: Imported) -> None:
    """The datasets, one for each resolution of a folder."""
    told, config = process.parts("datasets", DATASET), found.config
    if not told:
        process.problems.append("datasets: there are none")
    rates, steps = [], []
    for one in told:
        if not (one["folder_path"] or one["dataset_path"]):
            one.problems.append("datasets: one has no folder_path")
            continue
        sizes = one["resolution"] if isinstance(one["resolution"], list) else [one["resolution"]]
        for size in sizes:
            found.datasets.append(dataset(one, size, len(sizes) > 1, process, found))
            if one["mask_path"]:
                found.datasets.append(mask_of(found.datasets[-1], one["mask_path"]))
        rates.append(one["caption_dropout_rate"])
        steps.append(one["bucket_tolerance"])
        one.leave(found, NO_EQUAL, SILENT)
    config["caption_dropout_probability"] = rates[0] if rates else 0.0
    config["aspect_bucket_alignment"] = min(steps, default=64)
    config["train_batch_size"] = train.positive("batch_size")
    if len(set(rates)) > 1:
        found.lose(f"caption_dropout_rate {', '.join(f'{rate:g}' for rate in rates)}: one for all datasets here, {rates[0]:g}")
    sizes = [entry["resolution"] for entry in found.datasets if "resolution" in entry]
    config |= {"resolution": sizes[0] if sizes else 512, "resolution_type": "pixel_area"}


def dataset(one: Settings, size: Any, is_one_of_several: bool, process: Settings, found: Imported) -> dict[str, Any]:
    folder = str(one["folder_path"] or one["dataset_path"])
    suffix = f".{(one['caption_type'] or one['caption_ext']).lstrip('.')}"
    spare = one["default_caption"]
    trigger = one["trigger_word"] or process["trigger_word"]
    name = new_name(f"{folder.rstrip('/')}-{size}" if is_one_of_several else folder, [entry["id"] for entry in found.datasets])
    entry: dict[str, Any] = {"id": name, "type": "local", "instance_data_dir": folder, "resolution": size, "resolution_type": "pixel_area"}
    entry |= captions(found, folder, suffix, spare)
    if entry["caption_strategy"] == "textfile":
        entry["disable_multiline_split"] = True
    if trigger and entry["caption_strategy"] == "textfile":
        entry |= {"instance_prompt": trigger, "prepend_instance_prompt": True}
        found.note(f"trigger_word {trigger}: it stands before every caption; there before those alone that lack it, and in place of [trigger]")
    elif trigger and trigger not in entry["instance_prompt"]:
        entry["instance_prompt"] = f"{trigger} {entry['instance_prompt'].replace('[trigger]', trigger)}"
    if one["shuffle_tokens"] or one["token_dropout_rate"]:
        shuffle = {"enable": bool(one["shuffle_tokens"]), "count": 4, "include_original": False, "position_start": one["keep_tokens"]}
        entry["caption_shuffle"] = shuffle
        found.note("captions vary in 4 versions each, which are encoded before training; caption_shuffle.count makes more")
    if one["token_dropout_rate"]:
        entry["caption_tag_dropout"] = one["token_dropout_rate"]
    if not one["buckets"] or one["square_crop"]:
        entry |= {"crop": True, "crop_aspect": "square", "crop_style": "random" if one["random_crop"] else "center"}
    if one["num_repeats"] > 1:
        entry["repeats"] = one["num_repeats"] - 1
    if one["is_reg"]:
        found.note(f"{name}: regularisation pictures are a dataset like the others; there they are drawn at every other step (probability)")
    return entry


def mask_of(entry: Mapping[str, Any], folder: str) -> dict[str, Any]:
    kind = {"dataset_type": "conditioning", "conditioning_type": "mask", "source_dataset_id": entry["id"]}
    return {"id": f"{entry['id']}-masks", "type": "local", **kind, "instance_data_dir": folder}

"""Spellings of `multidatabackend.json` that are still read, and keys of other versions of the tool that have no effect here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.errors import nearest

SPELLINGS = {
    "disable": "disabled",
    "instance_data_root": "instance_data_dir",
    "is_regularization_data": "is_regularisation_data",
}
"""Old key to new."""
VALUES = {
    ("crop_style", "centre"): "center",
    ("caption_strategy", "instance_prompt"): "instanceprompt",
    ("caption_strategy", "webshart"): "webdataset",
    ("type", "webshart"): "webdataset",
}
"""Other spellings of values."""

SECRET = frozenset({"aws_access_key_id", "aws_secret_access_key"})
"""Keys whose values no message shows."""

LATER = "is not available yet"

OFF = ("", "false", "no", "off", "0", "0.0", "none", "[]", "{}")
Idle = Mapping[str, tuple[tuple[str, ...], str]]
"""Key to the values that ask for nothing (in lower case), and what to say of any other."""


def idle(reason: str, keys: str, *also_off: str) -> dict[str, tuple[tuple[str, ...], str]]:
    return dict.fromkeys(keys.split(), ((*also_off, *OFF), reason))


IDLE: Idle = {
    **idle("has no effect: the index reads what changed and nothing else", "skip_file_discovery preserve_data_backend_cache"),
    **idle(
        "has no effect: this place has no table beside its images",
        "metadata_backend",
        *("discovery", "json", "filesystem", "csv", "huggingface", "webshart", "webdataset"),
    ),
    **idle("has no effect: cache names are always digests", "hash_filenames", "true"),
    **idle("has no effect: an index is named by its dataset's id", "cache_file_suffix"),
    **idle("has no effect: every image is checked when it is first seen", "scan_for_errors", "true"),
    **idle(
        "has no effect: unusable images are skipped and counted, none is deleted",
        "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    ),
    **idle("is one setting for the whole run: write it in config.json", "vae_cache_ondemand vae_cache_disable"),
    **idle("belongs into a text_embeds entry, where it holds for every dataset that uses it", "caption_filter_list"),
    **idle(LATER, "vae_cache_clear_each_epoch max_upscale_threshold slider_strength timestep_sampling_offset"),
    **idle(LATER, "disable_after_epoch_step"),
    **idle(LATER, "conditioning conditioning_image_embeds video audio"),
    **idle(
        "belongs to datasets of another type",
        """
        conditioning_data conditioning_type source_dataset_id
        instance_data_dir parquet huggingface dataset_name split revision image_column caption_column streaming source
        csv_file csv_caption_column csv_url_column csv_cache_dir
        aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id aws_secret_access_key aws_data_prefix
        """,
    ),
    **idle("has no effect: tar shards are indexed here, where they lie", "webshart metadata"),
    **idle(LATER, "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo"),
}
"""Keys without effect in an image dataset."""

IDLE_CACHE: Idle = {
    **IDLE,
    **idle("has no effect: entries are written as they are made", "write_batch_size", "128"),
    **idle("is one setting for the whole run: write it in config.json", "text_encoder_batch_size"),
    **idle(LATER, "text_cache_ondemand text_cache_disable"),
}
"""Keys without effect in an entry that says where a cache is kept."""


def tidy(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Drop comments and what stands for nothing (null, an empty string), and write the rest in today's spelling."""
    kept: dict[str, Any] = {}
    for key, value in entry.items():
        if key.startswith(("_", "//", "#")) or value is None or value == "":
            continue
        name = SPELLINGS.get(key, key)
        kept[name] = VALUES.get((name, value), value) if isinstance(value, str) else tidy(value) if isinstance(value, dict) else value
    return kept


def set_aside(entry: dict[str, Any], known: frozenset[str], without_effect: Idle) -> tuple[list[str], list[str]]:
    """Take out of `entry` every key that is not in `known`.

    Returns:
        Notes on known keys without effect that ask for something, and problems with unknown ones.
    """
    notes, problems = [], []
    for key in [key for key in entry if key not in known]:
        value = entry.pop(key)
        if key not in without_effect:
            best = nearest(key, [*known, *without_effect, *SPELLINGS])
            problems.append(f"unknown key {key!r}" + (f"; did you mean {SPELLINGS.get(best, best)!r}?" if best else ""))
        elif str(value).lower() not in without_effect[key][0]:
            notes.append(f"{key} {without_effect[key][1]}")
    return notes, problems

"""A whole pipeline with what was trained baked in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.applying import apply_changes
from simpletuner.adapters.ranks import all_ranks_note, has_ranks_by_time
from simpletuner.console import Console
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.compare import compare
from simpletuner.training.export import text_answers
from simpletuner.training.finished import Finished
from simpletuner.training.probe import clean_text, make_probe, text_probe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_adapter(finished: Finished, folder: Path, dtype: str, console: Console) -> None:
    """Write a pipeline with the adapter in its denoiser's weights, and say how near its answer is to the trained model's.

    The change is added in float32, whatever the weights are written in: 16 bits lose small changes only at the end.

    Raises:
        SimpleTunerError: the pipeline does not answer as the trained model does.
    """
    if has_ranks_by_time(finished.changes):
        console.say(all_ranks_note("a weight"))
    probe = make_probe(finished.family, finished.config.diffusion)
    base = finished.base()
    plain = probe(base)
    apply_changes(base, finished.changes)
    finished.family.save_pipeline(base.to(DTYPES[dtype]), folder, merged_text(finished, DTYPES[dtype]))
    del base
    trained = probe(finished.trained())
    again = _read_back(finished.family, folder)
    written = [compare(plain, trained, probe(again.load_denoiser(torch.float32, 0)))]
    texts = text_answers(finished)
    if texts is not None:
        written.append(compare(*texts, text_probe(again, clean_text(again))))
    said = "; ".join(one.said(what) for one, what in zip(written, ("one denoiser call", "one prompt")))
    console.say(f"{folder} is a whole pipeline; {said}")
    if dtype == "float32" and not all(one.is_equal for one in written):
        raise SimpleTunerError(f"the pipeline in {folder} does not answer as the trained model does", hint="Please report this with the config.")


def merged_text(finished: Finished, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoders with what was trained on them in their weights, by their folders; none, if nothing was."""
    if not finished.text:
        return {}
    encoders = clean_text(finished.family)
    networks = finished.family.text_networks(encoders)
    for one in finished.text:
        apply_changes(networks[one.layout.folder], one.changes)
    return {folder: encoder.to(dtype) for folder, encoder in finished.family.adaptable_encoders(encoders).items()}


def merge_full(path: Path, config: TrainConfig, folder: Path, dtype: str, console: Console) -> None:
    """Write a pipeline around a denoiser of which all weights were trained, from a checkpoint or a run's own pipeline."""
    family = build_family(config)
    if (path / "pipeline").is_dir():
        family = type(family)(config.models.at_folder(path / "pipeline"))
        denoiser = family.load_denoiser(torch.float32, 0)
    else:
        adapter = build_adapter(config, family)
        if not adapter.trains_base:
            raise ConfigError(f"there is nothing in {path} that was trained", hint="Give the output folder of a run, or a checkpoint in it.")
        denoiser = family.load_denoiser(torch.float32, seed_from("model", config.training.seed))
        adapter.attach(denoiser)
        adapter.load(path)
    family.save_pipeline(denoiser.to(DTYPES[dtype]), folder)
    console.say(f"{folder} is a whole pipeline")


def _read_back(family: ModelFamily, folder: Path) -> ModelFamily:
    """The family of a pipeline in `folder`."""
    return type(family)(family.options.at_folder(folder))

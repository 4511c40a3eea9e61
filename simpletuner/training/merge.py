"""A whole pipeline with what was trained baked in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.applying import apply_changes
from simpletuner.console import Console
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.assemble import build_adapter, build_family
from simpletuner.training.compare import compare
from simpletuner.training.finished import Finished
from simpletuner.training.probe import make_probe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_adapter(finished: Finished, folder: Path, dtype: str, console: Console) -> None:
    """Write a pipeline with the adapter in its denoiser's weights, and say how near its answer is to the trained model's.

    The change is added in float32, whatever the weights are written in: 16 bits lose small changes only at the end.

    Raises:
        SimpleTunerError: the pipeline does not answer as the trained model does.
    """
    probe = make_probe(finished.family, finished.config.diffusion)
    base = finished.base()
    plain = probe(base)
    apply_changes(base, finished.changes)
    finished.family.save_pipeline(base.to(DTYPES[dtype]), folder)
    del base
    trained = probe(finished.trained())
    written = compare(plain, trained, probe(_read_back(finished.family, folder)))
    console.say(f"{folder} is a whole pipeline; {written.said()}")
    if dtype == "float32" and not written.is_equal:
        raise SimpleTunerError(f"the pipeline in {folder} does not answer as the trained model does", hint="Please report this with the config.")


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


def _read_back(family: ModelFamily, folder: Path) -> nn.Module:
    """The denoiser as a pipeline in `folder` has it, in float32."""
    return type(family)(family.options.at_folder(folder)).load_denoiser(torch.float32, 0)

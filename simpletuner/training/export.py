"""Write an adapter in the layout of other software, and read it back as that software does."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simpletuner.adapters import weights
from simpletuner.adapters.applying import Applied, apply_file
from simpletuner.adapters.changes import Changes, algorithm_of, rank_of, scale_of
from simpletuner.adapters.formats import diffusers as diffusers_format
from simpletuner.adapters.kinds.lycoris import apply_as_the_library
from simpletuner.adapters.reading import shown
from simpletuner.console import Console
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.training.compare import Comparison, compare
from simpletuner.training.finished import Finished
from simpletuner.training.probe import make_probe

FORMATS = ("diffusers", "kohya", "comfyui", "lycoris")
OF_OTHER_LAYOUTS = ("lora_adapter_metadata", "lycoris_config", "modelspec.hash_sha256", "sshs_model_hash")
"""What a header says of the layout that it was written in, and of nothing else."""
PLAIN_NETWORK, LYCORIS_NETWORK = "networks.lora", "lycoris.kohya"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a reader made of a file."""

    reader: str
    layers: int
    missing: tuple[str, ...]
    """Layers that were trained and that the reader left as they were."""
    unused: tuple[str, ...]
    """Keys of the file that meant nothing to it."""
    comparison: Comparison

    @property
    def is_good(self) -> bool:
        return not self.missing and not self.unused and self.comparison.is_equal

    def said(self) -> str:
        keys = "no key missing or unused"
        if self.missing or self.unused:
            keys = "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in (("missing", self.missing), ("unused", self.unused)) if names)
        return f"{self.reader} reads {self.layers} layers, {keys}; {self.comparison.said()}"


def export(finished: Finished, layout: str, file: Path, checks: bool, console: Console, *, overwrites: bool = False) -> None:
    """Write an adapter to `file` in a layout of `FORMATS`; the file appears when it is whole, and checked.

    Args:
        checks: whether to read it back; a file that its reader does not understand never gets its name.
        overwrites: take the place of a file of that name.

    Raises:
        ConfigError: the layout cannot hold this adapter, or there is such a file.
        SimpleTunerError: the check failed.
    """
    if file.resolve() == finished.file.resolve():
        raise ConfigError(f"{file} is the adapter itself", hint="Give another --output.")
    if file.exists() and not overwrites:
        raise ConfigError(f"{file} is there already", hint="Give another --output, or --overwrite.")
    writer = importlib.import_module(f"simpletuner.adapters.formats.{layout}")
    tensors: Mapping[str, Tensor] = writer.write(finished.changes, finished.layout)
    if layout == "comfyui" and (doubtful := computed_otherwise(finished.changes)):
        console.say(
            f"note: ComfyUI may compute {', '.join(doubtful)} otherwise than the LyCORIS library, by whose formulas --check goes: see docs/exports.md"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.stem}.{os.getpid()}.safetensors")  # its readers go by the suffix
    try:
        weights.write(staged, tensors, {**header(finished.metadata(), finished.changes, layout), **_peft(finished, layout)})
        size = staged.stat().st_size
        if checks:
            checked = check(finished, layout, staged)
            console.say(checked.said())
            if not checked.is_good:
                raise SimpleTunerError(
                    f"{file} would not be what was trained to {checked.reader}, and was not kept", hint="Use another format; and please report this."
                )
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)
    console.say(f"{file}: {len(finished.changes)} layers, {len(tensors)} tensors, {size / 1e6:.1f} MB")


def computed_otherwise(changes: Changes) -> list[str]:
    """Kinds of changes in an adapter of which ComfyUI's arithmetic is not surely the library's."""
    found = {algorithm_of(parts) for parts in changes.values()} & {"glora", "oft", "full"}
    return sorted(found | ({"DoRA"} if any("dora_scale" in parts for parts in changes.values()) else set()))


def header(said: Mapping[str, str], changes: Changes, layout: str) -> dict[str, str]:
    """What a file says of itself: what the run's own file said, and the network's size where kohya's scripts look for it."""
    kept = {key: value for key, value in said.items() if key not in OF_OTHER_LAYOUTS}
    algorithms = sorted({algorithm_of(parts) for parts in changes.values()})
    ranks = [(rank, rank * (1.0 if layout == "diffusers" else scale_of(parts))) for parts in changes.values() if (rank := rank_of(parts))]
    network = {"ss_network_module": PLAIN_NETWORK if algorithms == ["lora"] else LYCORIS_NETWORK}
    if ranks:
        rank, alpha = max(set(ranks), key=ranks.count)
        network |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if algorithms != ["lora"]:
        network["ss_network_args"] = json.dumps({"algo": algorithms[0]})
    return {**kept, "format": "pt", **network}


def _peft(finished: Finished, layout: str) -> dict[str, str]:
    if layout != "diffusers":
        return {}
    return {"lora_adapter_metadata": diffusers_format.settings(finished.changes, finished.layout)}


def check(finished: Finished, layout: str, file: Path) -> Checked:
    """Let the layout's reader put a file on a clean model, and compare one call of it with the trained model's.

    One model is in memory at a time.
    """
    probe = make_probe(finished.family, finished.config.diffusion)
    plain, trained = probe(finished.base()), probe(finished.trained())
    denoiser = finished.base()
    applied, reader = READERS[layout](finished, denoiser, file)
    return Checked(
        reader=reader,
        layers=len(applied.layers),
        missing=tuple(sorted(set(finished.changes) - applied.layers)),
        unused=applied.unused,
        comparison=compare(plain, trained, probe(denoiser)),
    )


def _by_diffusers(finished: Finished, denoiser: nn.Module, file: Path) -> tuple[Applied, str]:
    """`load_lora_weights` of the family's pipeline."""
    pipeline = finished.family.pipeline(denoiser, None, finished.config.diffusion)  # type: ignore[arg-type]  # nothing is sampled
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    folder = finished.layout.folder
    loaded = {name for name, _ in denoiser.named_parameters() if ".lora_" in name}
    keys = {f"{folder}.{name}".replace(".default_0", "").replace("magnitude_vector.weight", "magnitude_vector") for name in loaded}
    unused = [key for key in weights.read(file) if key not in keys]
    return Applied(frozenset(name.split(".lora_")[0] for name in loaded), tuple(unused)), f"{type(pipeline).__name__}.load_lora_weights"


def _by_lycoris(finished: Finished, denoiser: nn.Module, file: Path) -> tuple[Applied, str]:
    return apply_as_the_library(file, denoiser), "lycoris.create_lycoris_from_weights"


def _by_names(layout: str, reader: str) -> Callable[[Finished, nn.Module, Path], tuple[Applied, str]]:
    def read(finished: Finished, denoiser: nn.Module, file: Path) -> tuple[Applied, str]:
        names: Any = importlib.import_module(f"simpletuner.adapters.formats.{layout}").name_layers(finished.layout)
        return apply_file(denoiser, weights.read(file), names), reader

    return read


READERS: dict[str, Callable[[Finished, nn.Module, Path], tuple[Applied, str]]] = {
    "diffusers": _by_diffusers,
    "lycoris": _by_lycoris,
    "kohya": _by_names("kohya", "the key map of kohya's scripts"),
    "comfyui": _by_names("comfyui", "the key map of ComfyUI"),
}

"""Write an adapter in the layout of other software, and read it back as that software does."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simpletuner.adapters import weights
from simpletuner.adapters.applying import Applied, apply_file
from simpletuner.adapters.changes import SPELLINGS, Changes, algorithm_of, rank_of, scale_of
from simpletuner.adapters.formats import comfyui as comfyui_format
from simpletuner.adapters.formats import diffusers as diffusers_format
from simpletuner.adapters.kinds.lycoris import apply_as_the_library
from simpletuner.adapters.kinds.standard import apply_with_peft
from simpletuner.adapters.ranks import LYCORIS_SETTINGS, all_ranks_note, has_ranks_by_time
from simpletuner.adapters.reading import shown, take_apart
from simpletuner.console import Console
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.training.compare import Comparison, compare
from simpletuner.training.finished import Finished
from simpletuner.training.probe import clean_text, make_probe, text_probe

FORMATS = ("diffusers", "kohya", "comfyui", "lycoris")
OF_OTHER_LAYOUTS = ("lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "ss_network_dim", "ss_network_alpha", "ss_network_args")
"""What a header says of the layout that it was written in, and of nothing else."""
Reader = Callable[[Finished, nn.Module, Any, Path], tuple[Applied, str]]
"""Puts a file on a denoiser and, where there are some, on text encoders."""
IN_PEFT = re.compile(r"\.lo(?:ra|kr)_")
"""What stands before the name of a tensor that PEFT puts beside a layer's own."""
OTHER_WAYS = "Use --format lycoris, or bake the adapter into a pipeline with `simpletuner merge`."
PLAIN_NETWORK, LYCORIS_NETWORK = "networks.lora", "lycoris.kohya"
LIBRARY_MASKS_NOTHING = (
    "note: this was trained with T-LoRA. The file says how its ranks follow the time, which simpletuner reads; the LyCORIS library uses all of them "
    "unless it is told at each step (set_timestep_mask), as the lines do that the run ended with"
)


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
    text: Comparison | None = None
    """Of text embeddings, where text encoders were trained."""

    @property
    def is_good(self) -> bool:
        return not self.missing and not self.unused and self.comparison.is_equal and (self.text is None or self.text.is_equal)

    def said(self) -> str:
        keys = "no key missing or unused"
        if self.missing or self.unused:
            keys = "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in (("missing", self.missing), ("unused", self.unused)) if names)
        text = f"; {self.text.said('one prompt')}" if self.text else ""
        return f"{self.reader} reads {self.layers} layers, {keys}; {self.comparison.said()}{text}"


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
    if has_ranks_by_time(finished.changes):
        console.say(LIBRARY_MASKS_NOTHING if finished.rank_rule() else all_ranks_note("the file"))
    if layout == "comfyui" and (doubtful := computed_otherwise(finished.changes)):
        console.say(
            f"note: ComfyUI may compute {', '.join(doubtful)} otherwise than the LyCORIS library, by whose formulas --check goes: see docs/exports.md"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.stem}.{os.getpid()}.safetensors")  # its readers go by the suffix
    try:
        count = write(finished, layout, staged)
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
    layers = len(finished.changes) + sum(len(one.changes) for one in finished.text)
    console.say(f"{file}: {layers} layers, {count} tensors, {size / 1e6:.1f} MB")


def write(finished: Finished, layout: str, file: Path) -> int:
    """Write an adapter in a layout of `FORMATS`.

    Returns:
        How many tensors it has there.

    Raises:
        ConfigError: the layout cannot hold this adapter.
    """
    writer = importlib.import_module(f"simpletuner.adapters.formats.{layout}")
    if layout == "lycoris" and finished.text:
        raise ConfigError(
            "format lycoris cannot hold LoRAs of text encoders: the library puts a file on one network",
            hint="Use --format diffusers, kohya or comfyui.",
        )
    tensors: dict[str, Tensor] = writer.write(finished.changes, finished.layout)
    for one in finished.text:
        tensors |= writer.write(one.changes, one.layout)
    weights.write(file, tensors, {**header(finished.metadata(), tensors, layout), **_peft(finished, layout)})
    return len(tensors)


def computed_otherwise(changes: Changes) -> list[str]:
    """Kinds of changes in an adapter of which ComfyUI's arithmetic is not surely the library's."""
    found = {algorithm_of(parts) for parts in changes.values()} & {"glora", "oft", "full"}
    return sorted(found | ({"DoRA"} if any("dora_scale" in parts for parts in changes.values()) else set()))


def header(said: Mapping[str, str], tensors: Mapping[str, Tensor], layout: str) -> dict[str, str]:
    """What a file says of itself: what the run's own file said, and the size of the network in this file, where kohya's scripts look for it."""
    dropped = OF_OTHER_LAYOUTS if layout == "lycoris" else (*OF_OTHER_LAYOUTS, LYCORIS_SETTINGS)
    kept = {key: value for key, value in said.items() if key not in dropped}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, part = take_apart(key)
        layers.setdefault(name, {})[SPELLINGS.get(part, part)] = value
    algorithms = sorted({algorithm_of(parts) for parts in layers.values()})
    ranks = [(rank, rank * scale_of(parts)) for parts in layers.values() if (rank := rank_of(parts))]
    network = {"ss_network_module": PLAIN_NETWORK if algorithms == ["lora"] else LYCORIS_NETWORK}
    if ranks:
        rank, alpha = max(set(ranks), key=ranks.count)
        network |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if algorithms != ["lora"]:
        network["ss_network_args"] = json.dumps({"algo": algorithms[0]})
    return {**kept, "format": "pt", **network}


def _peft(finished: Finished, layout: str) -> dict[str, str]:
    if layout != "diffusers" or diffusers_format.is_lokr(finished.changes):  # of LoKr diffusers finds the settings by the shapes
        return {}
    settings: dict[str, Any] = json.loads(diffusers_format.settings(finished.changes, finished.layout))
    for one in finished.text:
        settings |= json.loads(diffusers_format.settings(one.changes, one.layout))
    return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}


def check(finished: Finished, layout: str, file: Path) -> Checked:
    """Let the layout's reader put a file on a clean model, and compare one call of it with the trained model's.

    One model is in memory at a time.
    """
    probe = make_probe(finished.family, finished.config.diffusion)
    plain, trained = probe(finished.base()), probe(finished.trained())
    texts = text_answers(finished)
    denoiser, encoders = finished.base(), clean_text(finished.family) if finished.text else None
    applied, reader = READERS[layout](finished, denoiser, encoders, file)
    trained_layers = set(finished.changes).union(*(one.named() for one in finished.text))
    return Checked(
        reader=reader,
        layers=len(applied.layers),
        missing=tuple(sorted(trained_layers - applied.layers)),
        unused=applied.unused,
        comparison=compare(plain, trained, probe(denoiser)),
        text=compare(*texts, text_probe(finished.family, encoders)) if texts else None,
    )


def text_answers(finished: Finished) -> tuple[Tensor, Tensor] | None:
    """What the base's text encoders make of a prompt, and the trained ones; None if they were not trained."""
    if not finished.text:
        return None
    plain = text_probe(finished.family, clean_text(finished.family))
    encoders = clean_text(finished.family)
    finished.put_on_text(encoders)
    return plain, text_probe(finished.family, encoders)


def _by_diffusers(finished: Finished, denoiser: nn.Module, encoders: Any, file: Path) -> tuple[Applied, str]:
    """`load_lora_weights` of the family's pipeline, or PEFT where it has none."""
    folder, family, reader = finished.layout.folder, finished.family, "PEFT"
    if family.pipeline_loads_lora:
        pipeline = family.pipeline(denoiser, None, finished.config.diffusion)  # type: ignore[arg-type]  # nothing is sampled
        pipeline.register_modules(**(family.adaptable_encoders(encoders) if encoders else {}))
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        except ValueError as error:  # among others of LoKr whose factors PEFT does not find again
            raise SimpleTunerError(f"{type(pipeline).__name__}.load_lora_weights does not read it: {error}", hint=OTHER_WAYS) from error
        reader = f"{type(pipeline).__name__}.load_lora_weights"
    else:
        apply_with_peft(file, denoiser, folder)
    networks = {folder: denoiser, **(family.text_networks(encoders) if encoders else {})}
    loaded = {f"{place}.{name}" for place, network in networks.items() for name, _ in network.named_parameters() if IN_PEFT.search(name)}
    named = (re.sub(r"\.default(_0)?(\.|$)", r"\2", name) for name in loaded)
    keys = {name.replace("magnitude_vector.weight", "magnitude_vector") for name in named}
    unused = [key for key in weights.read(file) if key not in keys]
    return Applied(frozenset(IN_PEFT.split(name)[0].removeprefix(f"{folder}.") for name in loaded), tuple(unused)), reader


def _by_lycoris(finished: Finished, denoiser: nn.Module, encoders: Any, file: Path) -> tuple[Applied, str]:
    return apply_as_the_library(file, denoiser), "lycoris.create_lycoris_from_weights"


def _by_names(layout: str, reader: str) -> Reader:
    def read(finished: Finished, denoiser: nn.Module, encoders: Any, file: Path) -> tuple[Applied, str]:
        tensors, module = weights.read(file), importlib.import_module(f"simpletuner.adapters.formats.{layout}")
        ignored = comfyui_format.ignored(tensors, finished.layout) if layout == "comfyui" else []
        applied = apply_file(denoiser, {key: value for key, value in tensors.items() if key not in ignored}, module.name_layers(finished.layout))
        layers, unused = set(applied.layers), applied.unused
        networks = finished.family.text_networks(encoders) if encoders else {}
        for one in finished.text:
            on_text = apply_file(networks[one.layout.folder], {key: tensors[key] for key in unused}, module.name_layers(one.layout))
            layers |= {f"{one.layout.folder}.{layer}" for layer in on_text.layers}
            unused = on_text.unused
        return Applied(frozenset(layers), (*unused, *ignored)), reader

    return read


READERS: dict[str, Reader] = {
    "diffusers": _by_diffusers,
    "lycoris": _by_lycoris,
    "kohya": _by_names("kohya", "the key map of kohya's scripts"),
    "comfyui": _by_names("comfyui", "the key map of ComfyUI"),
}

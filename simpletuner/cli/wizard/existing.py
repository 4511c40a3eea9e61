"""A config that is there already: its answers, and its texts with other answers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.cli.wizard.files import LAYERS, LYCORIS, OF_DATASET
from simpletuner.cli.wizard.json_text import REMOVED, change
from simpletuner.data.plan import load_plan
from simpletuner.errors import ConfigError
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import declared, spellings
from simpletuner.relaxed_json import load_relaxed, parse_relaxed

WHERE = "instance_data_dir"
HEEDED = ("attention_mechanism", "sageattention_usage")
"""Options that are not asked, and that pitfalls are known of."""


@dataclass(frozen=True, slots=True)
class Existing:
    """A config and the files that it names, as they are."""

    path: Path
    text: str
    written: Mapping[str, str]
    """Keys of options to how they are spelled in the file."""
    datasets: Path
    datasets_text: str
    position: int
    """Of the first dataset of pictures in a folder, in the list."""
    entry: Mapping[str, Any]
    """That dataset as the file has it."""
    lycoris: Path | None = None
    lycoris_text: str = ""
    answers: Mapping[str, Any] = field(default_factory=dict)
    """What the files say, and where they say nothing the defaults that hold, by key."""

    @property
    def new_lycoris(self) -> Path:
        """Where the settings of a lycoris adapter go if there were none."""
        return self.path.parent / LYCORIS

    def changed(self, answers: Mapping[str, Any], dropped: set[str], new_lycoris: str = "") -> dict[Path, str]:
        """The texts with other answers; what stays as it is, keys that nobody knows and comments among it, is not touched.

        Args:
            dropped: keys that no longer mean anything.
            new_lycoris: the file of the lycoris adapter that it has now, which counts if it had none.
        """
        config: dict[tuple[Any, ...], Any] = {(self.written[key],): REMOVED for key in sorted(dropped) if key in self.written}
        datasets: dict[tuple[Any, ...], Any] = {}
        lycoris: dict[tuple[Any, ...], Any] = {}
        for key, value in answers.items():
            if value == self.answers.get(key) or key in dropped:
                continue
            if key == "pictures":
                datasets[(self.position, WHERE)] = value
            elif key in ("lokr_factor", "lokr_layers"):
                lycoris |= self._lycoris_change(key, value)
            elif key in self.entry or (key in OF_DATASET and key not in self.written):
                datasets[(self.position, key)] = value
            elif key in declared():
                config[(self.written.get(key, key),)] = REMOVED if value in (None, "") else value
        if new_lycoris and not self.lycoris:
            config[(self.written.get("lycoris_config", "lycoris_config"),)] = self.new_lycoris.as_posix()
        texts = {self.path: change(self.text, config), self.datasets: change(self.datasets_text, datasets)}
        if self.lycoris:
            texts[self.lycoris] = change(self.lycoris_text, lycoris)
        elif new_lycoris:
            texts[self.new_lycoris] = new_lycoris
        return texts

    def _lycoris_change(self, key: str, value: Any) -> dict[tuple[Any, ...], Any]:
        preset = self._lycoris.get("apply_preset")
        if key == "lokr_layers":
            return (
                {("apply_preset", "target_module"): LAYERS[value]}
                if isinstance(preset, dict)
                else {("apply_preset",): {"target_module": LAYERS[value]}}
            )
        found: dict[tuple[Any, ...], Any] = {("factor",): value}
        by_class = preset.get("module_algo_map", {}) if isinstance(preset, dict) else {}
        for name, settings in by_class.items():
            if isinstance(settings, dict) and "factor" in settings:
                factor = max(1, value // 2) if name == "FeedForward" else value
                found[("apply_preset", "module_algo_map", name, "factor")] = factor
        return found

    @property
    def _lycoris(self) -> dict[str, Any]:
        found = parse_relaxed(self.lycoris_text or "{}", str(self.lycoris))
        return found if isinstance(found, dict) else {}


def open_existing(path: Path, loaded: Loaded, asked: list[str], variables: Mapping[str, str]) -> Existing:
    """Read a config that is there.

    Args:
        loaded: what its options come to.
        asked: keys of the options that the wizard asks.

    Raises:
        ConfigError: it is no JSON, or has no dataset of pictures in a folder.
    """
    if path.suffix != ".json":
        raise ConfigError(
            f"{path} is no JSON, and the wizard changes no other files", hint="Change it by hand; `simpletuner options` explains every key."
        )
    raw = load_relaxed(path)
    assert isinstance(raw, dict), "it was loaded before"
    written = {spellings().get(bare, bare): key for key in raw if (bare := key.lstrip("-").replace("-", "_")) in {*declared(), *spellings()}}
    data = loaded.config.data
    load_plan(data.data_backend_config, data, variables, alignment_px=8, checks_places=False)  # says all that is wrong with it
    datasets = load_relaxed(data.data_backend_config)
    assert isinstance(datasets, list), "it was read before"
    position = next((number for number, entry in enumerate(datasets) if is_folder(entry)), None)
    if position is None:
        raise ConfigError(f"{data.data_backend_config} has no dataset of pictures in a folder", hint="The wizard changes no other datasets.")
    entry = datasets[position]
    values = {key: plain(loaded.config.value(key)) for key in (*asked, *HEEDED) if key in declared()}
    values |= {key: entry[key] for key in values if key in entry}
    values["pictures"] = str(entry[WHERE])
    values["model_flavour"] = values.get("model_flavour") or ""
    values["minimum_image_size"] = values.get("minimum_image_size") or 0
    lycoris = loaded.config.adapters.lycoris_config if loaded.config.adapters.lora_type == "lycoris" else None
    lycoris_text = lycoris.read_text(encoding="utf-8-sig") if lycoris and lycoris.is_file() else ""
    values |= of_lycoris(lycoris_text, str(lycoris)) if lycoris_text else {}
    return Existing(
        path=path,
        text=path.read_text(encoding="utf-8-sig"),
        written=written,
        datasets=data.data_backend_config,
        datasets_text=data.data_backend_config.read_text(encoding="utf-8-sig"),
        position=position,
        entry=entry,
        lycoris=lycoris if lycoris_text else None,
        lycoris_text=lycoris_text,
        answers=values,
    )


def is_folder(entry: Any) -> bool:
    """Whether an entry of the datasets is one of pictures in a folder."""
    return isinstance(entry, dict) and WHERE in entry and entry.get("dataset_type", "image") == "image" and not entry.get("disabled")


def of_lycoris(text: str, name: str) -> dict[str, Any]:
    """The answers that a file for a LoKr holds; none of another algorithm."""
    raw = parse_relaxed(text, name)
    if not isinstance(raw, dict) or str(raw.get("algo", "")).lower() != "lokr" or "factor" not in raw:
        return {}
    preset = raw.get("apply_preset")
    targets = preset.get("target_module", LAYERS["attention+feedforward"]) if isinstance(preset, dict) else LAYERS["attention+feedforward"]
    layers = next((name for name, classes in LAYERS.items() if sorted(classes) == sorted(targets)), None)
    return {"lokr_factor": raw["factor"], **({"lokr_layers": layers} if layers else {})}


def plain(value: Any) -> Any:
    """An option's value as JSON knows it."""
    return value.as_posix() if isinstance(value, Path) else value

"""Where the parts of a model come from: a repository on the hub or a local folder, in diffusers layout.

A part is one folder of that layout: transformer, vae, text_encoder, tokenizer, scheduler. HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE mean what they mean to huggingface_hub, which does the downloads (`models/hub.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError, choose
from simpletuner.models.hub import fetch_file, fetch_files

if TYPE_CHECKING:
    from simpletuner.options.models import Models

INDEX_FILE = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")
"""What weight files are called: by diffusers, by transformers."""


@dataclass(frozen=True)
class Part:
    """One part of a model and where it lies. Its files are on this machine once a method has asked for them."""

    name: str
    """Its folder in diffusers layout."""
    location: str
    """Hub id, local folder, or a config.json where a config is all that is wanted."""
    subfolders: tuple[str, ...]
    """Where to look inside, in order; "" is the location itself."""
    revision: str | None = None
    variant: str | None = None
    """Taken where there is one, e.g. fp16; the plain files otherwise, as diffusers' pipelines do."""

    def __str__(self) -> str:
        return f"{self.name} of {self.location}"

    @property
    def has_weights(self) -> bool:
        return not self.name.startswith(("tokenizer", "scheduler"))

    @property
    def config_name(self) -> str:
        if self.has_weights:
            return "config.json"
        return "scheduler_config.json" if self.name.startswith("scheduler") else "tokenizer_config.json"

    def config(self) -> dict[str, Any]:
        """Read the part's configuration, and of a hub part fetch nothing else."""
        return read_json(self._place[1])

    def folder(self) -> Path:
        """The local folder with the part's files, downloaded if they are not here."""
        subfolder, config = self._place
        if not is_local(self.location) and not self._has_files(config.parent):
            # Of the commit that the configuration is of: the cache keeps a commit's files in a folder of its name.
            commit = config.parents[len(Path(subfolder).parts)].name
            for allowed, ignored in self._patterns(f"{subfolder}/" if subfolder else ""):
                fetch_files(self.location, commit, allowed, ignored)
                if self._has_files(config.parent):
                    break
        return config.parent

    def files(self) -> dict[str, Path]:
        """The files that the part is read from, by name: configuration and weights, or all files of a tokenizer.

        Raises:
            ConfigError: one is missing; says what there is.
        """
        folder = self.folder()
        if self.has_weights:
            names = [self.config_name, *self.weights()[1]]
        else:
            names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        return {name: folder / name for name in names}

    def weights(self) -> tuple[str | None, list[str]]:
        """The variant that there is, and the names of its files."""
        folder = self.folder()
        found = find_weights(folder, self.variant)
        if found is None:
            raise ConfigError(
                f"the {self} has no weights in safetensors, or not all shards of them; there is {_contents(folder)}", hint=_weights_hint(folder)
            )
        return found

    @cached_property
    def _place(self) -> tuple[str, Path]:
        """The sub-folder that holds the configuration, and the configuration."""
        root = Path(self.location).expanduser()
        if root.is_file() and root.suffix == ".json":
            return "", root
        names = [(subfolder, f"{subfolder}/{self.config_name}" if subfolder else self.config_name) for subfolder in self.subfolders]
        for subfolder, name in names:
            path = root / name if root.is_dir() else fetch_file(self.location, name, self.revision)
            if path is not None and path.is_file():
                return subfolder, path
        raise ConfigError(
            f"{self.location} has no {self.name}: there is no {' and no '.join(name for _, name in names)}",
            hint=f"It has {_contents(root)}." if root.is_dir() else "Is it a model in diffusers layout? Single checkpoint files are not read.",
        )

    def _patterns(self, prefix: str) -> Iterator[tuple[list[str], list[str]]]:
        """What to fetch from the hub, and what of it to leave there; one pair after the other, until there is something."""
        if not self.has_weights:
            yield [f"{prefix}*"], []
            return
        indexes = [f"{prefix}{stem}.safetensors.index*.json" for stem in STEMS]
        if self.variant:
            yield [*indexes, *(f"{prefix}{stem}.{self.variant}*.safetensors" for stem in STEMS)], []
        variants = [f"{prefix}{stem}.*.safetensors" for stem in STEMS]
        yield [*indexes, *(f"{prefix}{stem}*.safetensors" for stem in STEMS)], variants

    def _has_files(self, folder: Path) -> bool:
        """Whether an earlier download is complete. A tokenizer's list of files is known to the hub alone."""
        found = find_weights(folder, self.variant) if self.has_weights else None
        return found is not None and found[0] == self.variant


class Source:
    """Where a run takes its model from, as its options say."""

    def __init__(self, options: Models, flavours: Mapping[str, str]) -> None:
        """
        Raises:
            ConfigError: no such flavour.
        """
        self.options = options
        self._flavours = flavours
        if options.model_flavour is not None and options.model_flavour not in flavours:
            raise ConfigError(
                f"model_flavour {options.model_flavour!r} is not a flavour of {options.model_family}",
                hint=choose(options.model_flavour, flavours, "flavours"),
            )
        self.location = options.pretrained_model_name_or_path or flavours[options.model_flavour or next(iter(flavours))]
        self._parts: dict[str, Part] = {}
        self._replaced = {
            "transformer": (options.pretrained_transformer_model_name_or_path, options.pretrained_transformer_subfolder),
            "unet": (options.pretrained_unet_model_name_or_path, options.pretrained_unet_subfolder),
            "vae": (options.pretrained_vae_model_name_or_path, None),
        }

    def part(self, name: str) -> Part:
        """Say where a part lies: in the model, or where an option of its own points."""
        if name not in self._parts:
            location, subfolder = self._replaced.get(name, (None, None))
            if location is None:
                self._parts[name] = Part(name, self.location, (name,), self.options.revision, self.options.variant)
            else:
                # revision belongs to the model's repository; one that replaces a part of it has its own history.
                self._parts[name] = Part(name, location, (name, "") if subfolder is None else (subfolder,), None, self.options.variant)
        return self._parts[name]

    @property
    def flavour(self) -> str | None:
        """The flavour that was chosen or, where a path was, the one that it is."""
        released = {location: name for name, location in self._flavours.items()}
        return self.options.model_flavour or released.get(self.location)

    @property
    def is_released(self) -> bool:
        """Whether the model is one of the flavours as their makers publish them."""
        return self.location in self._flavours.values() and not is_local(self.location)

    def is_replaced(self, name: str) -> bool:
        return self._replaced.get(name, (None, None))[0] is not None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The model's own list of its parts, model_index.json."""
        root = Path(self.location).expanduser()
        path = root / INDEX_FILE if root.is_dir() else fetch_file(self.location, INDEX_FILE, self.options.revision)
        if path is None or not path.is_file():
            raise ConfigError(f"{self.location} has no {INDEX_FILE}", hint=f"It has {_contents(root)}." if root.is_dir() else None)
        return read_json(path)

    def class_of(self, name: str) -> type[Any]:
        """The class that the model's index names for a part, from diffusers or transformers."""
        import diffusers
        import transformers

        library, class_name = self.index.get(name) or (None, None)
        module = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
        if module is None or not hasattr(module, str(class_name)):
            raise ConfigError(
                f"{INDEX_FILE} of {self.location} says that its {name} is a {class_name} of {library}, which is not installed",
                hint="The model may need a newer release of that library.",
            )
        found: type[Any] = getattr(module, str(class_name))
        return found


def is_local(location: str) -> bool:
    """Tell a path of this machine, there or not, from a hub id."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", location) and Path(location).suffix not in (".safetensors", ".gguf", ".json")
    return not is_id or Path(location).expanduser().exists()


def find_weights(folder: Path, variant: str | None) -> tuple[str | None, list[str]] | None:
    """Find a part's weights: one file, or an index and its shards; of the variant if there is one, plain otherwise.

    Returns:
        The variant found and the names of its files; None if there are none, or a shard is missing.
    """
    for found in dict.fromkeys((variant, None)):
        dot = f".{found}" if found else ""
        for stem in STEMS:
            single, index = f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"
            if (folder / single).is_file():
                return found, [single]
            if (folder / index).is_file():
                shards = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
                if shards and all((folder / shard).is_file() for shard in shards):
                    return found, [index, *shards]
    return None


def _weights_hint(folder: Path) -> str:
    names = [path.name for path in folder.iterdir()]
    variants = sorted({match[1] for name in names if (match := re.fullmatch(rf"(?:{'|'.join(STEMS)})\.(\w+)(?:-\d.*)?\.safetensors", name))})
    if variants:
        return f"Set variant to {' or '.join(variants)}."
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in names):
        return "Pickled weights run code when they are read; save the model again with safe_serialization=True."
    return f"Download the whole folder; it should hold {STEMS[0]}.safetensors or {STEMS[1]}.safetensors."


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a model's file of settings."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", hint="Download the model again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object", hint="Download the model again.")
    return value


def _contents(folder: Path) -> str:
    names: Sequence[str] = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:20]) or "nothing in it"

"""Where the parts of a model come from: a repository on the hub or a local folder, in diffusers layout, or a single file.

A part is one folder of that layout: transformer, vae, text_encoder, tokenizer, scheduler. HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE mean what they mean to huggingface_hub, which does the downloads (`models/hub.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError, choose
from simpletuner.models.files import STEMS, contents, find_weights, read_json, weights_hint
from simpletuner.models.hub import fetch_file, fetch_files
from simpletuner.models.recognise import Shapes
from simpletuner.models.single_file import Checkpoint, checkpoint_here, is_address, is_single_file, open_checkpoint
from simpletuner.models.t5 import OPTION as T5_OPTION
from simpletuner.models.t5 import TOKENIZER_FILES, encoder_class, is_of_tokenizer, tokenizer_class

if TYPE_CHECKING:
    from simpletuner.options.models import Models

INDEX_FILE = "model_index.json"
WEIGHTLESS = ("tokenizer", "scheduler")
"""How the names of parts begin that hold settings alone."""
NO_VAE = "none"
"""What pretrained_vae_model_name_or_path is set to for a model that works on pixels."""
CHECKPOINT_NAME = "checkpoint.safetensors"
"""What a single file is called in a part's list of files, so that its own name makes no difference."""


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
    checkpoint: Checkpoint | None = None
    """The single file that its weights are in; its configuration is of `location` all the same."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What holds in place of what its configuration says."""

    def __str__(self) -> str:
        return f"{self.name} of {self.checkpoint.name if self.checkpoint else self.location}"

    @property
    def has_weights(self) -> bool:
        return not self.name.startswith(WEIGHTLESS)

    @property
    def config_name(self) -> str:
        if self.has_weights:
            return "config.json"
        return "scheduler_config.json" if self.name.startswith("scheduler") else "tokenizer_config.json"

    def config(self) -> dict[str, Any]:
        """Read the part's configuration, and of a hub part fetch nothing else."""
        return {**read_json(self._place[1]), **self.changes}

    def folder(self) -> Path:
        """The local folder with the part's files, downloaded if they are not here; weights in a single file are not among them."""
        subfolder, config = self._place
        if not is_local(self.location) and self.checkpoint is None and not self._has_files(config.parent):
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
        if self.checkpoint is not None:
            return {self.config_name: folder / self.config_name, CHECKPOINT_NAME: self.checkpoint.path}
        if self.has_weights:
            names = [self.config_name, *self.weights()[1]]
        else:
            names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
            names = names if self._place[0] else [name for name in names if is_of_tokenizer(name)]
        return {name: folder / name for name in names}

    def weights(self) -> tuple[str | None, list[str]]:
        """The variant that there is, and the names of its files."""
        folder = self.folder()
        found = find_weights(folder, self.variant)
        if found is None:
            raise ConfigError(
                f"the {self} has no weights in safetensors, or not all shards of them; there is {contents(folder)}", hint=weights_hint(folder)
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
            hint=f"It has {contents(root)}."
            if root.is_dir()
            else "Is it a model in diffusers layout? A single file is set by its own path or address.",
        )

    def _patterns(self, prefix: str) -> Iterator[tuple[list[str], list[str]]]:
        """What to fetch from the hub, and what of it to leave there; one pair after the other, until there is something."""
        if not self.has_weights:
            yield [f"{prefix}*"] if prefix else list(TOKENIZER_FILES), []
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

    def __init__(
        self,
        options: Models,
        flavours: Mapping[str, str],
        t5_parts: Sequence[str] = (),
        *,
        denoiser: str = "transformer",
        text_prefixes: Mapping[str, str | tuple[str, ...]] | None = None,
        flavours_of: Callable[[Shapes], Sequence[str]] = lambda shapes: (),
    ) -> None:
        """
        Args:
            t5_parts: names of the parts that are a T5 and its tokenizer.
            denoiser: name of the part that is trained.
            text_prefixes: what stands before the names of each text encoder in a single file.
            flavours_of: tells of the denoiser in a single file which flavours it may be of, the one first whose settings are taken.

        Raises:
            ConfigError: no such flavour, or a T5 in a single file.
        """
        t5 = options.pretrained_t5_model_name_or_path
        if t5 is not None and is_single_file(t5):
            raise ConfigError(f"{T5_OPTION} {t5} is a single file", hint="Set a hub id or a folder with config.json and tokenizer.")
        self.options = options
        self._flavours = flavours
        if options.model_flavour is not None and options.model_flavour not in flavours:
            raise ConfigError(
                f"model_flavour {options.model_flavour!r} is not a flavour of {options.model_family}",
                hint=choose(options.model_flavour, flavours, "flavours"),
            )
        self.location = options.pretrained_model_name_or_path or flavours[options.model_flavour or next(iter(flavours))]
        self.denoiser = denoiser
        self._text_prefixes, self._flavours_of = text_prefixes or {}, flavours_of
        self._parts: dict[str, Part] = {}
        self._opened: dict[str, Checkpoint] = {}
        self._replaced = {
            "transformer": (options.pretrained_transformer_model_name_or_path, options.pretrained_transformer_subfolder),
            "unet": (options.pretrained_unet_model_name_or_path, options.pretrained_unet_subfolder),
            "vae": (options.pretrained_vae_model_name_or_path, None),
            **dict.fromkeys(t5_parts, (t5, None)),
        }
        self._t5_parts = t5_parts if t5 is not None else ()

    def part(self, name: str) -> Part:
        """Say where a part lies: in the model, or where an option of its own points.

        Raises:
            ConfigError: a single file that should hold it does not.
        """
        if name not in self._parts:
            self._parts[name] = self._find(name)
        return self._parts[name]

    def _find(self, name: str) -> Part:
        variant = self.options.variant
        location, subfolder = self._replaced.get(name, (None, None))
        if location is not None and not is_single_file(location):
            # revision belongs to the model's repository; one that replaces a part of it has its own history.
            return Part(name, location, (name, "") if subfolder is None else (subfolder,), None, variant)
        revision = None if is_single_file(self.location) else self.options.revision
        part = Part(name, self.base, (name,), revision, variant)
        if name == "scheduler":
            return replace(part, changes=self._schedule())
        checkpoint = self.checkpoint if location is None else self._open(location, name)
        return replace(part, checkpoint=checkpoint) if checkpoint is not None and checkpoint.names_of(name) else part

    def knows(self, name: str) -> bool:
        """Whether it is known where a part lies; of a single file on the hub that is not here, only the file itself can say."""
        location = self._replaced.get(name, (None, None))[0] or self.location
        return not (is_single_file(location) and is_address(location)) or checkpoint_here(location) is not None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The single file that the model is, fetched if it is not here; None for a model in diffusers layout.

        Raises:
            ConfigError: it cannot be read, or is of another family.
        """
        return self._open(self.location) if is_single_file(self.location) else None

    @cached_property
    def base(self) -> str:
        """The model in diffusers layout that gives all that a single file does not hold; the model itself if it is in that layout."""
        if not is_single_file(self.location):
            return self.location
        if self.options.single_file_base_model:
            return self.options.single_file_base_model
        found = self._flavours_of(self.checkpoint.denoiser) if self.checkpoint else ()
        flavour = self.options.model_flavour or next(iter(found), None)
        return self._flavours.get(flavour or "", next(iter(self._flavours.values())))

    def denoiser_checkpoint(self) -> Checkpoint | None:
        """The single file that the denoiser is from, if it is from one."""
        replacing = self._replaced[self.denoiser][0]
        if replacing is not None:
            return self._open(replacing) if is_single_file(replacing) else None
        return self.checkpoint

    def _schedule(self) -> Mapping[str, Any]:
        checkpoint = self.denoiser_checkpoint()
        return {} if checkpoint is None else checkpoint.schedule

    def _open(self, location: str, part: str = "") -> Checkpoint:
        """Open a single file that should hold a denoiser of this family, or that part; errors name the option that points to it."""
        try:
            return self._opened_for(location, part)
        except ConfigError as error:
            option = "pretrained_model_name_or_path" if location == self.location else f"pretrained_{part or self.denoiser}_model_name_or_path"
            raise ConfigError(f"{option}: {error.message}", hint=error.hint) from error

    def _opened_for(self, location: str, part: str) -> Checkpoint:
        if location not in self._opened:
            self._opened[location] = open_checkpoint(location, self._text_prefixes)
        # One file may be given for two parts: what it should hold is asked each time.
        checkpoint, family = self._opened[location], self.options.model_family
        kind = checkpoint.kind
        if part == "vae" and not checkpoint.names_of("vae"):
            raise ConfigError(f"{location} holds no VAE: it is {kind.title}", hint="pretrained_vae_model_name_or_path takes a file that holds one.")
        if part != "vae" and kind.family != family:
            hint = f"Set model_family to {kind.family}." if kind.family else kind.hint
            raise ConfigError(f"{location} is {kind.title}; model_family {family} cannot be trained from it", hint=hint)
        if part != "vae":
            self._check_flavour(checkpoint)
        return checkpoint

    def _check_flavour(self, checkpoint: Checkpoint) -> None:
        """Refuse a denoiser that is of another flavour than the one asked for, or than the model that it should be put into.

        Raises:
            ConfigError: says of which it is.
        """
        released = None if is_single_file(self.location) else {location: name for name, location in self._flavours.items()}.get(self.location)
        asked, found = self.options.model_flavour or released, self._flavours_of(checkpoint.denoiser)
        if asked is None or not found or asked in found:
            return
        said = f"model_flavour is {asked}" if self.options.model_flavour else f"{self.location}, the model that it would go into, is {asked}"
        names = " or ".join(found)
        raise ConfigError(f"{checkpoint.name} is {checkpoint.kind.title} of flavour {names}, and {said}", hint=f"Set model_flavour to {names}.")

    @property
    def flavour(self) -> str | None:
        """The flavour that was chosen or, where a path was, the one that it is."""
        released = {location: name for name, location in self._flavours.items()}
        return self.options.model_flavour or (released.get(self.base) if self.knows("") else None)

    @property
    def is_released(self) -> bool:
        """Whether the model is one of the flavours as their makers publish them."""
        return self.location in self._flavours.values() and not is_local(self.location)

    def notes(self, parts: Sequence[str]) -> list[str]:
        """Settings without effect, and what of the parts a single file gives, a sentence each. Asks nothing of the hub."""
        options, is_file = self.options, is_single_file(self.location)
        found = []
        if options.single_file_base_model and not is_file:
            found.append("single_file_base_model has no effect: the model is in diffusers layout")
        if options.revision and is_file:
            found.append(f"revision has no effect: {self.location} is a single file, whose address names its revision")
        elif options.revision and is_local(self.location):
            found.append(f"revision has no effect: {self.location} is a folder of this machine")
        if options.variant and not is_file and is_local(self.location) and not self._has_variant(parts):
            found.append(f"variant has no effect: no part of {self.location} has files of variant {options.variant}")
        if is_file and self.knows(""):
            mine = [name for name in parts if not self.is_replaced(name) and self.part(name).checkpoint is not None]
            rest = [name for name in parts if name not in mine and not self.is_replaced(name)]
            found.append(f"{', '.join(mine)} from {self.location}; {', '.join(rest)} from {self.base}")
            assert self.checkpoint is not None
            found += self.checkpoint.idle_notes(parts)
        return found

    def _has_variant(self, parts: Sequence[str]) -> bool:
        """Whether a part of a folder on this machine has files of the variant."""
        names = [name for name in parts if not name.startswith(WEIGHTLESS) and not self.is_replaced(name)]
        found = [find_weights(Path(self.location).expanduser() / name, self.options.variant) for name in names]
        return any(weights is not None and weights[0] == self.options.variant for weights in found)

    @property
    def is_here(self) -> bool:
        """Whether all that tells which sizes the model takes is on this machine; a T5 tells nothing of them."""
        replacing = (self._replaced[name][0] for name in (self.denoiser, "vae"))
        return is_local(self.location) and is_local(self.base) and all(is_local(location) for location in replacing if location is not None)

    @cached_property
    def has_vae(self) -> bool:
        """Whether the denoiser works on what a VAE makes; on pixels, if the option or the list of parts of a model that is here says so."""
        given = self.options.pretrained_vae_model_name_or_path
        if given is not None:
            return given.lower() != NO_VAE
        has_index = not is_single_file(self.location) and (Path(self.location).expanduser() / INDEX_FILE).is_file()
        return not has_index or not is_nothing(self.index.get("vae"))

    @property
    def foreign_text_parts(self) -> Sequence[str]:
        """Names of the parts that pretrained_t5_model_name_or_path gives."""
        return self._t5_parts

    @property
    def loads_by_name(self) -> bool:
        """Whether diffusers loads the model, as it is trained here, by its location alone."""
        return self.checkpoint is None and self.has_vae and not self._t5_parts

    def is_replaced(self, name: str) -> bool:
        return self._replaced.get(name, (None, None))[0] is not None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The model's own list of its parts, model_index.json."""
        root = Path(self.base).expanduser()
        revision = None if is_single_file(self.location) else self.options.revision
        path = root / INDEX_FILE if root.is_dir() else fetch_file(self.base, INDEX_FILE, revision)
        if path is None or not path.is_file():
            raise ConfigError(f"{self.base} has no {INDEX_FILE}", hint=f"It has {contents(root)}." if root.is_dir() else None)
        return read_json(path)

    def class_of(self, name: str) -> type[Any]:
        """The class that the model's index names for a part, from diffusers or transformers."""
        import diffusers
        import transformers

        library, class_name = self._t5_class(name) if name in self._t5_parts else self.index.get(name) or (None, None)
        module = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
        if module is None or not hasattr(module, str(class_name)):
            raise ConfigError(
                f"{INDEX_FILE} of {self.base} says that its {name} is a {class_name} of {library}, which is not installed",
                hint="The model may need a newer release of that library.",
            )
        found: type[Any] = getattr(module, str(class_name))
        return found

    def _t5_class(self, name: str) -> tuple[str, str]:
        part = self.part(name)
        return "transformers", encoder_class(part.config(), part.location) if part.has_weights else tokenizer_class(part.config())

    def index_of_result(self) -> dict[str, Any]:
        """The list of parts of a model that is written after training: of this one, with what the options put in place of its own."""
        index = {**self.index, **{name: list(self._t5_class(name)) for name in self._t5_parts}}
        return index if self.has_vae else {**index, "vae": [None, None]}


def is_nothing(entry: object) -> bool:
    """Whether a model's list of parts says of one that there is none."""
    return isinstance(entry, list) and bool(entry) and entry[0] is None


def is_local(location: str) -> bool:
    """Tell a path of this machine, there or not, from a hub id or an address."""
    if is_address(location):
        return False
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", location) and not is_single_file(location) and Path(location).suffix != ".json"
    return not is_id or Path(location).expanduser().exists()

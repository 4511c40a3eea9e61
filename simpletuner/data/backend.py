"""The contract of a backend, a place where images and captions lie, and the keys that every image dataset has."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from simpletuner.console import Bar
from simpletuner.data.captions import decode
from simpletuner.data.keys import tidy
from simpletuner.errors import DatasetError, choose
from simpletuner.types import Size

Secret = SecretStr
"""Type of a key that no message, report or file may show."""
OpenBar = Callable[[int], AbstractContextManager[Bar]]
"""Opens a bar for so many pieces of work."""


class EntryOptions(BaseModel):
    """Keys that every entry of `multidatabackend.json` may have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str
    """Its name: in messages, in sample ids, and as the folder of its caches. Unique."""
    type: str = "local"
    """The place where its data lies."""
    dataset_type: str = "image"
    """What it holds: `image`, `eval` (pictures that are never trained on), `conditioning` (masks and references of other pictures),
    or `text_embeds` and `image_embeds` to say where text embeddings and latents are cached."""
    disabled: bool = False
    """Leave this entry out; nothing in it is checked."""


class AspectWeight(BaseModel):
    """One of `crop_aspect_buckets`, with the share of images that get it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aspect: float = Field(gt=0)
    weight: float = Field(gt=0)


class Block(BaseModel):
    """Keys in braces inside an entry, such as `parquet`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _unknown_keys_are_refused(cls, value: Any) -> Any:
        unknown = [key for key in value if key not in cls.model_fields] if isinstance(value, dict) else []
        if unknown:
            raise ValueError("; ".join(f"unknown key {key!r}; {choose(key, cls.model_fields, 'keys of this block')}" for key in unknown))
        return value


class CaptionShuffle(Block):
    """How versions of captions are made: for `enable` itself, and for `caption_tag_dropout` and `caption_wildcards` beside it."""

    enable: bool = True
    """Put the tags of a caption in another order."""
    count: int | None = Field(default=None, ge=1, le=10_000)
    """Versions made of each caption besides the original; by default 1, or 4 with tag dropout or wildcards."""
    seed: int = 0
    """Another seed makes other versions. It is not the run's: runs of several seeds share their embeddings."""
    split_on: Literal["comma", "space", "period"] = "comma"
    """What stands between two tags."""
    position_start: int = Field(default=0, ge=0)
    """Tags at the front that are neither moved nor dropped."""
    include_original: bool = True
    """Show the caption in its own order and with all its tags too."""


class DatasetOptions(EntryOptions):
    """Keys of an image dataset wherever it lies; None is the value in config.json, or without effect. A backend adds its own."""

    resolution: float | None = None
    """Size of the training pictures, in the unit that `resolution_type` names."""
    resolution_type: Literal["pixel", "area", "pixel_area"] | None = None
    """Unit of the sizes: `pixel` is the shorter edge, `pixel_area` the edge of a square of that area, `area` megapixels."""
    minimum_image_size: float | None = None
    """Skip images smaller than this; 0 keeps all."""
    maximum_image_size: float | None = None
    """With `crop`, bring images larger than this down to `target_downsample_size` before the crop is taken."""
    target_downsample_size: float | None = None
    """See `maximum_image_size`."""
    minimum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Skip images whose width over height is less."""
    maximum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Skip images whose width over height is more."""
    crop: bool = False
    """Cut pictures to the shape that `crop_aspect` names; else they keep the image's own."""
    crop_style: Literal["center", "random", "corner", "face"] | None = None
    """Where to cut: a place drawn once for each image (default), the middle, the upper left, or around the largest face."""
    crop_aspect: Literal["square", "preserve", "closest", "random"] | None = None
    """Shape of the picture: `square` (default), the image's own, or from `crop_aspect_buckets` the closest or a random one."""
    crop_aspect_buckets: tuple[float | AspectWeight, ...] = ()
    """Aspects, width over height, for `closest` and `random`; `{"aspect": 0.75, "weight": 0.5}` to weigh them."""
    crops_per_image: int = Field(default=1, ge=1)
    """With `crop_style` random: so many crops of each image are cached and shown in turn, draw by draw."""
    caption_strategy: str | None = None
    """Where captions come from: `filename`, `textfile` or `instanceprompt`."""
    instance_prompt: tuple[str, ...] | None = None
    """The caption of every image with `instanceprompt`; a list gives alternatives."""
    prepend_instance_prompt: bool | None = None
    """Begin each caption with `instance_prompt`."""
    only_instance_prompt: bool | None = None
    """Use `instance_prompt` whatever the strategy."""
    disable_multiline_split: bool = False
    """Take a caption file as one caption instead of one alternative a line."""
    caption_shuffle: CaptionShuffle | None = None
    """Train each caption in several versions, with its tags in other orders."""
    caption_tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a version of a caption lacks a tag."""
    caption_wildcards: bool = False
    """Take `{a|b}` in a caption as a choice."""
    repeats: int = Field(default=0, ge=0)
    """How often more each image is seen in an epoch; 0 is once."""
    probability: float = Field(default=1.0, gt=0)
    """Weight of this dataset when the next batch is drawn."""
    start_epoch: int = Field(default=1, ge=1)
    """First epoch in which this dataset takes part; epochs count from 1."""
    end_epoch: int | None = Field(default=None, ge=1)
    """Last epoch in which it takes part."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer steps that pass before it takes part."""
    end_step: int | None = Field(default=None, ge=1)
    """Last optimizer step in which it takes part."""
    max_num_samples: int | None = Field(default=None, gt=0)
    """Use so many images at most: always the same ones, chosen by their names."""
    train_batch_size: int | None = Field(default=None, gt=0)
    """Images a batch, for this dataset."""
    is_regularisation_data: bool = False
    """Images of what the model knows already: the adapter learns to leave them as the base model has them."""
    cache_dir_vae: str | None = None
    """Folder of its latents; by default `vae/<model_family>/<id>` in `cache_dir`."""
    text_embeds: str | None = None
    """Id of a `text_embeds` entry."""
    image_embeds: str | None = None
    """Id of an `image_embeds` entry."""
    conditioning_data: tuple[str, ...] = ()
    """Id of a conditioning dataset that goes along with this one, or a list of several."""
    conditioning_type: str | None = None
    """Of a conditioning dataset: `mask`, `segmentation`, `reference_strict` or `reference_loose`."""
    source_dataset_id: str | None = None
    """Of a conditioning dataset: the dataset with whose pictures it goes along, if that one does not name it."""

    @property
    def knows_captions(self) -> bool:
        """Whether the place itself says captions (`Entry.captions`), so that a strategy of `captions.STRATEGIES` may take them."""
        return False

    def problems(self) -> Iterator[str]:
        """Say what is wrong between keys of this place."""
        yield from ()

    @field_validator("instance_prompt", "conditioning_data", mode="before")
    @classmethod
    def _one_text_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("caption_shuffle", mode="before")
    @classmethod
    def _true_is_a_block(cls, value: Any) -> Any:
        return tidy(value) if isinstance(value, dict) else {"enable": value}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a backend, as its listing tells without opening it."""

    name: str
    """Path inside the backend, with forward slashes; never absolute, never with `..`."""
    size_bytes: int
    modified_ns: int
    fault: str | None = None
    """Name of the rule (`faults.RULES`) by which it must not be read."""
    captions: tuple[str, ...] | None = None
    """Alternatives that the place itself knows, e.g. from a column of a table; None if it knows none."""
    size: Size | None = None
    """Upright width and height that the place itself knows, so that the file need not be opened to find its bucket."""
    shown: str | None = None
    """With `fault`, how it is called where `name` is not what the user wrote."""


class DataBackend(ABC):
    """A place where images and captions lie. Only read from; `read` and `exists` are called from many threads."""

    options_type: ClassVar[type[DatasetOptions]]
    """The keys that a dataset in this place may have."""

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """
        Args:
            options: an instance of `options_type`. Nothing is opened yet.
        """

    def keep_in(self, folder: Path) -> None:  # noqa: B027  # most places keep nothing
        """Say where it may keep what it learns of the place for the next start. Called before anything else, or never."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, for messages; without secrets."""

    @abstractmethod
    def missing(self) -> str | None:
        """Say what is wrong with the place itself, or None. Called before anything is loaded, for all datasets."""

    def prepare(self, bar: OpenBar) -> tuple[str, ...]:
        """Fetch what must be here before `list`. Called by one process alone; the others list what it fetched.

        Args:
            bar: opens a bar for so many files; called only if some must be fetched.

        Returns:
            Lines to say aloud.

        Raises:
            DatasetError: nothing can be fetched, e.g. the folder for it cannot be written.
        """
        return ()

    @abstractmethod
    def list(self) -> Iterator[Entry]:
        """Give every file, sorted by name, hidden ones left out.

        Raises:
            DatasetError: the place cannot be listed.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Give a file's bytes.

        Raises:
            DatasetError: no such file, or it lies outside the place, or it cannot be read.
        """

    def read_head(self, name: str, count: int) -> bytes:
        """Give the first `count` bytes of a file, or all of it: where it is shorter, and where the place cannot read less.

        Raises:
            DatasetError: as `read` does.
        """
        return self.read(name)

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether `read` would find this file."""

    def read_text(self, name: str) -> tuple[str, str]:
        """Give a file's text, and the encoding it was found to be in."""
        return decode(self.read(name))


def check_name(name: str) -> PurePosixPath:
    """Refuse a name that could lead out of a backend.

    Raises:
        DatasetError: it is empty or absolute, or holds `..` or a null.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DatasetError(
            f"{name!r} is no file name inside a dataset", hint="Names are relative to the dataset, with forward slashes and without '..'."
        )
    return path


def refused(name: str, rule: str = "outside") -> Entry:
    """List a file that is never read, under a name that leads nowhere.

    Args:
        name: as the place has it.
        rule: the one by which it is left out.
    """
    parts = (part.replace("..", "__").replace("\0", "") for part in PurePosixPath(readable(name)).parts)
    return Entry("/".join(part for part in parts if part.strip("/\\")) or "no name", 0, 0, fault=rule)


def without_secrets(url: str) -> str:
    """An address without user name and password, and without its query, which may hold a signature."""
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", url)[0])


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def stamp(*facts: object) -> int:
    """Give a number for `Entry.modified_ns` where a place tells no time: it changes with any of these facts."""
    text = "\0".join(str(fact) for fact in facts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # SQLite's integers have a sign


def readable(name: str) -> str:
    """Give a name that can be printed and stored; bytes that are no text become question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")

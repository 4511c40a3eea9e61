"""What the doctor found: the kinds of problems in a table, and the nouns that examination, table, JSON and page share.

Letters: C latent channels, h w latent pixels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from simpletuner.data.conditioning import Conditioning
from simpletuner.data.plan import ImageDataset
from simpletuner.types import Sample, Size

Severity = Literal["error", "warning", "note"]
WEIGHTS: Mapping[Severity, float] = {"error": 2.0, "warning": 1.0, "note": 0.0}
"""To which the share of images that a problem concerns is added."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: how bad it is, and what to do."""

    severity: Severity
    hint: str
    least: float = 0.0
    """Taken for the share of images where that is less: a leak is grave however few leak."""


KINDS: Mapping[str, Kind] = {
    "unusable": Kind("error", "The dataset cannot be trained on as it is."),
    "leak": Kind("warning", "Take them out of one side: what was trained on says nothing at evaluation.", least=0.9),
    "near leak": Kind("warning", "Compare them, and take copies out of one side: what was trained on says nothing at evaluation.", least=0.5),
    "exact duplicate": Kind("warning", "Keep one of each; to see an image more often, set repeats.", least=0.3),
    "near duplicate": Kind("warning", "Compare them, and keep one of each unless the small difference is what shall be learned.", least=0.1),
    "shared": Kind("note", "Fine if it is meant, such as one folder at two resolutions; their repeats add up."),
    "zero-byte": Kind("warning", "Copy them again, or remove them."),
    "broken": Kind("warning", "Save them again as JPEG, PNG or WebP, or remove them."),
    "truncated": Kind("warning", "Download or copy them again."),
    "unsupported": Kind("warning", "Convert them to JPEG, PNG or WebP."),
    "huge": Kind("warning", "Scale them down."),
    "unreadable": Kind("warning", "Let this user read them, and give them names that are text."),
    "not there": Kind("warning", "Put the files there, or take their rows out of the table."),
    "outside": Kind("warning", "Copy the files into the dataset's folder."),
    "not fetched": Kind("warning", "Check the addresses and the network; the remarks say what failed."),
    "too small": Kind("warning", "Lower minimum_image_size to use them."),
    "aspect": Kind("warning", "Widen minimum_aspect_ratio and maximum_aspect_ratio to use them."),
    "no caption": Kind("warning", "Write a caption for each, or choose another caption_strategy."),
    "not drawn": Kind("note", "Raise max_num_samples to use them."),
    "no companion": Kind("warning", "Add a file of the same name to its conditioning dataset, or take the image out."),
    "other shape": Kind("warning", "Make the mask or reference of the same width over height as its image."),
    "black": Kind("warning", "Paint white what is to be learned, or take the picture out."),
    "no picture": Kind("note", "Harmless if it is meant; else give each the name of its picture, whatever the suffix."),
    "empty caption": Kind("warning", "Write a caption, unless they are meant to be trained without words."),
    "long caption": Kind("warning", "Put what matters first, or raise tokenizer_max_length if the model can read more."),
    "repeated caption": Kind("note", "Say in each caption what is special in its image, unless one concept is to be learned from all."),
    "enlarged": Kind("warning", "Use larger originals, lower resolution, or leave them out with minimum_image_size."),
    "slightly enlarged": Kind("note", "Harmless for a few; minimum_image_size leaves them out."),
    "cropped away": Kind("warning", "Look whether what matters is still in the picture (--html draws the crops); crop: false keeps the whole image."),
    "no face": Kind("note", "Look where they are cut (--html draws the crops), or move them to a dataset of another crop_style."),
    "extreme aspect": Kind("note", "minimum_aspect_ratio and maximum_aspect_ratio leave them out."),
    "lone bucket": Kind(
        "note", "Their batches are smaller. Raise repeats, add images of such shapes, or make fewer shapes by crop or a lower aspect_bucket_rounding."
    ),
    "never drawn": Kind("warning", "Raise max_train_steps or num_train_epochs, or change start_epoch or start_step."),
    "balance": Kind("note", "Change repeats or probability if this is not meant."),
}
"""The first words of every problem, as messages, JSON and page name it. The rules by which images are skipped are among them."""


def kind_of(name: str) -> Kind:
    """Look a kind up; a rule of discovery that nobody gave advice for is still a problem."""
    return KINDS.get(name, Kind("warning", "docs/dataloader.md tells the rule, under 'Which images are used'."))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to look at in one dataset, or between datasets."""

    kind: str
    """A name in `KINDS`."""
    dataset: str
    """Its id; several with commas."""
    message: str
    files: tuple[str, ...] = ()
    """Images it is about: names inside the dataset."""
    share: float = 0.0
    """Share of the dataset's images, 0 to 1."""
    advice: str = ""
    """What to do, where it is more exact than the kind's own."""
    examples: tuple[str, ...] = ()
    """The files with more than their names: which is like which, of which size."""

    @property
    def severity(self) -> Severity:
        return kind_of(self.kind).severity

    @property
    def hint(self) -> str:
        return self.advice or kind_of(self.kind).hint

    @property
    def weight(self) -> float:
        """What problems are sorted by: 2 to 3 for errors, 1 to 2 for warnings, 0 to 1 for notes; more of it the more images it concerns."""
        return WEIGHTS[self.severity] + max(kind_of(self.kind).least, min(self.share, 1.0))


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong with one image."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the doctor has to know of the model; whoever knows the family says it."""

    text_tokens: int
    """T, the tokens that the model reads of a caption."""
    latent_channels: int
    stride_px: int
    """Pixels a latent pixel."""
    text_bytes: int
    """One caption's embedding on disk."""
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    """Tokens of captions, end token included; None if no tokenizer is at hand, and lengths are estimated."""
    refuse_size: Callable[[Size], str | None] = lambda size: None
    """Why the model cannot take pictures of this size, or None."""
    assumed: tuple[str, ...] = ()
    """What is not known of this model and was filled in, a sentence each."""


@dataclass(frozen=True, slots=True)
class BucketRow:
    """One bucket of the histogram."""

    size: Size
    images: int
    batches: int
    """In one pass with all repeats."""
    batch_size: int
    last_batch: int
    """Images in the batch that the bucket's draws do not fill; 0 if they fill all."""


@dataclass(frozen=True, slots=True)
class Examined:
    """One dataset after examination; without samples if it is unusable."""

    dataset: ImageDataset
    samples: tuple[Sample, ...] = ()
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rule to names, as discovery left them out."""
    notes: tuple[str, ...] = ()
    complaints: Mapping[str, tuple[Complaint, ...]] = field(default_factory=dict)
    """Name of an image to what is wrong with it; images without are not in it."""
    buckets: tuple[BucketRow, ...] = ()
    """The fullest first."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers about all of it, by name, as the JSON gives them."""
    error: str | None = None
    """Why nothing could be examined."""

    @property
    def count_skipped(self) -> int:
        return sum(len(names) for names in self.skipped.values())

    @property
    def id(self) -> str:
        return self.dataset.id


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and the file that goes along with it."""

    dataset: str
    """Id of the picture's."""
    picture: str
    file: str


@dataclass(frozen=True, slots=True)
class Beside:
    """One conditioning dataset after examination: masks or references of pictures."""

    conditioning: Conditioning
    pairs: tuple[Pair, ...] = ()
    """Of the pictures that are trained on, in their order."""
    without_picture: tuple[str, ...] = ()
    """Files that go along with none; none are told if a dataset of theirs was not examined."""
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dataset to its pictures that have no file here, and are left out for that."""
    black: tuple[str, ...] = ()
    """Masks by which nothing counts."""
    files: int = 0
    """That can be used."""
    notes: tuple[str, ...] = ()
    error: str | None = None
    """Why nothing could be examined."""

    @property
    def id(self) -> str:
        return self.conditioning.id

    @property
    def count_lacking(self) -> int:
        return sum(len(names) for names in self.lacking.values())


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the doctor found."""

    source: str
    """The config, as it is called where it is spoken of."""
    datasets: tuple[Examined, ...]
    problems: tuple[Problem, ...]
    """The weightiest first."""
    totals: Mapping[str, float]
    """Numbers about the whole run by name, as the JSON gives them."""
    assumed: tuple[str, ...] = ()
    """What was estimated, and how."""
    conditioning: tuple[Beside, ...] = ()
    """What goes along with pictures of these datasets."""

    @property
    def is_usable(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)


class Chart:
    """The problems of one dataset as they are found: each once for the dataset, and once on every image that it is about."""

    def __init__(self, dataset: str, images: int) -> None:
        """
        Args:
            images: how many it has; shares are of that.
        """
        self.dataset, self._images = dataset, images
        self.problems: list[Problem] = []
        self.complaints: dict[str, list[Complaint]] = {}

    def note(self, kind: str, details: Mapping[str, str], message: str, advice: str = "", examples: Sequence[str] = ()) -> None:
        """Note a problem, unless it is about no image.

        Args:
            details: names of images to what is wrong with each.
        """
        if details:
            self.problems.append(Problem(kind, self.dataset, message, tuple(details), len(details) / self._images, advice, tuple(examples)))
            self.mark(kind, details)

    def mark(self, kind: str, details: Mapping[str, str]) -> None:
        """Mark images with a problem that another dataset has the line of."""
        for name, detail in details.items():
            self.complaints.setdefault(name, []).append(Complaint(kind, detail))

    def note_all(self, kind: str, message: str, advice: str = "", share: float = 1.0) -> None:
        """Note a problem of the dataset as a whole."""
        self.problems.append(Problem(kind, self.dataset, message, share=share, advice=advice))


def named(count: int, one: str, many: str | None = None) -> str:
    """Say a count with its noun: 1 image, 3 images."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """Say a share: 0%, under 1%, 12%."""
    return f"{share:.0%}" if share == 0 or share >= 0.01 else "under 1%"

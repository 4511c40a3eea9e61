"""What a folder of pictures holds: how many, of which sizes, captioned how, and what is wrong at first sight.

Every file's header is read; of large folders, a part is also decoded to find copies. `simpletuner dataset check` looks at all of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from posixpath import splitext
from statistics import median

from simpletuner.data.backend import Entry
from simpletuner.data.backends.local import LocalBackend, LocalOptions
from simpletuner.data.captions import STRATEGIES, CaptionRule, captions_of, sidecar_of
from simpletuner.data.doctor.looks import in_threads, look_at_all
from simpletuner.data.doctor.twins import Seen, near_twins
from simpletuner.data.faults import FOREIGN_SUFFIXES, SUFFIXES
from simpletuner.data.geometry import Measure, Size
from simpletuner.data.index import first_look
from simpletuner.errors import DatasetError

DECODED = 300
"""Pictures that are decoded at most, spread over the folder."""
CAPTIONS_SHOWN = 4
TABLES = (".parquet", ".jsonl", ".csv")
CAMERA_NAME = re.compile(r"^(img|dsc|dscf|dscn|pxl|image|photo|picture|screenshot|untitled|download|file|frame)?[\W\d_]*$", re.IGNORECASE)
"""File names that say nothing of what is in the picture."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """What was found."""

    folder: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    """Upright width and height of each picture that can be used."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Rule of `data/faults.py` to the number of files that it leaves out."""
    has_text: tuple[bool, ...] = ()
    """Of each of these, whether a .txt file lies beside it."""
    telling_names: int = 0
    """Pictures whose name has words."""
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Caption strategy to a few captions that it gives."""
    tables: tuple[str, ...] = ()
    """Files that may hold captions as a table."""
    copies: int = 0
    """Pictures that are there twice, byte for byte, among those decoded."""
    alike: int = 0
    """Pairs that look alike, among those decoded."""
    decoded: int = 0

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def with_text(self) -> int:
        """Pictures with a .txt file beside them."""
        return sum(self.has_text)

    def kept(self, least: Measure | None, *, needs_text: bool) -> Pictures:
        """Those that train.

        Args:
            least: smaller pictures are left out.
            needs_text: so are those without a .txt file.
        """

        def stays(size: tuple[int, int], has_text: bool) -> bool:
            return (has_text or not needs_text) and (least is None or least.of(Size(*size)) >= least.limit)

        texts = self.has_text or (False,) * self.count
        both = [(size, has_text) for size, has_text in zip(self.sizes, texts) if stays(size, has_text)]
        return replace(self, sizes=tuple(size for size, _ in both), has_text=tuple(has_text for _, has_text in both))

    @property
    def edge_px(self) -> int:
        """Side of a square of the area of the middle picture."""
        return round(median(math.sqrt(width * height) for width, height in self.sizes)) if self.sizes else 0

    def smaller_than(self, edge_px: float) -> int:
        """How many have less area than a square of this side."""
        return sum(width * height < edge_px * edge_px for width, height in self.sizes)

    def described(self) -> list[str]:
        """What to say of it, a line each."""
        if not self.sizes:
            return ["no usable pictures"]
        edges = sorted((round(math.sqrt(width * height)), f"{width}x{height}") for width, height in self.sizes)
        shapes = Counter("wide" if w > 1.1 * h else "tall" if h > 1.1 * w else "square" for w, h in self.sizes)
        said = [
            f"{self.count} pictures, from {edges[0][1]} to {edges[-1][1]}; half of them at least as large as {self.edge_px} px square",
            "shapes: " + ", ".join(f"{number} {shape}" for shape, number in shapes.most_common()),
            f"captions: {self.with_text} have a .txt file beside them; {self.telling_names} have words in their names",
        ]
        said += (
            [f"a table lies there too: {', '.join(self.tables[:3])}; docs/dataloader.md tells how captions are taken from one"] if self.tables else []
        )
        said += [f"left out: {', '.join(f'{number} {rule}' for rule, number in self.faults.items())}"] if self.faults else []
        if self.copies or self.alike:
            among = f" among {self.decoded} that were compared" if self.decoded < self.count else ""
            said.append(f"twice there: {self.copies} byte for byte, {self.alike} pairs that look alike{among}")
        return said


def problem_with(folder: str) -> str | None:
    """Why no pictures can be taken from a folder, or None."""
    if not folder.strip():
        return "name a folder"
    backend = backend_of(folder)
    if missing := backend.missing():
        return missing
    if not any(is_picture(entry) for entry in backend.list()):
        return f"folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))})"
    return None


def look_at_folder(folder: str, advance: Callable[[], None] = lambda: None) -> Pictures:
    """Look at all pictures of a folder.

    Args:
        advance: called after each step of work.
    """
    backend = backend_of(folder)
    entries = list(backend.list())
    names = {entry.name for entry in entries}
    images = [entry for entry in entries if is_picture(entry)]
    foreign = sum(suffix_of(entry.name) in FOREIGN_SUFFIXES for entry in entries)
    faults: Counter[str] = Counter({"unsupported": foreign} if foreign else {})
    by_name, kept, sizes = {entry.name: entry for entry in images}, [], []

    def header(name: str) -> tuple[int, int, str | None]:
        if fault := by_name[name].fault:
            return 0, 0, fault
        try:
            _, _, width, height, _, fault = first_look(by_name[name], backend)
        except DatasetError:
            return 0, 0, "unreadable"
        return width, height, fault

    for entry, (width, height, fault) in zip(images, in_threads([entry.name for entry in images], header)):
        advance()
        if fault:
            faults[fault] += 1
        else:
            kept.append(entry.name)
            sizes.append((width, height))
    some = spread(kept, DECODED)
    copies, alike = compared(backend, some, advance)
    with_text = [name for name in kept if f"{splitext(name)[0]}.txt" in names]
    captioned = set(with_text)
    telling = [name for name in kept if is_telling(name)]
    return Pictures(
        folder=folder,
        sizes=tuple(sizes),
        faults=dict(faults),
        has_text=tuple(name in captioned for name in kept),
        telling_names=len(telling),
        captions={"textfile": captions(backend, with_text, "textfile"), "filename": captions(backend, telling, "filename")},
        tables=tuple(sorted(name for name in names if suffix_of(name) in TABLES)),
        copies=copies,
        alike=alike,
        decoded=len(some),
    )


def compared(backend: LocalBackend, names: Sequence[str], advance: Callable[[], None]) -> tuple[int, int]:
    """Pictures that are there twice, and pairs that look alike."""
    looks = look_at_all(backend, names, decodes=False, advance=advance)
    seen = [Seen("pictures", name, False, look) for name, look in zip(names, looks) if look.header.fault is None]
    contents = Counter(one.look.content for one in seen)
    first = list({one.look.content: one for one in seen}.values())
    return sum(contents.values()) - len(contents), len(near_twins(first))


def captions(backend: LocalBackend, names: Sequence[str], strategy: str) -> tuple[str, ...]:
    """A few captions, of pictures far apart."""
    rule, found = CaptionRule(strategy), []
    for name in spread(names, CAPTIONS_SHOWN):
        sidecar = sidecar_of(rule, name)
        text = backend.read_text(sidecar)[0] if sidecar else ""
        found.append(captions_of(rule, name, text)[0])
    assert strategy in STRATEGIES
    return tuple(dict.fromkeys(caption for caption in found if caption))


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most so many names, evenly spaced."""
    if len(names) <= count:
        return list(names)
    return [names[number * len(names) // count] for number in range(count)]


def is_telling(name: str) -> bool:
    """Whether a file's name has a word that may describe the picture."""
    stem = splitext(name.rsplit("/", 1)[-1])[0]
    return not CAMERA_NAME.match(stem) and len(re.findall(r"[^\W\d_]{2,}", stem)) >= 2


def is_picture(entry: Entry) -> bool:
    return suffix_of(entry.name) in SUFFIXES


def suffix_of(name: str) -> str:
    return splitext(name)[1].lower()


def backend_of(folder: str) -> LocalBackend:
    return LocalBackend(LocalOptions.model_validate({"id": "pictures", "type": "local", "instance_data_dir": folder}))

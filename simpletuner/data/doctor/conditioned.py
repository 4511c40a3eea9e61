"""What goes along with pictures: which have their mask or reference, which files have no picture, and masks by which nothing counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from posixpath import splitext

from PIL import Image

from simpletuner.console import Console
from simpletuner.data.companions import Companions, find_companions
from simpletuner.data.conditioning import Conditioning
from simpletuner.data.doctor.findings import Beside, Chart, Pair, named
from simpletuner.data.doctor.looks import SMALL_PX, in_threads
from simpletuner.data.images import BLACK, decode_rgb
from simpletuner.errors import DatasetError
from simpletuner.types import Sample


def find_all_companions(
    conditioning: Sequence[Conditioning], index_folder: Path, console: Console
) -> tuple[dict[str, Companions], dict[str, DatasetError]]:
    """Look at the files of conditioning datasets: what was found by their ids, and why others could not be looked at."""
    found: dict[str, Companions] = {}
    refused: dict[str, DatasetError] = {}
    for one in conditioning:
        try:
            if fault := one.open().missing():
                raise DatasetError(f"dataset {one.id!r}: {fault}", hint=f"Folders are relative to where the command runs, {Path.cwd()}.")
            found[one.id] = find_companions(one, index_folder, console)
        except DatasetError as error:
            refused[one.id] = error
    return found, refused


def examine_beside(
    companions: Companions,
    samples: Mapping[str, Sequence[Sample]],
    skipped: Mapping[str, Mapping[str, Sequence[str]]],
    chart: Chart,
    console: Console,
) -> Beside:
    """Examine one conditioning dataset.

    Args:
        samples: of each dataset of its pictures that could be examined, those that are trained on.
        skipped: of the same datasets, rule to names of the pictures that are not.
        chart: its own.
    """
    one, seen = companions.conditioning, companions.seen
    mine = [name for name in one.sources if name in samples]
    pairs = tuple(Pair(name, sample.name, seen[splitext(sample.name)[0]][0]) for name in mine for sample in samples[name])
    lacking = {name: tuple(picture for picture in skipped[name].get("no companion", ()) if splitext(picture)[0] not in seen) for name in mine}
    alone: tuple[str, ...] = ()
    if set(mine) == set(one.sources):
        pictures = {splitext(sample.name)[0] for name in mine for sample in samples[name]}
        pictures |= {splitext(picture)[0] for name in mine for names in skipped[name].values() for picture in names}
        alone = tuple(name for stem, (name, _) in seen.items() if stem not in pictures)
        chart.note("no picture", dict.fromkeys(alone, "it goes along with none"), f"{named(len(alone), 'file')} without a picture")
    black = black_masks(one, list(dict.fromkeys(pair.file for pair in pairs)), chart, console) if one.is_mask else ()
    return Beside(one, pairs, alone, {name: names for name, names in lacking.items() if names}, black, len(seen), companions.notes)


def black_masks(one: Conditioning, names: Sequence[str], chart: Chart, console: Console) -> tuple[str, ...]:
    """Decode masks small, and give those by which nothing counts; notes these, and those that cannot be decoded."""
    backend = one.open()

    def counts(name: str) -> bool | None:
        try:
            image = decode_rgb(backend.read(name), name, SMALL_PX, BLACK)
        except DatasetError:
            return None
        return has_weight(image, one.kind)

    answers: dict[str, bool | None] = {}
    with console.bar(f"look at {one.id}", len(names)) as bar:
        for name, answer in zip(names, in_threads(names, counts)):
            answers[name] = answer
            bar.advance()
    black = of_answer(answers, False)
    message = f"{named(len(black), 'mask is', 'masks are')} all black: nothing of such a picture is learned"
    chart.note("black", dict.fromkeys(black, "nothing of it counts"), message)
    broken = of_answer(answers, None)
    chart.note("broken", dict.fromkeys(broken, "it cannot be decoded"), f"{named(len(broken), 'file')} of {len(names)} cannot be decoded")
    return black


def of_answer(answers: Mapping[str, bool | None], wanted: bool | None) -> tuple[str, ...]:
    return tuple(name for name, answer in answers.items() if answer is wanted)


def has_weight(image: Image.Image, kind: str) -> bool:
    """Whether any of a mask counts: what is red by a mask, what is not black by a segmentation.

    Args:
        image: RGB, what is transparent on black.
    """
    bands = image.getchannel("R") if kind == "mask" else image
    return bands.getbbox() is not None


def wanted_by(conditioning: Sequence[Conditioning], chosen: Collection[str]) -> list[Conditioning]:
    """Those of which a chosen dataset has pictures."""
    return [one for one in conditioning if any(source in chosen for source in one.sources)]

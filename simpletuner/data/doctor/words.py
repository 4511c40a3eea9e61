"""What is wrong with captions: empty, longer than the model reads, the same on many images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from simpletuner.data.doctor.findings import Chart, ModelFacts, named, percent
from simpletuner.data.variation import Expansion
from simpletuner.types import Sample

QUOTED_LETTERS = 60
BYTES_A_TOKEN = 4
"""Of UTF-8, by which tokens are estimated: about right for English, and, with three bytes a letter, not far off for Chinese."""
REPEATED_SHARE = 0.1
"""From here on, repeated captions are worth a line."""


def count_tokens(expansions: Iterable[Expansion], model: ModelFacts) -> dict[str, int]:
    """Tokens of each caption, in its longest version: counted where a tokenizer is at hand, estimated where none is."""
    captions: dict[str, str] = {}
    for expansion in expansions:
        captions |= expansion.prompts
    prompts = list(captions)
    counts = model.count_tokens(prompts) if model.count_tokens else [estimate_tokens(prompt) for prompt in prompts]
    tokens: dict[str, int] = {}
    for prompt, count in zip(prompts, counts):
        caption = captions[prompt]
        tokens[caption] = max(tokens.get(caption, 0), count)
    return tokens


def estimate_tokens(caption: str) -> int:
    """About how many tokens a caption has, its end token included."""
    return math.ceil(len(caption.encode("utf-8", "replace")) / BYTES_A_TOKEN) + 1


def check_captions(samples: Sequence[Sample], tokens: Mapping[str, int], model: ModelFacts, chart: Chart) -> None:
    """Note empty, over-long and repeated captions of one dataset.

    Args:
        tokens: of captions; one that is not among them has the versions of another.
    """
    empty = {sample.name: "trained without words" for sample in samples if any(not caption.strip() for caption in sample.captions)}
    chart.note("empty caption", empty, f"{named(len(empty), 'image')} with an empty caption")
    about = "" if model.count_tokens else "about "
    longest = {sample.name: max(tokens.get(caption, 0) for caption in sample.captions) for sample in samples}
    over = {name: f"{about}{count} tokens of {model.text_tokens} that are read" for name, count in longest.items() if count > model.text_tokens}
    if over:
        most = max(longest[name] for name in over)
        estimated = "" if model.count_tokens else " (estimated)"
        message = f"{named(len(over), 'caption')} longer than the {model.text_tokens} tokens that the model reads, the longest {most}{estimated}"
        chart.note("long caption", over, message)
    check_repeated(samples, chart)


def check_repeated(samples: Sequence[Sample], chart: Chart) -> None:
    """Note captions that serve many images."""
    uses = Counter(caption for sample in samples for caption in set(sample.captions) if caption.strip())
    repeated = {sample.name: max(uses[caption] for caption in sample.captions) for sample in samples}
    details = {name: f"on {count} images" for name, count in repeated.items() if count > 1}
    share = len(details) / len(samples)
    if share < REPEATED_SHARE or len(samples) < 2:
        return
    caption, count = uses.most_common(1)[0]
    shown = caption if len(caption) <= QUOTED_LETTERS else f"{caption[:QUOTED_LETTERS]}..."
    message = f"{percent(share)} of the images share their caption with another, {count} of them {shown!r}"
    if len(uses) == 1:
        chart.note_all("repeated caption", f"every image has the same caption: {shown!r}")
    else:
        chart.note("repeated caption", details, message)

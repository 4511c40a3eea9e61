"""What is known of a model from the files that are on this machine, without loading it, asking the hub or importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.models.family import ModelFamily
from simpletuner.models.files import read_json
from simpletuner.models.latents import LatentSpec
from simpletuner.models.pixels import config_in_place_of_vae
from simpletuner.models.source import Part, is_local

MASK_BYTES = 8
"""A token of the attention mask on disk."""
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is needed to tell the size of cached latents and embeddings."""

    latents: LatentSpec
    text: Mapping[str, tuple[int, ...]]
    """Of one prompt's embeddings, by name."""
    assumed: tuple[str, ...]
    """What had to be assumed, a sentence each."""


def shapes(family: ModelFamily) -> Shapes:
    """Ask the family for shapes by the configurations on this machine, or of its released models where those are not here."""
    known = [name for name in family.parts if family.source.knows(name)]
    vae = config_here(family.source.part("vae")) if "vae" in known else None
    if not family.source.has_vae and (denoiser := config_here(family.source.part(family.denoiser_folder))) is not None:
        vae = config_in_place_of_vae(denoiser, family.source_name())
    names = [name for name in family.parts if name.startswith("text_encoder")]
    encoders = [config_here(family.source.part(name)) if name in known else None for name in names]
    latents, text = family.latent_spec(vae), family.text_shapes(encoders)
    assumed = []
    if vae is None:
        assumed.append(
            "the VAE's configuration is not on this machine: latents are taken to be those of the released models, "
            f"{latents.channels} channels at a stride of {latents.stride_px} px"
        )
    if None in encoders:
        missing = "a text encoder's configuration is not" if len(encoders) > 1 else "the text encoder's configuration is not"
        assumed.append(f"{missing} on this machine: embeddings are taken to be those of the released models, {text['prompt'][-1]} numbers a token")
    return Shapes(latents, text, tuple(assumed))


def text_bytes(text: Mapping[str, tuple[int, ...]], number_bytes: int) -> int:
    """Size of one caption's embeddings.

    Args:
        text: their shapes, by name.
        number_bytes: of the precision that text encoders run in.
    """
    return sum(math.prod(shape) * (MASK_BYTES if name.endswith("mask") else number_bytes) for name, shape in text.items())


def token_counter(family: ModelFamily) -> Callable[[Sequence[str]], list[int]] | None:
    """Give what counts tokens of captions, end token included, or None if no tokenizer of the model is on this machine.

    Of several tokenizers the longest count is given.
    """
    names = [name for name in family.parts if name.startswith("tokenizer")]
    paths = [file_here(family.source.part(name), TOKENIZER_FILE) if family.source.knows(name) else None for name in names]
    files = [path for path in paths if path is not None]
    if not files or len(files) < len(paths):
        return None
    from tokenizers import Tokenizer  # what transformers' fast tokenizers are made of; it needs no torch

    tokenizers = [Tokenizer.from_file(str(path)) for path in files]
    for tokenizer in tokenizers:
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def count(captions: Sequence[str]) -> list[int]:
        by_tokenizer = [[len(encoded.ids) for encoded in tokenizer.encode_batch(list(captions))] for tokenizer in tokenizers]
        return [max(counts) for counts in zip(*by_tokenizer)]

    return count


def config_here(part: Part) -> dict[str, Any] | None:
    """The configuration of a part, if it is on this machine."""
    path = file_here(part, part.config_name)
    return None if path is None else {**read_json(path), **part.changes}


def file_here(part: Part, name: str) -> Path | None:
    """A file of a part, if it is on this machine: in a local model, or downloaded before."""
    root = Path(part.location).expanduser()
    if root.is_file():
        return root if name == part.config_name else None
    for subfolder in part.subfolders:
        file = f"{subfolder}/{name}" if subfolder else name
        if is_local(part.location):
            if (root / file).is_file():
                return root / file
            continue
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(part.location, file, revision=part.revision)
        if isinstance(found, str):
            return Path(found)
    return None

"""What proposals need to know of a model, without loading it or asking the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from simpletuner.cli.choices import family_of
from simpletuner.cli.preview import is_here, knows_alignment
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.models import Models

USUAL_PX = 1024
NATIVE_PX = {"sd1x": 512, "sd2x": 768}
"""Families of other sizes than the usual one."""
USUAL_STEP_PX = 64
GUESSED_BILLIONS = 0.1
"""Of a model in a folder, of which nobody says how large it is: small ones are what people make themselves."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as far as proposals care."""

    family: str
    name: str
    """Its location, as messages call it."""
    billions: float
    native_px: int
    """Side of the squares that it was trained on."""
    step_px: int
    """Sides of pictures are multiples of this."""
    is_here: bool
    """Whether all of it is on this machine."""
    loads_lora: bool = True
    """Whether the tools that read pipelines can load a plain LoRA of it."""
    has_assistant: bool = False
    """Whether an adapter stands beside it while training, since it is distilled to few steps."""
    risky_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """In 16 bits."""
        return int(2e9 * self.billions)


@lru_cache(maxsize=32)
def facts_of(family: str, flavour: str | None, location: str | None) -> ModelFacts:
    """Look a model up.

    Raises:
        ConfigError: there is no such family or flavour.
    """
    kind = family_of(family)
    model = kind(Models(model_family=family, model_flavour=flavour or None, pretrained_model_name_or_path=location or None))
    chosen = flavour or (None if location else next(iter(kind.flavours)))
    return ModelFacts(
        family=family,
        name=model.source_name(),
        billions=kind.billions.get(chosen or "", GUESSED_BILLIONS if is_here(model) else max(kind.billions.values(), default=1.0)),
        native_px=native_px(family, chosen, model),
        step_px=model.alignment_px if knows_alignment(model) else USUAL_STEP_PX,
        is_here=is_here(model),
        loads_lora=kind.pipeline_loads_lora,
        has_assistant=chosen in kind.assistants,
        risky_layers=kind.risky_layers,
    )


def native_px(family: str, flavour: str | None, model: ModelFamily) -> int:
    """As the flavour's name says, or else a folder's configuration, or the family."""
    named = re.search(r"(?:^|-)(512|768|1024|2048)(?:-|$)", flavour or "")
    if named:
        return int(named[1])
    if flavour is None and is_here(model):
        try:
            sample = model.denoiser_config.get("sample_size")  # type: ignore[attr-defined]
            if isinstance(sample, int) and sample > 0:
                return int(sample * model.vae_stride)
        except (AttributeError, ConfigError):
            pass
    return NATIVE_PX.get(family, USUAL_PX)


def refusal(family: str, location: str) -> str | None:
    """Why a model at this place cannot be of this family, or None; what is on the hub is not asked for."""
    try:
        family_of(family)(Models(model_family=family, pretrained_model_name_or_path=location or None)).check_source()
    except ConfigError as error:
        return f"{error.message}. {error.hint or ''}".strip()
    return None

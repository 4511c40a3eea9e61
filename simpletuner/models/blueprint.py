"""A model's networks from their configurations alone: of what is on this machine, or of the released models, whose configurations are facts here.

`released.json` lists them; with these numbers the networks have as many parameters as the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import SimpleTunerError
from simpletuner.models.family import ModelFamily
from simpletuner.models.files import read_json
from simpletuner.models.offline import config_here
from simpletuner.models.source import INDEX_FILE, NO_VAE, is_nothing

if TYPE_CHECKING:
    from torch import Tensor, nn

FACTS = Path(__file__).with_name("released.json")
OWN_PLACES = ("pretrained_transformer_model_name_or_path", "pretrained_unet_model_name_or_path", "pretrained_t5_model_name_or_path")
ELSEWHERE = (*OWN_PLACES, "pretrained_transformer_subfolder", "pretrained_unet_subfolder", "single_file_base_model", "revision", "variant")
"""Options that say where files are, which a blueprint has all in its folder."""


def blueprint(family: ModelFamily, folder: Path) -> tuple[ModelFamily, list[str]]:
    """Make of a family one whose files are configurations in a folder, and whose denoiser therefore starts from random numbers.

    Args:
        folder: is filled.

    Returns:
        That family, and what had to be assumed, a sentence each.

    Raises:
        SimpleTunerError: a configuration is neither here, nor known, nor to be had from the hub.
    """
    released = _released(family.options.model_family, family.source.flavour)
    index: dict[str, Any] = {"_class_name": family.pipeline_class}
    assumed = []
    for name in (name for name in family.parts if not name.startswith("tokenizer")):
        config, found, is_assumed = _found(family, name, released.get(name))
        index[name] = found.split(".")
        if is_assumed:
            assumed.append(name)
        place = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(config), encoding="utf-8")
    for name in ("text_encoder", "vae"):
        index.setdefault(name, [None, None])
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    has_vae = family.source.has_vae
    changes = {
        **dict.fromkeys(ELSEWHERE),
        "pretrained_model_name_or_path": str(folder),
        "pretrained_vae_model_name_or_path": None if has_vae else NO_VAE,
        "model_init": "random",
        "model_flavour": family.source.flavour,
    }
    notes = [f"{', '.join(assumed)} not on this machine: taken to be as released"] if assumed else []
    return type(family)(family.options.model_copy(update=changes)), notes


def _found(family: ModelFamily, name: str, released: str | None) -> tuple[Mapping[str, Any], str, bool]:
    """A part's configuration and class, and whether it is that of the released model."""
    own = config_here(family.source.part(name)) if family.source.knows(name) else None
    named = _class_here(family, name)
    network: dict[str, Any] | None = _facts()["networks"][released] if released else None
    kind = named or (network["class"] if network else None)
    if own is not None and kind is not None:
        return own, kind, False
    if network is not None and not family.source.is_replaced(name):
        return network["config"], network["class"], True
    try:
        return family.source.part(name).config(), _named(family.source.class_of(name)), False
    except SimpleTunerError as error:
        raise type(error)(f"nothing on this machine tells what the {name} of {family.source_name()} is: {error.message}", hint=error.hint) from error


def _class_here(family: ModelFamily, name: str) -> str | None:
    """A part's class, as a model on this machine says; None if there is none that says it."""
    if name in family.source.foreign_text_parts:
        return _named(family.source.class_of(name))
    path = Path(family.source.base).expanduser() / INDEX_FILE if family.source.knows("") else Path()
    entry = read_json(path).get(name) if path.is_file() else None
    return None if entry is None or is_nothing(entry) else ".".join(entry)


def _named(kind: type[Any]) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _released(family: str, flavour: str | None) -> Mapping[str, str]:
    """The networks of a flavour, of the family's first one if it is of none, by their parts; nothing if they are not known."""
    models = _facts()["models"].get(family, [])
    for model in models:
        if flavour in model["flavours"]:
            parts: Mapping[str, str] = model["parts"]
            return parts
    return {}


@cache  # of a file that comes with the package
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return facts


def text_networks(plan: ModelFamily) -> list[nn.Module]:
    """The text encoders of a blueprint, in the order of their precisions; on the meta device."""
    import torch

    made = []
    for name in (name for name in plan.parts if name.startswith("text_encoder")):
        kind: Any = plan.source.class_of(name)
        with torch.device("meta"):
            network: nn.Module = kind(kind.config_class.from_dict(plan.source.part(name).config()))
        made.append(network.eval().requires_grad_(False))
    return made


def vae_network(plan: ModelFamily) -> nn.Module:
    """The VAE of a blueprint; on the meta device."""
    import torch

    kind: Any = plan.source.class_of("vae")
    with torch.device("meta"):
        network: nn.Module = kind.from_config(plan.source.part("vae").config())
    return network.eval().requires_grad_(False)


def read_tokens(encoder: Any, count: int, tokens: int, *, grads: bool = False) -> Tensor:
    """Have a text encoder read prompts, as far as the states that denoisers are given, (B, T, D).

    Args:
        count: of prompts.
        tokens: of each; a CLIP reads as many as it has positions for.
        grads: whether something in it is trained.
    """
    import torch

    config = encoder.config.to_dict()
    tokens = min(tokens, int(config.get("max_position_embeddings") or tokens)) if "projection_dim" in config else tokens
    ids = torch.zeros(count, tokens, dtype=torch.long, device=next(encoder.parameters()).device)
    inner = getattr(encoder, "model", encoder)  # what language models make of the states, their logits, nobody asks for
    with torch.set_grad_enabled(grads):
        found = inner(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states="d_model" not in config)
    states: Tensor = found.last_hidden_state
    return states


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, H, W) and give latents of their shape, whichever kind of VAE it is."""
    import torch

    if any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()):  # made for films
        pixels = pixels[:, :, None]
    with torch.no_grad():
        found = vae.encode(pixels)
    latents: Tensor = found.latent if hasattr(found, "latent") else found.latent_dist.mean
    return latents


def decode(vae: Any, latents: Tensor) -> None:
    """Decode what `encode` gave."""
    import torch

    with torch.no_grad():
        vae.decode(latents)

"""All model families as a page of markdown, docs/families.md: what their files state, read without torch and without asking the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simpletuner.adapters.key_maps import Layout, comfyui_names, kohya_names
from simpletuner.cli.choices import family_of, known_names, summary_of
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.models import Models

HEAD = """\
# Model families

Written by `simpletuner families --markdown`; change the files in `simpletuner/models/families/` instead.

`model_family` names a family, `model_flavour` one of its models (the first if it is left out), `pretrained_model_name_or_path` any other
model of the family: see [models](models.md).
"""
ADAPTERS_HEAD = """
## Adapters

LyCORIS finds layers by the name of their class, or of the class of what holds them, in `target_module` of `lycoris_config`. The short names
below work in every family that lists them, the classes of diffusers in their own. A plain LoRA (`lora_type: standard`) adapts the layers
whose names end as listed, or those of `peft_lora_target_modules`. Every family can be trained whole (`model_type: full`) too.

| family | short class names | a plain LoRA adapts | exports |
|---|---|---|---|
"""
ADAPTERS_TAIL = """
What each export can hold is in [exports](exports.md).
"""
SETS_HEAD = """
## Sets of LoRA targets

`flux_lora_target` chooses one by name.

| family | set | layers |
|---|---|---|
"""
OBJECTIVES = {"flow": "flow matching", "denoising": "epsilon, v-prediction, sample"}


def page(families: Mapping[str, type[ModelFamily]]) -> str:
    """Write the page.

    Args:
        families: by the names that users give them.
    """
    sets = [f"| `{name}` | `{chosen}` | {_code(layers)} |\n" for name, kind in families.items() for chosen, layers in kind.lora_target_sets.items()]
    return "".join(
        (
            HEAD,
            *(_section(name, kind) for name, kind in families.items()),
            ADAPTERS_HEAD,
            *(_adapters_row(name, kind) for name, kind in families.items()),
            ADAPTERS_TAIL,
            *((SETS_HEAD, *sets) if sets else ()),
        )
    )


def listing(families: Mapping[str, type[ModelFamily]]) -> str:
    """The families for a terminal: what each is, and its flavours."""
    lines = []
    for name, kind in families.items():
        lines += [f"{name}", f"  {summary_of(name)}", *(f"    {flavour:<20} {location}" for flavour, location in kind.flavours.items()), ""]
    return "\n".join(lines[:-1])


def exports_of(kind: type[ModelFamily]) -> list[str]:
    """The formats in which an adapter of this family can be written: two of them want the layer names of the makers' own layout."""
    layout, found = Layout(kind.denoiser_folder, kind.original_layout, {}), ["diffusers", "lycoris"]
    for name, names_of in (("kohya", kohya_names), ("comfyui", comfyui_names)):
        try:
            names_of(layout)
        except ConfigError:
            continue
        found.append(name)
    return found


def _section(name: str, kind: type[ModelFamily]) -> str:
    rows = "".join(_flavour_row(name, kind, flavour) for flavour in kind.flavours)
    table = f"| flavour | model | parameters | text tokens | sides in steps of |\n|---|---|---|---|---|\n{rows}"
    preferred = ", ".join(f"`{key}` {value}" for key, value in kind.defaults.items())
    return f"\n## {name}\n\n{summary_of(name)}\n\nObjective: {OBJECTIVES[kind.objective]}. Its own defaults: {preferred}.\n\n{table}"


def _flavour_row(name: str, kind: type[ModelFamily], flavour: str) -> str:
    family = kind(Models(model_family=name, model_flavour=flavour))
    billions = f"{kind.billions[flavour]:g} billion" if flavour in kind.billions else ""
    return f"| `{flavour}` | {family.source_name()} | {billions} | {family.text_tokens} | {family.alignment_px} px |\n"


def _adapters_row(name: str, kind: type[ModelFamily]) -> str:
    return f"| `{name}` | {_code(kind.class_aliases)} | {_code(kind.lora_targets)} | {', '.join(exports_of(kind))} |\n"


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def all_families() -> dict[str, type[ModelFamily]]:
    """Every family there is, by name."""
    return {name: family_of(name) for name in known_names()["family"]}

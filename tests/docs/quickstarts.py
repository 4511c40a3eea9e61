"""Write docs/quickstarts/: one page a family, of its example and what is known of it: `python tests/docs/quickstarts.py`."""

from __future__ import annotations

from pathlib import Path

from simpletuner.cli.choices import summary_of
from simpletuner.cli.family_page import all_families, exports_of
from simpletuner.cli.recipes.pages import card_table, download_gb, model_of, pictures_needed
from simpletuner.cli.recipes.rendering import render
from simpletuner.cli.recipes.table import RECIPES, USUAL_CARD_GB
from simpletuner.models.family import ModelFamily

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/quickstarts"
TITLES = {
    "auraflow": "AuraFlow and Pony V7",
    "chroma": "Chroma",
    "flux": "Flux.1",
    "flux2": "Flux.2",
    "lumina2": "Lumina Image 2.0",
    "pixart": "PixArt Sigma",
    "qwen_image": "Qwen-Image",
    "sana": "Sana",
    "sd1x": "Stable Diffusion 1.x",
    "sd2x": "Stable Diffusion 2.x",
    "sd3": "Stable Diffusion 3",
    "sdxl": "Stable Diffusion XL",
    "z_image": "Z-Image",
}
GATED = "Its page on the hub may ask to accept a licence: do so there, then run `hf auth login` or set `HF_TOKEN`."
PITFALLS = {
    "auraflow": (
        'Pony V7 is `"model_flavour": "pony"`; it reads 768 text tokens, the others 256.',
        "Positions are learned on a grid: keep to one resolution. Buckets of several aspects are fine.",
        "Guidance of 3.5 to 4 looks natural (`validation_guidance`, 3.5 unless set). Lion (`optimi-lion`) wants a tenth of the rate: 2e-5.",
    ),
    "chroma": (
        "It is told no guidance: pictures take real guidance (`validation_guidance`) and a negative prompt, at twice the time.",
        "`flash` is made for few steps; train `base` or `hd`.",
    ),
    "flux": (
        GATED,
        "`krea` and `dev` are distilled from guidance: leave `distilled_guidance` at 1, which keeps that as it is.",
        "`schnell` is trained beside an assistant adapter, which is fetched by itself; pictures are made without it.",
        "A negative prompt works with `validation_guidance_real` above 1 alone, which takes twice the time.",
    ),
    "flux2": (
        GATED,
        "`klein-9b` and `klein-4b` are the base models, and the ones to train; those named `-distilled` make pictures in few steps.",
        "`dev` has 32 billion parameters, and a text encoder nearly as large: it is for large cards, in 8 bits or less.",
        "It edits pictures, too: see `reference_strict` in [dataloader](../dataloader.md).",
    ),
    "lumina2": ("Captions are read behind an instruction of the pipeline's; both together may have 256 tokens.",),
    "pixart": (
        "Pipelines of this family load no plain LoRA, hence the LoKr; `simpletuner generate` and LyCORIS load it.",
        "The flavours `-stage1` and `-stage2` are two halves of one model: see [models](../models.md#pixart).",
    ),
    "qwen_image": ("With 20 billion parameters it is the largest family beside Flux.2 dev: the table says what a small card costs in time.",),
    "sana": (
        "A latent pixel covers 32 x 32 pixels, so small details are hard to learn; pictures of 1024 px and more suit it.",
        "Its pipeline makes small letters of all prompts, so capitals in captions say nothing.",
        "kohya's scripts and ComfyUI have no names for its layers: adapters are diffusers' or LyCORIS' own.",
    ),
    "sd1x": (
        'The first flavour is `dreamshaper`, a finetune; the plain model is `"model_flavour": "1.5"`.',
        "It was made for 512 px and reads 77 text tokens: longer captions are cut, and the run says which.",
    ),
    "sd2x": (
        "2.0 and 2.1 predict the velocity, their `-base` twins the noise. A single file that does not say which wants `prediction_type`.",
        "It was made for 768 px and reads 77 text tokens.",
    ),
    "sd3": (
        GATED,
        'Medium has 2.5 billion parameters; `"model_flavour": "large"` has 8.1.',
        "Its T5 and CLIPs are larger than medium itself: the table's smallest cards quantise them.",
    ),
    "sdxl": (
        "A LoKr (`simpletuner examples copy sdxl-lokr`) leaves the feed-forward layers alone: on those, adapters of SDXL end in NaN at times.",
        "Quantising saves less here than with transformers, and shows more: use it where a card is too small otherwise.",
        "It reads 77 text tokens. A subject without captions: `simpletuner examples copy sdxl-subject`.",
    ),
    "z_image": (
        "`turbo` is distilled to few steps: it is trained beside an assistant adapter, which is fetched by itself; pictures are made without it.",
        "Its Qwen3 reads 512 tokens; padding is never shown to the model.",
    ),
}


def example_of(family: str) -> str:
    """The name of a family's example: the first of its examples."""
    return next(name for name, recipe in RECIPES.items() if recipe.family == family)


def page(family: str, kind: type[ModelFamily]) -> str:
    name, folder = example_of(family), f"config/{example_of(family)}"
    lines = render(name).files["config.json"].replace("{folder}", folder).splitlines()
    config = [line for line in lines if line.strip() and not line.strip().startswith("//")]
    exports = [tool for tool in exports_of(kind) if tool == "comfyui"]
    export = [f"simpletuner export --format comfyui --check output/{name}       # for ComfyUI"] if exports else []
    return "\n".join(
        [
            f"# Quickstart: {TITLES[family]}",
            "",
            "Written by `python tests/docs/quickstarts.py`; change that file instead.",
            "",
            f"{summary_of(family)} `{model_of(name)}` is about {download_gb(name):.0f} GB, from the hub, once.",
            "",
            "```bash",
            "./train.sh --help && source .venv/bin/activate     # makes the environment once; or: pip install .",
            "mkdir -p datasets/my-subject                       # put your pictures there",
            f"simpletuner examples copy {name}{' ' * max(1, 25 - len(name))}# writes {folder}, for a card of {USUAL_CARD_GB} GB; else --card 12GB",
            f"simpletuner dataset check --config {folder}/config.json",
            f"simpletuner plan --config {folder}/config.json     # memory, before anything is fetched",
            f"simpletuner train --config {folder}/config.json    # Ctrl-C stops it; the same command goes on",
            "```",
            "",
            *pictures_needed(name),
            "",
            f"`{folder}/config.json`:",
            "",
            "```jsonc",
            *config,
            "```",
            "",
            f"Pictures on the way are in `output/{name}/validation_images`, of the base model first. With the adapter, when it is done:",
            "",
            "```bash",
            f'simpletuner generate "a photo of ohwx dog in the snow" --adapter output/{name} --strength 0.7,1.0',
            *export,
            "```",
            "",
            "## By card",
            "",
            "What `--card` writes. Planned on shapes by `simpletuner plan`, not measured; the times are by published rules.",
            "",
            *card_table(name),
            "",
            "## Pitfalls",
            "",
            *(f"- {sentence}" for sentence in PITFALLS[family]),
            "- All flavours: [families](../families.md). All weights instead of an adapter: `simpletuner examples copy sd1x-full` shows how.",
            "",
        ]
    )


def pages() -> dict[Path, str]:
    return {PAGES / f"{family}.md": page(family, kind) for family, kind in all_families().items()}


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

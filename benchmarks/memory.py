"""Memory of a step: precision x offload x checkpointing, planned at real size and measured on models of an eighth of the layers.

    python benchmarks/memory.py [--models auraflow sdxl flux] [--steps 1] [--only planned|measured] [--out benchmarks/results]

Planned: AuraFlow 6.8B, SDXL 2.6B and Flux 12B at 1024 px, batch 1, LoKr of factor 16, from shapes alone, in some minutes. Measured: the same
with an eighth of the layers and random weights at 128 px, real steps on the CPU; memory counted by the tracker beside what the plan says of
it, and the time of a step relative to plain bf16. So are the other phases: text, VAE, load and validation. Nothing is downloaded. Times want a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from simpletuner.cli.choices import family_defaults, known_names
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import Offload
from simpletuner.memory.residency import vae_dtype, weight_dtype
from simpletuner.memory.settle import recipe_of
from simpletuner.memory.tracker import HOST, Tracker
from simpletuner.models.blueprint import blueprint, decode, encode, read_tokens
from simpletuner.models.offline import shapes
from simpletuner.models.text import load_encoder
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.objective import loss_of
from simpletuner.training.plan import CUDA_BYTES, PROGRAM_BYTES, WINDOW_BYTES, Planner, plan_run
from simpletuner.training.plan_step import shaped_batch
from simpletuner.training.step import Step, resting
from simpletuner.types import Size

FLAVOURS = {"auraflow": "v0.3", "sdxl": "base-1.0", "flux": "dev"}
PRECISIONS = ("no_change", "int8-quanto", "nf4-bnb")
OFFLOADS: Mapping[str, Mapping[str, Any]] = {"none": {}, "half": {"share": 0.5}, "all": {"enable_group_offload": True}}
REAL, SMALL = Size(1024, 1024), Size(128, 128)
CPU = torch.device("cpu")
EIGHTH: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "auraflow": lambda config: {"num_mmdit_layers": 1, "num_single_dit_layers": 4},
    "sdxl": lambda config: {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1},
    "flux": lambda config: {"num_layers": 2, "num_single_layers": 5},
}


def config_of(folder: Path, family: str, **options: Any) -> TrainConfig:
    lokr = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}
    (folder / "lycoris.json").write_text(json.dumps(lokr))
    given = {
        "model_family": family,
        "model_flavour": FLAVOURS[family],
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": str(folder / "lycoris.json"),
        "data_backend_config": str(folder / "none.json"),
        "output_dir": str(folder / "output"),
        **options,
    }
    settings = [Setting(key, value, "the benchmark") for key, value in given.items()]
    return load_config(settings, family_defaults, choices=known_names(), environ={}).config


def planned_rows(folder: Path, family: str) -> list[dict[str, Any]]:
    """The plan at real size of each combination."""
    rows = []
    for precision in PRECISIONS:
        for checkpointing in (False, True):
            config = config_of(folder, family, base_model_precision=precision, gradient_checkpointing=checkpointing)
            planner = Planner(config, REAL, 1, "cuda")
            found = planner.count_denoiser()
            options = [config.memory.model_copy(update=_offload(offload, found.blocks)) for offload in OFFLOADS]
            for offload, where in zip(OFFLOADS, planner.weights_with(options)):
                vram = found.step.peak - found.offload.weights + where.resident
                row = {"model": family, "precision": precision, "offload": offload, "checkpointing": checkpointing, "vram_bytes": vram}
                rows.append({**row, "waiting_bytes": where.host})
                print(row, file=sys.stderr, flush=True)
    return rows


def _offload(name: str, blocks: int) -> dict[str, Any]:
    asked = dict(OFFLOADS[name])
    share = asked.pop("share", None)
    return {"blocks_to_swap": max(1, round(share * blocks))} if share else asked


def measured_rows(folder: Path, family: str, steps: int) -> list[dict[str, Any]]:
    """Real steps of the small model: bytes by the tracker, by the plan, and seconds."""
    rows: list[dict[str, Any]] = []
    for precision in ("no_change", "int8-quanto"):
        for checkpointing in (False, True):
            for offload in ("none", "all") if checkpointing else ("none",):
                place = Path(tempfile.mkdtemp(dir=folder))
                model = _small_model(place, folder, family)
                options = {"base_model_precision": precision, "gradient_checkpointing": checkpointing, **_offload(offload, 0)}
                config = config_of(folder, family, pretrained_model_name_or_path=str(model), model_init="random", tokenizer_max_length=64, **options)
                row = {"model": family, "precision": precision, "offload": offload, "checkpointing": checkpointing, **measure(config, steps)}
                rows.append({**row, "time": row["seconds"] / (rows[0]["seconds"] if rows else row["seconds"])})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _small_model(place: Path, folder: Path, family: str) -> Path:
    """The released model's configurations, with an eighth of the layers."""
    plan, _ = blueprint(build_family(config_of(folder, family)), place / "model")
    file = place / "model" / plan.denoiser_folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **EIGHTH[family](config)}))
    return place / "model"


def measure(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Take real steps on the CPU; all but the first count."""
    family = build_family(config)
    adapter, process, text = build_adapter(config, family), family.process(config.diffusion), shapes(family).text
    dtype, seconds = weight_dtype(config.memory), []
    with Tracker() as tracker:
        denoiser = family.load_frozen(recipe_of(config.memory.base_model_precision, dtype, CPU, family.delicate_layers), 0)
        adapter.attach(denoiser)
        offload = Offload(denoiser, config.memory, CPU)
        enable_checkpointing(denoiser.train(), config.memory)
        tracker.name([*denoiser.parameters(), *denoiser.buffers(), *adapter.parameters().values()], "kept")
        if offload.ring is not None:  # what waits is in main memory; of the blocks' own memory there is never more than their places
            tracker.name([tensor for block in offload.ring.blocks for tensor in (*block.sources, block.memory)], HOST)
            tracker.add(offload.ring.room * offload.ring.place_bytes, "places")
        optimizer = build_optimizer(config.optim, adapter.parameters())
        step = Step(family, denoiser, adapter, process, loss_of(config.diffusion, process), CPU, 1, 0, draws_latents=True)
        batch = shaped_batch(family, text, SMALL, 1)
        for number in range(1 + steps):
            gc.collect()
            tracker.restart()
            began = time.perf_counter()
            step.losses(batch, number, 0).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        measured = tracker.peak
    plan = Planner(config, SMALL, 1, "cuda").count_denoiser()
    planned = plan.step.peak - plan.offload.waiting + plan.offload.places
    return {"planned_bytes": planned, "measured_bytes": measured, "seconds": statistics.median(seconds[1:])}


def phase_rows(folder: Path, family: str) -> list[dict[str, Any]]:
    """The phases besides the step, of the small model with small text encoders, all with random weights in files."""
    place = Path(tempfile.mkdtemp(dir=folder))
    model = _small_model(place, folder, family)
    write_weights(model)
    rows = []
    for precision in ("no_change", "int8-quanto"):
        options = {"base_model_precision": precision, "validation_prompt": "a cat", "validation_resolution": str(SMALL.width), "vae_batch_size": 2}
        config = config_of(folder, family, pretrained_model_name_or_path=str(model), tokenizer_max_length=64, **options)
        for name, (planned, measured) in phases(config, SMALL).items():
            rows.append({"model": family, "precision": precision, "phase": name, "planned_bytes": planned, "measured_bytes": measured})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def write_weights(model: Path) -> None:
    """Give the networks of a model in diffusers layout, of which there are configurations, random weights; text encoders get two layers."""
    import diffusers
    import transformers

    index = json.loads((model / "model_index.json").read_text())
    for name, (library, kind) in ((name, entry) for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None):
        file = model / name / "config.json"
        if library == "transformers" and file.is_file():
            config = json.loads(file.read_text())
            file.write_text(json.dumps({**config, **{key: 2 for key in ("num_layers", "num_hidden_layers") if key in config}}))
            network = getattr(transformers, kind)(getattr(transformers, kind).config_class.from_dict(json.loads(file.read_text())))
            network.to(torch.bfloat16).save_pretrained(file.parent)
        elif library == "diffusers" and file.is_file():
            kept = json.loads(file.read_text())
            getattr(diffusers, kind).from_config(kept).to(torch.bfloat16).save_pretrained(file.parent)


def phases(config: TrainConfig, size: Size) -> dict[str, tuple[int, int]]:
    """What the phases besides the step take on the CPU: name to bytes as planned and as measured, the program left aside."""
    plan = plan_run(config, size, 1, "cpu")
    pixels = config.data.vae_batch_size * 3 * size.width * size.height * 4
    besides = {"text": WINDOW_BYTES, "vae": WINDOW_BYTES + pixels, "load": WINDOW_BYTES, "validation": WINDOW_BYTES}
    measured = measured_phases(config, size)
    return {name: (plan.phase(name).ram_bytes - PROGRAM_BYTES - besides[name], found) for name, found in measured.items()}


def measured_phases(config: TrainConfig, size: Size) -> dict[str, int]:
    """Go through the phases with numbers, one after the other."""
    family, dtype, count = build_family(config), weight_dtype(config.memory), config.data.vae_batch_size
    adapter, process, found = build_adapter(config, family), family.process(config.diffusion), {}
    with Tracker(without="meta") as tracker, torch.no_grad():
        names = [name for name in family.parts if name.startswith("text_encoder")]
        encoders = [load_encoder(family.source, CPU, dtype, name, recipe_of("no_change", dtype, CPU)) for name in names]
        for encoder in encoders:  # made-up tokens, as many as a caption has at most
            read_tokens(encoder, config.data.text_encoder_batch_size, family.text_tokens)
        found["text"] = tracker.peak
        del encoder, encoders
        gc.collect()
        tracker.restart()
        vae = family.load_vae(CPU, vae_dtype(config.memory, CPU))
        tracker.name([*vae.parameters(), *vae.buffers()], "VAE")
        latents = encode(vae, torch.zeros(count, 3, size.height, size.width))[:1]
        found["vae"] = tracker.peak
        del vae
        gc.collect()
        latents = latents.clone()
        tracker.restart()
        denoiser = family.load_frozen(recipe_of(config.memory.base_model_precision, dtype, CPU, family.delicate_layers), 0)
        found["load"] = tracker.peak
    with Tracker(without="meta") as tracker:
        adapter.attach(denoiser)
        tracker.name([*denoiser.parameters(), *denoiser.buffers(), *adapter.parameters().values()], "kept")
        tracker.add(int(find_optimizer(config.optim.optimizer).state_bytes * sum(one.numel() for one in adapter.parameters().values())), "optimizer")
        step = Step(family, denoiser, adapter, process, loss_of(config.diffusion, process), CPU, 1, 0, draws_latents=False)
        batch = shaped_batch(family, shapes(family).text, size, 2)
        tracker.restart()
        with torch.no_grad(), resting(denoiser, adapter):
            vae = family.load_vae(CPU, vae_dtype(config.memory, CPU))
            tracker.name([*vae.parameters(), *vae.buffers()], "VAE")
            step.predict(step.noise(batch, 0, 0), batch)
            decode(vae, latents)
        found["validation"] = tracker.peak
    return found


def page(planned: list[dict[str, Any]], measured: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = ["# Memory of a step", "", f"Planned at 1024 px, batch 1, LoKr of factor 16; CUDA takes about {CUDA_BYTES / 1e9:.1f} GB on top.", ""]
    lines += ["| model | precision | offload | checkpointing | VRAM, GB | waiting in RAM, GB |", "|---|---|---|---|---|---|"]
    for row in planned:
        switch = "on" if row["checkpointing"] else "off"
        sizes = f"{row['vram_bytes'] / 1e9:.2f} | {row['waiting_bytes'] / 1e9:.2f}"
        lines.append(f"| {row['model']} | {row['precision']} | {row['offload']} | {switch} | {sizes} |")
    lines += ["", "Measured on the CPU with an eighth of the layers at 128 px, in bf16; time relative to the first row of a model.", ""]
    lines += ["| model | precision | offload | checkpointing | planned, MB | measured, MB | off by | time |", "|---|---|---|---|---|---|---|---|"]
    for row in measured:
        off = row["planned_bytes"] / row["measured_bytes"] - 1
        sizes = f"{row['planned_bytes'] / 1e6:.1f} | {row['measured_bytes'] / 1e6:.1f} | {off:+.2%} | {row['time']:.2f}"
        lines.append(f"| {row['model']} | {row['precision']} | {row['offload']} | {'on' if row['checkpointing'] else 'off'} | {sizes} |")
    lines += ["", "The other phases of the same models, with text encoders of two layers, on the CPU; the program itself left aside.", ""]
    lines += ["| model | precision | phase | planned, MB | measured, MB | off by |", "|---|---|---|---|---|---|"]
    for row in other:
        off = row["planned_bytes"] / row["measured_bytes"] - 1
        sizes = f"{row['planned_bytes'] / 1e6:.1f} | {row['measured_bytes'] / 1e6:.1f} | {off:+.2%}"
        lines.append(f"| {row['model']} | {row['precision']} | {row['phase']} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FLAVOURS, default=list(FLAVOURS))
    parser.add_argument("--steps", type=int, default=1, help="steps that are measured, after one that is not")
    parser.add_argument("--only", choices=("planned", "measured"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models, planned, measured, other = arguments.models, [], [], []
        if arguments.only != "measured":
            planned = [row for family in models for row in planned_rows(folder, family)]
        if arguments.only != "planned":
            measured = [row for family in models for row in measured_rows(folder, family, arguments.steps)]
            other = [row for family in models for row in phase_rows(folder, family)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.json").write_text(json.dumps({"planned": planned, "measured": measured, "phases": other}, indent=1) + "\n")
    (arguments.out / "memory.md").write_text(page(planned, measured, other))
    print(page(planned, measured, other))


if __name__ == "__main__":
    main()

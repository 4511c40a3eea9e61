"""What the trainer costs beyond a bare PyTorch loop: same model, adapter, batch and optimizer, interleaved in one process.

    python benchmarks/overhead.py [--rounds 12] [--steps 4] [--json FILE]

Prints the median step time of both and the ratio of the medians, with the spread over rounds. The model is an AuraFlow of some 50 M
random parameters, made on the spot; nothing is downloaded. On a noisy machine look at the spread before you believe the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
BATCH, PICTURE_PX, TEXT_TOKENS = 2, 256, 120


def build_model(folder: Path) -> None:
    """An AuraFlow of some 50 M parameters with the small text encoder and VAE of the tests."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from tests.builders.auraflow import TEXT_WIDTH, build_text_encoder, build_tokenizer, build_vae

    tokenizer = build_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=64,
        patch_size=2,
        num_mmdit_layers=2,
        num_single_dit_layers=6,
        attention_head_dim=64,
        num_attention_heads=9,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=576,
        pos_embed_max_size=1024,
    )
    encoder = build_text_encoder(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    parts = {"tokenizer": tokenizer, "text_encoder": encoder, "vae": build_vae(), "transformer": transformer, "scheduler": scheduler}
    AuraFlowPipeline(**parts).save_pretrained(folder)


def write_files(folder: Path) -> None:
    """Pictures and the three files of a user, for more steps than the benchmark takes."""
    (folder / "pictures").mkdir()
    for number in range(16):
        pixels = numpy.random.default_rng(number).integers(0, 255, (PICTURE_PX, PICTURE_PX, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"picture_{number}.png")
    data = [
        {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "crop_style": "center"}
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(data))
    lokr = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 8}
    (folder / "lycoris_config.json").write_text(json.dumps({**lokr, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}))
    config = {
        "model_family": "auraflow",
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "lycoris_config.json",
        "pretrained_model_name_or_path": "model",
        "tokenizer_max_length": TEXT_TOKENS,
        "data_backend_config": "multidatabackend.json",
        "output_dir": "output",
        "resolution": PICTURE_PX,
        "resolution_type": "pixel",
        "mixed_precision": "bf16",
        "gradient_checkpointing": False,
        "train_batch_size": BATCH,
        "max_train_steps": 100_000,
        "checkpoint_step_interval": 0,
        "report_to": "jsonl",
        "seed": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def bare_step(trainer, denoiser: torch.nn.Module) -> Callable[[], None]:
    """The shortest loop body that trains the same thing: one batch in memory, plain torch and lycoris."""
    from lycoris import LycorisNetwork

    LycorisNetwork.apply_preset({"target_module": ["Attention", "AuraFlowFeedForward"]})
    denoiser.requires_grad_(False)
    network = LycorisNetwork(denoiser, lora_dim=10000, alpha=1, network_module="lokr", factor=8, bypass_mode=True)
    network.apply_to()
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in trainer.parameters)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    batch = next(trainer.batches())
    family, parameters = trainer.step.family, list(network.parameters())
    latents = family.scale_latents(batch.latents["mean"])
    prompt = batch.text["prompt"].bfloat16()

    def step() -> None:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(len(latents)))
        t = sigma.view(-1, 1, 1, 1)
        noisy = ((1 - t) * latents + t * noise).bfloat16()
        velocity = denoiser(hidden_states=noisy, encoder_hidden_states=prompt, timestep=sigma.bfloat16(), return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build_trainer(folder: Path):
    """A whole run, put together as `simpletuner train` does it."""
    from simpletuner import plugins
    from simpletuner.console import Console
    from simpletuner.models.family import ModelFamily
    from simpletuner.options.load import load_config
    from simpletuner.options.sources import read_file
    from simpletuner.training.assemble import assemble
    from simpletuner.training.signals import StopRequest

    os.chdir(folder)
    settings, _ = read_file(Path("config.json"), {})
    loaded = load_config(settings, lambda family, flavour: plugins.load("simpletuner.models.families", family, ModelFamily).defaults)
    quiet = Console(is_main=False)
    return assemble(loaded.config, quiet, {"model_family": "auraflow", "output_dir": "output"}, StopRequest(), ExitStack()), quiet


def measure(folder: Path, rounds: int, steps: int) -> dict[str, object]:
    """Alternate `steps` of each, `rounds` times, in one process; the first round of both is thrown away."""
    from diffusers import AuraFlowTransformer2DModel

    run, quiet = build_trainer(folder)
    denoiser = AuraFlowTransformer2DModel.from_pretrained(folder / "model" / "transformer", torch_dtype=torch.bfloat16)
    bare = bare_step(run.trainer, denoiser.to(run.trainer.step.device))
    batches = run.trainer.batches()
    times: dict[str, list[list[float]]] = {"trainer": [], "bare": []}
    with quiet.bar("training", 1) as bar:
        for _ in range(rounds + 1):
            for name, step in (("trainer", lambda: run.trainer.advance(batches, bar)), ("bare", bare)):
                taken = []
                for _ in range(steps):
                    began = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - began)
                times[name].append(taken)
    batches.close()
    kept = {name: all_rounds[1:] for name, all_rounds in times.items()}
    medians = {name: statistics.median(value for taken in all_rounds for value in taken) for name, all_rounds in kept.items()}
    ratios = sorted(statistics.median(ours) / statistics.median(theirs) for ours, theirs in zip(kept["trainer"], kept["bare"]))
    return {
        "parameters": sum(parameter.numel() for parameter in run.denoiser.parameters()),
        "trainable": sum(parameter.numel() for parameter in run.trainer.parameters),
        "rounds": rounds,
        "steps_per_round": steps,
        "trainer_seconds": medians["trainer"],
        "bare_seconds": medians["bare"],
        "ratio": medians["trainer"] / medians["bare"],
        "ratio_by_round": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="steps of each per round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    target = arguments.json.resolve() if arguments.json else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder / "model")
        write_files(folder)
        figures = measure(folder, arguments.rounds, arguments.steps)
        os.chdir(ROOT)
    spread = figures["ratio_by_round"]
    sizes = f"{figures['parameters'] / 1e6:.1f} M parameters, LoKr of {figures['trainable'] / 1e3:.0f} k"
    print(f"AuraFlow of {sizes}, batch {BATCH}, {PICTURE_PX} px, bf16")
    print(f"trainer    {figures['trainer_seconds'] * 1e3:8.1f} ms a step (median)")
    print(f"bare loop  {figures['bare_seconds'] * 1e3:8.1f} ms a step (median)")
    print(f"ratio      {figures['ratio']:8.3f}   by round {spread['min']:.3f} .. {spread['median']:.3f} .. {spread['max']:.3f}")
    if target:
        target.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

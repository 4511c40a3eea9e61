"""The plan's step against a real one, counted by the same tracker: real weights, real noise, real optimizer, the second step of two."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.cli.choices import family_defaults, known_names
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import Offload
from simpletuner.memory.residency import DTYPES, weight_dtype
from simpletuner.memory.settle import recipe_of
from simpletuner.memory.tracker import Tracker
from simpletuner.models.offline import shapes
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.catalogue import find
from simpletuner.optim.rules import trains_in
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.gradients import clip
from simpletuner.training.objective import loss_of
from simpletuner.training.plan import PROGRAM_BYTES, Planner, plan_run
from simpletuner.training.plan_step import EVERYWHERE_BYTES, UPDATE_BYTES, Training, shaped_batch, update_of
from simpletuner.training.step import Step
from tests.training.families import TINY, options_of

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "lokr": {"lora_type": "lycoris"},
    "lora": {"lora_type": "standard", "lora_rank": 4},
    "full": {"model_type": "full"},
}


def config_of(name: str, folder: Path, kind: str = "lokr", **options: Any) -> TrainConfig:
    (folder / "lycoris.json").write_text(
        json.dumps(
            {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}
        )
    )
    given = {
        **options_of(name),
        "model_type": "lora",
        **KINDS[kind],
        "mixed_precision": "no",
        "data_backend_config": str(folder / "none.json"),
        "output_dir": str(folder / "output"),
        **({"lycoris_config": str(folder / "lycoris.json")} if kind == "lokr" else {}),
        **options,
    }
    given["pretrained_model_name_or_path"] = str(given.pop("model"))
    settings = [Setting(key, value, "the test") for key, value in given.items() if value is not None]
    return load_config(settings, family_defaults, choices=known_names(), environ={}).config


def measured(config: TrainConfig, size: Any, count: int) -> int:
    """The most bytes alive in the second step of a real run."""
    family = build_family(config)
    adapter = build_adapter(config, family)
    process = family.process(config.diffusion)
    text = shapes(family).text
    dtype = weight_dtype(config.memory)
    trained = DTYPES[trains_in(config.optim, config.memory)]
    autocast = torch.autocast("cpu", dtype) if adapter.trains_base and dtype != trained else nullcontext()
    with Tracker() as tracker:
        encode = trained_text(family, adapter, config.memory, tracker) if config.adapters.train_text_encoder else None
        recipe = recipe_of(config.memory.base_model_precision, dtype, CPU, family.delicate_layers)
        denoiser = family.load_denoiser(trained, 0) if adapter.trains_base else family.load_frozen(recipe, 0)
        adapter.attach(denoiser)
        enable_checkpointing(denoiser.train(), config.memory)
        tracker.name([*denoiser.parameters(), *denoiser.buffers(), *adapter.parameters().values()], "kept")
        optimizer = build_optimizer(config.optim, adapter.parameters())
        step = Step(family, denoiser, adapter, process, loss_of(config.diffusion, process), CPU, 1, 0, draws_latents=True, encode=encode)
        for number in range(2):
            tracker.restart()
            with autocast:
                loss = step.losses(shaped_batch(family, text, size, count), number, 0).mean()
            loss.backward()
            clip(list(adapter.parameters().values()), 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak


def trained_text(family: Any, adapter: Any, memory: Any, tracker: Tracker) -> Any:
    """What encodes captions with text encoders that are trained."""
    encoders = family.load_text_encoders(CPU, weight_dtype(memory))
    for module in family.text_modules(encoders):
        tracker.name([*module.parameters(), *module.buffers()], "kept")
    adapter.attach_text(family.text_networks(encoders))
    for module in family.adaptable_encoders(encoders).values():
        if memory.gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.train(True)
    return lambda prompts, cached: family.encode_trained(encoders, prompts, {})


def off_by(config: TrainConfig, name: str, count: int) -> float:
    size = TINY[name].size
    found = measured(config, size, count)
    return abs(Planner(config, size, count, "cpu").count_denoiser().step.peak - found) / found


CASES = list(itertools.islice(itertools.cycle(itertools.product(KINDS, (False, True), (1, 2))), len(TINY)))


@pytest.mark.parametrize(("name", "case"), list(zip(TINY, CASES)), ids=list(TINY))
def test_the_plan_of_a_step_is_within_five_percent_for_every_family(tmp_path, name, case):
    kind, checkpointing, count = case

    assert off_by(config_of(name, tmp_path, kind, gradient_checkpointing=checkpointing), name, count) < 0.05


@pytest.mark.parametrize("kind", ["lokr", "lora"])
@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto", "int8-torchao", "int8-rotated"])
def test_the_plan_of_quantised_weights_is_the_librarys_own(tmp_path, kind, precision):
    config = config_of("flux", tmp_path, kind, base_model_precision=precision, gradient_checkpointing=kind == "lora", mixed_precision="bf16")

    assert off_by(config, "flux", 2) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "kind": "full"},
        {"mixed_precision": "bf16", "kind": "full", "optimizer": "adamw_bf16"},
        {"kind": "full", "optimizer": "muon"},
        {"kind": "lora", "optimizer": "optimi-lion"},
    ],
    ids=["autocast", "bf16", "muon", "lion"],
)
def test_the_plan_knows_of_autocast_and_of_what_optimizers_remember(tmp_path, options):
    assert off_by(config_of("auraflow", tmp_path, **options), "auraflow", 2) < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd1x"])
def test_what_trained_text_encoders_leave_for_the_backward_pass_is_counted(tmp_path, name, checkpointing):
    config = config_of(name, tmp_path, "lora", train_text_encoder=True, gradient_checkpointing=checkpointing)

    assert off_by(config, name, 2) < 0.05


@pytest.mark.parametrize("row", [find(name) for name in (*UPDATE_BYTES, *EVERYWHERE_BYTES)], ids=lambda row: row.name)
def test_what_optimizers_take_while_they_step_is_known(row):
    module, name = row.where.split(":")
    kind = getattr(importlib.import_module(module), name)
    parameters = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(8)]
    many_at_once = {"foreach": True} if "foreach" in inspect.signature(kind).parameters else {}
    optimizer = kind([{"params": parameters, "initial_lr": 1e-3}], lr=1e-3, **many_at_once)
    getattr(optimizer, "train", lambda: None)()  # schedule-free ones are told
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with Tracker() as tracker:
            optimizer.step()

    assert tracker.peak / (8 * 64 * 64) == pytest.approx(update_of(row.name, "cuda", in_bf16=False)[0], rel=0.05)


def test_an_update_takes_all_tensors_or_as_many_as_go_at_once():
    assert Training(update_bytes=4).update([10, 20]) == 120
    assert Training(update_bytes=4, update_numbers=25).update([10, 20]) == 100
    assert Training(update_bytes=4, update_numbers=5).update([10, 20]) == 80  # the largest is never parted
    assert Training(update_bytes=4).update([]) == 0


def test_gradients_that_are_released_are_not_there_all_at_once(tmp_path):
    options = {"optimizer": "adamw_bf16", "mixed_precision": "bf16", "max_grad_norm": 0.0}
    kept, released = (
        Planner(
            config_of("auraflow", tmp_path, "full", optimizer_release_gradients=releases, **options), TINY["auraflow"].size, 1, "cpu"
        ).count_denoiser()
        for releases in (False, True)
    )

    assert released.step.peak < kept.step.peak - kept.step.trained  # half of the gradients at least


def test_an_assistant_is_counted_whether_it_is_here_or_not(tmp_path):
    without = plan_run(config_of("flux", tmp_path, "lora"), TINY["flux"].size, 1)
    elsewhere = plan_run(config_of("flux", tmp_path, "lora", assistant_lora_path="somebody/assistant"), TINY["flux"].size, 1)

    assert elsewhere.phase("step").parts["weights"] > without.phase("step").parts["weights"]
    assert any("somebody/assistant is not on this machine" in note for note in elsewhere.notes)


def test_weights_that_wait_are_counted_as_the_offload_counts_them(tmp_path):
    config = config_of("flux", tmp_path, "lora", blocks_to_swap=2)
    family = build_family(config)
    denoiser = family.load_frozen(recipe_of("no_change", torch.float32, CPU), 0)
    build_adapter(config, family).attach(denoiser)
    offload = Offload(denoiser, config.memory, CPU)

    found = Planner(config, TINY["flux"].size, 1, "cuda").count_denoiser().offload
    stand_in = config_of("flux", tmp_path, "lora", base_model_precision="nf4-bnb")
    waiting = [one.waiting for one in Planner(stand_in, TINY["flux"].size, 1, "cuda").weights_with([stand_in.memory, config.memory])]

    assert found.waiting == offload.waiting_bytes
    assert found.resident == offload.resident_bytes
    assert found.host >= found.waiting
    assert waiting[1] > waiting[0] == 0


def test_blocks_inputs_that_wait_in_main_memory_leave_the_card(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_offload_bytes": 0}
    here, aside = (
        Planner(config_of("flux", tmp_path, "lora", gradient_checkpointing_backend=backend, **options), TINY["flux"].size, 2, "cuda").count_denoiser()
        for backend in ("torch", "offload")
    )

    assert aside.step.peak < here.step.peak
    assert aside.step.host > here.step.host == 0


def test_on_the_cpu_all_of_it_is_main_memory(tmp_path):
    config = config_of("auraflow", tmp_path, validation_prompt="a cat", validation_resolution="32")
    card, here = (plan_run(config, TINY["auraflow"].size, 1, device) for device in ("cuda", "cpu"))

    assert [phase.name for phase in card.phases] == ["text", "vae", "load", "step", "validation", "save"]
    assert here.peak_vram_bytes == 0 and here.card_bytes == 0
    for name in ("text", "load", "step", "save"):  # where there is a VAE, its numbers are wider on the CPU
        assert here.phase(name).ram_bytes == card.phase(name).vram_bytes + card.phase(name).ram_bytes
    assert all(phase.ram_bytes >= PROGRAM_BYTES for phase in card.phases)


def test_what_stays_while_the_denoiser_is_trained_is_counted_in_the_step(tmp_path):
    config = config_of("sd1x", tmp_path, "lora", keep_vae_loaded=True, train_text_encoder=True, validation_prompt="a cat", validation_resolution="32")

    plan = plan_run(config, TINY["sd1x"].size, 1)

    step, text, vae = (plan.phase(name).parts for name in ("step", "text", "vae"))
    assert (step["text encoders"], step["VAE"]) == (text["weights"], vae["weights"])
    assert plan.phase("validation").parts["VAE"] == 0  # not once more


def test_the_parts_of_a_step_add_up(tmp_path):
    config = config_of("flux", tmp_path, "lora", use_ema=True, gradient_accumulation_steps=2)
    step = plan_run(config, TINY["flux"].size, 1).phase("step")

    assert sum(step.parts.values()) == step.vram_bytes
    assert set(step.parts) == {"weights", "adapter", "gradients", "optimizer", "average", "activations", "temporaries"}
    assert step.parts["optimizer"] == 2 * step.parts["adapter"] == 2 * step.parts["average"] == 2 * step.parts["gradients"]

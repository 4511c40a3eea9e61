"""Runs with the further objectives: they start, resume exactly, and their pictures are those of others who load what was trained."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.options.diffusion import Diffusion
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.training.families import family, options_of

ROLLING = {"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_probability": 0.7}
HUBER = {"loss_type": "huber", "huber_c": 0.2}
TLORA = {"algo": "tlora", "linear_dim": 6, "linear_alpha": 6, "tlora_min_rank": 2, "apply_preset": {"target_module": ["Attention"]}}
RUNS = {
    "rollouts with ReflexFlow": ("auraflow", ROLLING),
    "rollouts on a ramp, in an epsilon model": ("sdxl", {**ROLLING, "scheduled_sampling_ramp_steps": 4, "scheduled_sampling_prob_end": 1.0, **HUBER}),
    "Diff2Flow": ("sdxl", {"diff2flow_enabled": True, "diff2flow_loss": True, "snr_gamma": 5, "max_train_steps": 4, "checkpoint_step_interval": 2}),
    "guidance of a range, few levels": ("flux", {"flux_guidance_mode": "random-range", "flux_fast_schedule": True, **HUBER}),
    "T-LoRA, rolled out": ("auraflow", {**ROLLING, "tlora": True}),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write(folder: Path, name: str, tlora: bool = False, **options) -> None:
    write_run(folder, **{**options_of(name), **options})
    if tlora:
        (folder / "lycoris_config.json").write_text(json.dumps(TLORA))


@pytest.mark.parametrize(("name", "options"), RUNS.values(), ids=RUNS)
def test_a_resumed_run_gives_the_same_bytes_and_a_plain_one_others(tmp_path, name, options):
    write(tmp_path / "whole", name, **options)
    assert train_in_process(tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    last = max((tmp_path / "resumed" / "output").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    (tmp_path / "resumed" / "output" / "pytorch_lora_weights.safetensors").unlink()

    assert train_in_process(tmp_path / "resumed") == 0

    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")
    kept = {key: value for key, value in options.items() if key in ("tlora", "max_train_steps", "checkpoint_step_interval")}
    write(tmp_path / "plain", name, **kept)
    assert train_in_process(tmp_path / "plain") == 0
    tensors, others = (load_file(tmp_path / run / "output" / "pytorch_lora_weights.safetensors") for run in ("whole", "plain"))
    assert any(not torch.equal(value, others[key]) for key, value in tensors.items())


def test_pictures_of_a_t_lora_are_masked_at_every_step_as_its_snippet_masks_them(tmp_path, capsys):
    looking = {"validation_prompt": "a cat", "validation_seed": 11, "validation_resolution": "32", "validation_num_inference_steps": 3}
    write(tmp_path, "auraflow", tlora=True, learning_rate=0.5, **looking)
    assert train_in_process(tmp_path) == 0
    said = capsys.readouterr().out
    snippet = said[said.index("import torch") : said.index('image.save("picture.png")')]
    assert "another adapter" in snippet

    ours = numpy.asarray(Image.open(tmp_path / "output" / "validation_images" / "step_00006_validation_11_32x32.png")).astype(int)
    before = Path.cwd()
    os.chdir(tmp_path)
    gc.freeze()  # the library sweeps for garbage with each module that it loads
    try:
        masked, unmasked = {}, {}
        exec(snippet, masked)
        exec(snippet.replace("pipeline.transformer.register_forward_pre_hook(mask_ranks, with_kwargs=True)", "set_timestep_mask(None)"), unmasked)
    finally:
        gc.unfreeze()
        os.chdir(before)

    shown, other = (numpy.asarray(names["image"]).astype(int) for names in (masked, unmasked))
    assert (shown != ours).mean() < 0.02 and (other != ours).mean() > 0.1


def test_the_options_of_a_unet_reach_its_process_and_its_sampler():
    built = family("sdxl")
    options = Diffusion(snr_gamma=5, snr_weight=2, refiner_training=True, refiner_training_strength=0.3, diff2flow_enabled=True, diff2flow_loss=True)

    process = built.process(options)

    assert (process.snr_gamma, process.snr_weight, process.learns_flow, sum(process.weights)) == (5, 2, True, 300)
    assert not built.process(Diffusion(diff2flow_enabled=True)).learns_flow
    for spacing in ("leading", "trailing", "linspace"):
        assert built.sampling_schedule(Diffusion(inference_scheduler_timestep_spacing=spacing)).config.timestep_spacing == spacing

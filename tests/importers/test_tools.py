"""`simpletuner import kohya | ai-toolkit | onetrainer`: their files as ours, checked by the readers of a run."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpletuner.adapters.lycoris_file import read_lycoris
from simpletuner.cli.choices import family_defaults, idle_of, known_names
from simpletuner.cli.main import main
from simpletuner.data.plan import load_plan
from simpletuner.errors import ConfigError
from simpletuner.importers import ai_toolkit_keys, kohya_flags, onetrainer_keys
from simpletuner.importers.importer import Imported
from simpletuner.importers.rates import ARGUMENTS
from simpletuner.importers.settings import OTHERWISE, Settings, read_settings, typed
from simpletuner.importers.tools import ai_toolkit, kohya, onetrainer
from simpletuner.optim.catalogue import find
from simpletuner.options.load import load_config
from simpletuner.options.sources import read_file
from simpletuner.options.train_config import declared
from tests.builders.run import add_pictures
from tests.training.families import model

EXAMPLES = Path(__file__).parent / "examples"
FOLDERS = ("style/paintings", "style/sketches", "subject", "pictures", "train/10_sks cat", "reg/1_cat")
FOLDERS += ("images/person", "images/masks", "images/style", "images/cat", "images/cats", "images/all", "images/held-out")
FILES = {
    "kohya": ("kohya_sdxl_lora.toml", "kohya_flux_lokr.sh", "kohya_sd15_dreambooth.toml", "kohya_sdxl_finetune.toml"),
    "ai-toolkit": ("ai_toolkit_flux_lora.yaml", "ai_toolkit_qwen_lokr.yaml", "ai_toolkit_sdxl_lora.json", "ai_toolkit_flux_full.yaml"),
    "onetrainer": ("onetrainer_sdxl_lora.json", "onetrainer_flux_lora.json", "onetrainer_zimage_lokr.json", "onetrainer_sd15_finetune.json"),
}
TOOLS = {"kohya": kohya.Kohya, "ai-toolkit": ai_toolkit.AiToolkit, "onetrainer": onetrainer.OneTrainer}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the examples, and the folders of pictures that they name, three in each and nine of regularisation."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        for number in range(9 if folder.startswith("reg") else 3):
            (tmp_path / folder / f"{number}.png").touch()
        if folder not in ("subject", "images/style", "train/10_sks cat", "reg/1_cat"):
            (tmp_path / folder / "0.txt").write_text("a caption")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(tool: str, file: str) -> Imported:
    return TOOLS[tool]().read([file], {})


def has(config: dict[str, Any], **expected: Any) -> bool:
    assert {key: config.get(key) for key in expected} == expected
    return True


@pytest.mark.parametrize(("tool", "file"), [(tool, file) for tool, files in FILES.items() for file in files])
def test_what_is_written_is_read_by_a_run_and_every_option_has_an_effect(here, tool, file, capsys):
    assert main(["import", tool, file, "--output", "made"]) == 0

    settings, _ = read_file(Path("made/config.json"), {})
    settings = [setting for setting in settings if not str(setting.value).endswith(".safetensors")]  # which are not here
    loaded = load_config(settings, family_defaults, idle_of=idle_of, choices=known_names())
    data = loaded.config.data
    plan = load_plan(data.data_backend_config, data, {"model_family": loaded.config.models.model_family, "output_dir": "output"}, alignment_px=64)

    assert [note for note in loaded.notes if "no effect" in note] == []
    assert plan.pictures
    if loaded.config.adapters.lora_type == "lycoris":
        assert read_lycoris(loaded.config.adapters.lycoris_config).notes == ()
    assert "secret" not in capsys.readouterr().out + "".join(path.read_text() for path in Path("made").iterdir())


def test_kohyas_lora_keeps_its_alpha_its_layers_and_its_units(here):
    found = imported("kohya", "kohya_sdxl_lora.toml")

    assert has(found.config, model_family="sdxl", lora_rank=32, lora_alpha=16, learning_rate=4e-4, max_train_steps=2000, seed=1234, max_grad_norm=0)
    assert has(found.config, checkpoint_step_interval=250, checkpoints_total_limit=5, gradient_accumulation_steps=2, snr_gamma=5, train_batch_size=4)
    assert has(found.config, noise_offset=0.0357, noise_offset_probability=1.0, caption_dropout_probability=0.05, output_dir="output/my-style")
    assert "train_text_encoder" not in found.config and "ff.net.2" in found.config["peft_lora_target_modules"]
    paintings, sketches = found.datasets
    assert has(paintings, repeats=4, instance_prompt="in mystyle,", prepend_instance_prompt=True, caption_strategy="textfile", resolution=1024)
    assert "repeats" not in sketches and has(sketches, caption_tag_dropout=0.1) and sketches["caption_shuffle"]["position_start"] == 1
    assert list(found.prompts.values()) == ["a house in mystyle", "a boat in mystyle"]
    assert has(found.config, validation_negative_prompt="blurry, low quality", validation_resolution="1024x768", validation_guidance=6.5)
    assert any(line.startswith("wandb_api_key (not shown)") for line in found.lost)
    assert any(line.startswith("flip_aug true: pictures are not mirrored") for line in found.lost)


def test_what_kohya_has_by_itself_is_written_where_ours_is_other(here):
    config = "pretrained_model_name_or_path = 'x/sd'\ntrain_data_dir = 'subject'\nresolution = 512\nnetwork_module = 'networks.lora'\n"
    Path("few.toml").write_text(config)

    found = imported("kohya", "few.toml")

    assert has(
        found.config, lora_rank=4, lora_alpha=1.0, learning_rate=2e-6, max_train_steps=1600, mixed_precision="no", gradient_checkpointing=False
    )
    assert has(
        found.config, checkpoint_step_interval=0, caption_dropout_probability=0, train_text_encoder=True, text_encoder_lr=2e-6, lr_warmup_steps=0
    )
    assert has(found.datasets[0], crop=True, crop_aspect="square", crop_style="center")


def test_a_lokr_of_sd_scripts_is_the_same_lokr_here(here):
    found = imported("kohya", "kohya_flux_lokr.sh")

    assert has(found.lycoris, algo="lokr", linear_dim=10000, linear_alpha=10000, factor=12)
    assert has(found.config, flow_schedule_shift=3.1582, flow_sigmoid_scale=1.0, distilled_guidance=1.0, base_model_precision="fp8-quanto")
    assert has(found.config, blocks_to_swap=12, lr_warmup_steps=50, checkpoint_epoch_interval=4, lora_type="lycoris")
    assert has(found.datasets[0], caption_strategy="instanceprompt", instance_prompt="ohwx man", repeats=9)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("", {"flow_use_uniform_schedule": True, "flow_schedule_shift": 3.0, "distilled_guidance": 3.5}),
        ("--timestep_sampling sigmoid --sigmoid_scale 1.2", {"flow_sigmoid_scale": 1.2, "flow_schedule_shift": 1.0}),
        ("--timestep_sampling flux_shift", {"flow_schedule_auto_shift": True}),
        ("--weighting_scheme logit_normal --logit_std 0.8", {"flow_sigmoid_scale": 0.8, "flow_schedule_shift": 3.0}),
        ("--timestep_sampling uniform", {"flow_use_uniform_schedule": True, "flow_schedule_shift": 1.0}),
    ],
)
def test_noise_levels_of_flux_are_drawn_as_sd_scripts_draws_them(here, told, expected):
    needed = "--pretrained_model_name_or_path f --train_data_dir subject --resolution 512 --network_module networks.lora_flux"

    found = kohya.Kohya().read([f"python flux_train_network.py {needed} {told}"], {})

    assert has(found.config, **expected, flux_lora_target="ai-toolkit")


def test_regularisation_folders_are_shown_as_often_as_the_others(here):
    found = imported("kohya", "kohya_sd15_dreambooth.toml")

    subject, kind = found.datasets
    assert has(subject, instance_prompt="sks cat", repeats=9, crop=True, crop_aspect="closest", crop_aspect_buckets=[0.8])
    assert has(kind, instance_prompt="cat", repeats=2)  # 9 pictures thrice are nearly the 3 x 10 of the subject
    assert has(found.config, num_train_epochs=10, checkpoint_epoch_interval=2, lr_warmup_steps=30, lr_num_cycles=3, optimizer="prodigy")
    assert found.config["optimizer_config"] | {"d_coef": 2, "betas": [0.9, 0.99], "weight_decay": 0.01} == found.config["optimizer_config"]
    assert {"conv1", "downsamplers.0.conv"} <= set(found.config["peft_lora_target_modules"])
    assert "shufle_caption true: unknown; did you mean shuffle_caption?" in found.lost
    assert any(line.startswith("prior_loss_weight 0.8") for line in found.lost)


def test_ai_toolkit_splits_a_folder_by_its_sizes_with_masks(here):
    found = imported("ai-toolkit", "ai_toolkit_flux_lora.yaml")

    assert [entry["id"] for entry in found.datasets] == [name for size in (512, 768, 1024) for name in (f"person-{size}", f"person-{size}-masks")]
    assert has(found.datasets[0], resolution=512, repeats=2, instance_prompt="p3r5on", prepend_instance_prompt=True)
    assert has(found.datasets[1], conditioning_type="mask", source_dataset_id="person-512", instance_data_dir="images/masks")
    assert has(found.config, flux_lora_target="ai-toolkit", lora_rank=16, lora_alpha=16, learning_rate=1e-4, base_model_precision="fp8-quanto")
    assert has(found.config, text_encoder_2_precision="fp8-quanto", ema_decay=0.99, validation_on_startup=True, checkpoint_step_interval=250)
    assert has(found.config, optimizer="bnb-adamw8bit", optimizer_config={"betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 1e-4})
    assert found.prompts["prompt_1"] == "p3r5on holding a sign that says 'hello'"


def test_a_step_of_ai_toolkit_that_is_only_a_batch_is_counted_as_one(here):
    found = imported("ai-toolkit", "ai_toolkit_qwen_lokr.yaml")

    assert has(found.config, max_train_steps=1001, checkpoint_step_interval=67, gradient_accumulation_steps=3, validation_step_interval=100)
    assert has(found.lycoris, algo="lokr", linear_dim=10000, factor=8)
    assert has(found.config, base_model_precision="int4-torchao", text_encoder_1_precision="fp8-quanto", optimizer="torch-adamw")
    assert "train.cach_text_embeddings true: unknown; did you mean cache_text_embeddings?" in found.lost
    assert imported("ai-toolkit", "ai_toolkit_sdxl_lora.json").config["max_train_steps"] == 1000


def test_onetrainers_concepts_are_datasets_of_three_kinds(here):
    found = imported("onetrainer", "onetrainer_sdxl_lora.json")

    cat, cats, held_out = found.datasets
    assert has(cat, id="my-cat", resolution=768, repeats=3) and cat["caption_shuffle"]["position_start"] == 2
    assert has(cats, resolution=1024, max_num_samples=100, is_regularisation_data=True) and held_out["dataset_type"] == "eval"
    assert has(found.config, learning_rate=2e-4, text_encoder_lr=5e-5, text_encoder_limit=25.0, lr_end=2e-5, snr_gamma=5, masked_loss_probability=0.9)
    assert has(found.config, checkpoint_step_interval=200, validation_step_interval=25, ema_update_interval=5, lora_alpha=16, lr_warmup_steps=50)
    assert "gradient_checkpoint ON: unknown; did you mean gradient_checkpointing?" in found.lost
    assert any("text_encoder_2_precision nf4-bnb" in line for line in found.lost)


def test_what_onetrainer_has_by_itself_is_written(here):
    flux, full = imported("onetrainer", "onetrainer_flux_lora.json"), imported("onetrainer", "onetrainer_sd15_finetune.json")

    assert has(flux.config, lora_rank=16, lora_alpha=1.0, num_train_epochs=100, lr_warmup_steps=200, flow_schedule_shift=1.8, distilled_guidance=1.0)
    assert has(flux.config, base_model_precision="nf4-bnb", text_encoder_2_precision="fp8wo-torchao", gradient_checkpointing_backend="offload")
    assert has(full.config, model_type="full", learning_rate=4e-5, max_grad_norm=0.0, mixed_precision="fp16", optimizer="bnb-adamw8bit")
    assert full.config["optimizer_config"]["weight_decay"] == 0.05
    lokr = imported("onetrainer", "onetrainer_zimage_lokr.json")
    assert has(lokr.lycoris, algo="lokr", linear_dim=8, factor=16, apply_preset={"target_name": [".*(?:attention|feed_forward)"]})
    assert has(lokr.config, base_model_precision="int8-matmul", optimizer="prodigy_schedulefree", flow_use_uniform_schedule=True)


@pytest.mark.parametrize(
    ("tool", "name", "text", "said"),
    [
        ("kohya", "a.toml", "network_dim = 'many'\nnetwork_module = 'networks.lora'\n", "network_dim many is not a whole number"),
        ("kohya", "a.toml", "x = [", "is not TOML"),
        ("kohya", "a.toml", "[[datasets]]\n", "is a dataset_config"),
        ("kohya", "a.sh", "accelerate launch train_controlnet.py --x", "not a script that can be imported"),
        ("ai-toolkit", "a.yaml", "job: extension\n", "is no job of ai-toolkit"),
        ("ai-toolkit", "a.yaml", "config: {process: [{type: generate}]}", "asks for generate"),
        ("ai-toolkit", "a.yaml", "config: {process: [{type: sd_trainer, model: {arch: wan21, name_or_path: x}}]}", "wan21 is not trained here"),
        ("ai-toolkit", "a.yaml", "config: [", "is not YAML"),
        ("onetrainer", "a.json", "{}", "is no config of OneTrainer"),
        ("onetrainer", "a.json", '{"model_type": "WUERSTCHEN_2"}', "WUERSTCHEN_2 is not trained here"),
        ("onetrainer", "a.json", '{"model_type": "SANA", "training_method": "EMBEDDING"}', "EMBEDDING is not done here"),
    ],
)
def test_a_file_that_is_no_training_is_refused(tmp_path, monkeypatch, tool, name, text, said):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)

    with pytest.raises(ConfigError) as refused:
        imported(tool, name)
    assert said in " ".join(refused.value.message.split())


def test_everything_wrong_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("network_module = 'lora'\nmax_train_steps = 1.5\nmixed_precision = 'fp8'\n")

    assert main(["import", "kohya", "a.toml"]) == 2

    said = " ".join(capsys.readouterr().err.split())
    for problem in (
        "pretrained_model_name_or_path is missing",
        "max_train_steps 1.5 is not",
        "'lora' is not one of",
        "no pictures",
        "'fp8' is not one of",
    ):
        assert problem in said
    assert not Path("config").exists()


OTHER_VALUES = {
    "lr_scheduler": "cosine",
    "mixed_precision": "bf16",
    "loss_type": "l1",
    "log_with": "all",
    "text_encoder_lr": 1e-3,
    "network_args": "rank=1",
}
OTHER_VALUES |= {"optimizer_type": "Prodigy", "optimizer_args": "x=1", "resolution": 64}
WITHOUT_EFFECT = {"caption_separator", "config_file", "zero_terminal_snr"}


def test_every_flag_of_kohya_is_carried_over_or_named(here):
    """Each flag, set to something else than its default, changes the config, the datasets, or a line."""
    needed = {"pretrained_model_name_or_path": "x", "train_data_dir": "subject", "resolution": 512, "network_module": "networks.lora"}

    def read(told: dict[str, Any]) -> Imported:
        Path("a.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        return kohya.Kohya().read(["python", "sdxl_train_network.py", "--config_file", "a.toml"], {})

    before, unsaid = read(needed), []
    for name, (kind, default) in kohya_flags.SCRIPTS["sdxl_train_network.py"].flags.items():
        kind = kind[0] if isinstance(kind, tuple) else kind
        value = OTHER_VALUES.get(name, not default if kind is bool else (default or 0) + 3 if kind in (int, float) else "other")
        if name not in kohya_flags.SILENT | WITHOUT_EFFECT | needed.keys() and name != "dataset_config" and read({**needed, name: value}) == before:
            unsaid.append(name)

    assert unsaid == []


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from places(value, (*place, key))


@pytest.mark.parametrize(("tool", "file"), [("ai-toolkit", "ai_toolkit_qwen_lokr.yaml"), ("onetrainer", "onetrainer_sdxl_lora.json")])
def test_whatever_stands_in_a_place_a_file_is_imported_or_refused(here, tool, file):
    whole = read_settings(Path(file))
    for place in list(places(whole)):
        for value in (None, True, [1]):
            spoilt = copy.deepcopy(whole)
            functools.reduce(lambda part, key: part[key], place[:-1], spoilt)[place[-1]] = value
            Path("spoilt.json").write_text(json.dumps(spoilt))

            with contextlib.suppress(ConfigError):
                imported(tool, "spoilt.json")


def test_no_reason_is_given_for_a_key_that_there_is_not():
    tables = (kohya_flags.DATASET, *(script.flags for script in kohya_flags.SCRIPTS.values()))
    parts = {
        module: [value for name, value in vars(module).items() if name.isupper() and name not in ("NO_EQUAL", "SILENT")]
        for module in (ai_toolkit_keys, onetrainer_keys)
    }

    for module, known in ((kohya_flags, tables), *parts.items()):
        names = {name for table in known if isinstance(table, dict) for name in table}
        assert module.NO_EQUAL.keys() <= names and names >= module.SILENT, module.__name__


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_optimizers_are_those_that_they_have(name):
    row = find(name)
    module, kind = row.where.split(":")
    taken = inspect.signature(getattr(__import__(module, fromlist=[kind]), kind)).parameters

    assert [argument for argument in ARGUMENTS[name].split() if argument not in taken] == []


KEYS = {
    "kohya's sd-scripts": [kohya_flags.DATASET, *(script.flags for script in kohya_flags.SCRIPTS.values())],
    "ai-toolkit": [value for value in vars(ai_toolkit_keys).values() if isinstance(value, dict)],
    "OneTrainer": [value for value in vars(onetrainer_keys).values() if isinstance(value, dict)],
}


@pytest.mark.parametrize("tool", KEYS)
def test_the_documentation_names_keys_of_the_trainer_and_options_of_ours(tool):
    section = (Path(__file__).parents[2] / "docs" / "import.md").read_text(encoding="utf-8").split(f"\n## {tool}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and not line.startswith("| there")]
    theirs = {name for table in KEYS[tool] for name in table}

    assert len(rows) > 10
    for left, right in rows:
        assert set(re.findall(r"`([a-z_0-9]+)`", left)) <= theirs
        assert set(re.findall(r"`([a-z_0-9]+)`", right)) <= set(declared())


def test_numbers_may_be_written_as_text_and_kinds_are_kept():
    assert typed("1e-4", float) == 1e-4 and typed(3.0, int) == 3 and typed("true", bool) is True and typed(2, (float,)) == [2.0]
    for value, kind in (("many", int), (1.5, int), (True, int), ([1], float), ("yes", bool), ("x", dict)):
        with pytest.raises(ValueError):
            typed(value, kind)


def test_what_nobody_asked_for_is_named_unless_it_asks_for_nothing():
    found = Imported()
    told = Settings({"a": 1, "b": False, "c": 5, "d": 2, "bb": 1}, {"a": (int, 0), "b": (bool, True), "c": (int, 5), "d": (int, 0)}, "part.")
    assert told["a"] == 1

    told.leave(found, {"d": "for a reason"}, set())

    assert found.lost == [f"part.b false: {OTHERWISE}", "part.d 2: for a reason", "part.bb 1: unknown; did you mean b?"]


def every(known: Any, **others: Any) -> dict[str, Any]:
    return {name: others.get(name, default) for name, (_, default) in known.items()}


def test_a_config_that_holds_every_key_at_its_default_loses_what_is_not_here_and_nothing_else(here):
    keys = onetrainer_keys
    concept = every(keys.CONCEPT, path="images/cat", image=every(keys.IMAGE), text=every(keys.TEXT))
    old = {"lora_layers", "lora_layer_preset", "save_after", "save_after_unit", "weight_dtype", "min_snr_gamma", "sample_definition_file_name"}
    whole = every(
        keys.TOP,
        training_method="LORA",
        concepts=[concept],
        samples=[every(keys.SAMPLE, prompt="x")],
        **{name: every(keys.PART) for name in keys.PARTS},
    )
    Path("whole.json").write_text(json.dumps({name: value for name, value in whole.items() if name not in old}))

    found = imported("onetrainer", "whole.json")

    assert [line.split(":")[0] for line in found.lost] == [
        "concepts.image.enable_random_flip true",
        "backup_after 30 minutes",
        "sample_after 10 minutes",
    ]


def test_a_config_of_kohya_is_trained_as_imported(tmp_path, monkeypatch):
    """One step of a LoRA with convolutions, and text encoders, on two DreamBooth folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    add_pictures(Path("train/2_sks cat"), 2, (70, 50))
    add_pictures(Path("reg/1_cat"), 2, (70, 50))
    told = {"pretrained_model_name_or_path": str(model("sd1x")), "train_data_dir": "train", "reg_data_dir": "reg", "resolution": "64", "seed": 3}
    told |= {"network_module": "networks.lora", "network_dim": 4, "network_args": ["conv_dim=4", "conv_alpha=1"], "output_name": "cat"}
    told |= {"learning_rate": 1e-4, "max_train_steps": 1, "min_snr_gamma": 5, "enable_bucket": True, "output_dir": "run"}
    Path("cat.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))

    assert main(["import", "kohya", "cat.toml"]) == 0
    assert main(["train", "--env", "cat"]) == 0

    assert Path("run/cat/pytorch_lora_weights.safetensors").is_file()

"""kohya's sd-scripts: train_network.py and its relatives, by their config_file or by the command that starts them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.importers.command_line import Command, choose_program, read_command, read_flags
from simpletuner.importers.hub import use_hub
from simpletuner.importers.importer import Imported, Importer
from simpletuner.importers.kohya_data import Epoch, use_datasets
from simpletuner.importers.kohya_flags import NO_EQUAL, SCRIPTS, SILENT, Script
from simpletuner.importers.kohya_networks import arguments, use_network, use_objective
from simpletuner.importers.pictures import Look, use_looks
from simpletuner.importers.rates import ADAM, FINDS_ITS_RATE, SCHEDULE_FREE, use_optimizer, use_schedule
from simpletuner.importers.settings import Settings, beside, read_settings

LION = {"betas": [0.9, 0.99], "weight_decay": 0.0}
NESTEROV = {"momentum": 0.9, "nesterov": True}
PRODIGY = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
SCHEDULE_FREE_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "": ("torch-adamw", ADAM),
    "adamw": ("torch-adamw", ADAM),
    "adamw8bit": ("bnb-adamw8bit", ADAM),
    "pagedadamw8bit": ("bnb-adamw8bit-paged", ADAM),
    "pagedadamw": ("bnb-adamw-paged", ADAM),
    "pagedadamw32bit": ("bnb-adamw-paged", ADAM),
    "lion": ("lion", LION),
    "lion8bit": ("bnb-lion8bit", LION),
    "pagedlion8bit": ("bnb-lion8bit-paged", LION),
    "sgdnesterov": ("torch-sgd", NESTEROV),
    "sgdnesterov8bit": ("bnb-sgd8bit", NESTEROV),
    "adafactor": ("torch-adafactor", {"weight_decay": 0.0}),
    "prodigy": ("prodigy", PRODIGY),
    "ademamix8bit": ("bnb-ademamix8bit", {}),
    "pagedademamix8bit": ("bnb-ademamix8bit-paged", {}),
    "adamwschedulefree": ("adamw_schedulefree", SCHEDULE_FREE_ADAM),
    "radamschedulefree": ("radam_schedulefree", SCHEDULE_FREE_ADAM),
    "sgdschedulefree": ("sgd_schedulefree", {}),
    "came": ("came", {}),
    "came_pytorch.came": ("came", {}),
    "pytorch_optimizer.came": ("came", {}),
    "prodigyplusschedulefree": ("prodigy_schedulefree", {}),
    "prodigyplus.prodigyplusschedulefree": ("prodigy_schedulefree", {}),
    "prodigyplus.prodigy_plus_schedulefree.prodigyplusschedulefree": ("prodigy_schedulefree", {}),
}
"""Their names in small letters; what each has by itself."""
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
POLYNOMIAL_END = 1e-7
USUAL_LOOK = Look("", width=512, height=512, steps=30, guidance=7.5)
LOOKS: Mapping[str, Look] = {
    "flux": replace(USUAL_LOOK, steps=20, guidance=3.5, guidance_real=1.0),
    "chroma": replace(USUAL_LOOK, steps=20, guidance=1.0),
    "lumina2": replace(USUAL_LOOK, width=1024, height=1024, steps=36, guidance=3.5),
}
"""A sample prompt that says nothing else, of families where it is not the usual one."""
XL, FLUX = re.compile(r"(?:^|[/\\_.-])(?:sd)?xl|sdxl|pony|illustrious|noobai|animagine", re.IGNORECASE), re.compile("flux", re.IGNORECASE)


class Kohya(Importer):
    """Reads a config_file of sd-scripts, or `accelerate launch sdxl_train_network.py ...`."""

    example: ClassVar[str] = "config.toml"

    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        found = Imported()
        script, flags, command, file = understand(words, environ, found)
        model(script, flags, found)
        use_network(script, flags, found)
        epoch = use_datasets(flags, file, found)
        length(flags, command, epoch, found)
        optimizer(flags, found)
        use_objective(script, flags, found)
        precision(script, flags, found)
        looks(flags, file, found)
        publish(flags, found)
        flags.refuse(script.name if file is None else str(file))
        flags.leave(found, NO_EQUAL, SILENT)
        return found


def understand(words: Sequence[str], environ: Mapping[str, str], found: Imported) -> tuple[Script, Settings, Command | None, Path | None]:
    """The script, what it is told, the command, and the file that told it.

    Raises:
        ConfigError: there is no such script or file, or flags are unknown.
    """
    command, given, file = None, {}, None
    if words[0].lower().endswith(".toml") and ".py " not in words[0]:
        file, rest = Path(words[0]), list(words[1:])
    else:
        command = read_command(words, environ)
        if command.program not in SCRIPTS:
            raise choose_program(command.program, SCRIPTS, "A config file is given by itself: simpletuner import kohya config.toml.")
        rest = list(command.words)
    told = SCRIPTS[command.program] if command else None
    known = told.flags if told else {name: row for script in SCRIPTS.values() for name, row in script.flags.items()}
    on_line = read_flags(rest, {name: (str if kind is object else kind, default) for name, (kind, default) in known.items()}, "sd-scripts")
    if command and on_line.get("config_file"):
        file = Path(str(on_line["config_file"]))
        file = file if file.suffix == ".toml" else file.with_name(f"{file.name}.toml")
    if file is not None:
        given = flattened(read_settings(file), file)
    given |= on_line
    script = told or guess(given, file, found)
    flags = Settings(given, script.flags, "", [])
    flags.asked.add("config_file")
    return script, flags, command, file


def flattened(content: Any, file: Path) -> dict[str, Any]:
    """The keys of a config_file, whose sections mean nothing."""
    if "datasets" in content:
        raise ConfigError(
            f"{file} is a dataset_config", hint="Give the config_file of the script, which names it, or the command that starts the script."
        )
    flat = {key: value for key, value in content.items() if not isinstance(value, dict)}
    for section in content.values():
        flat |= section if isinstance(section, dict) else {}
    return flat


def guess(given: Mapping[str, Any], file: Path | None, found: Imported) -> Script:
    """The script that a config_file is meant for, which it does not say."""
    module, model = str(given.get("network_module", "")), str(given.get("pretrained_model_name_or_path", ""))
    kind = "_network" if module else ""
    if "gemma2" in given or module.endswith("lumina"):
        name = f"lumina_train{kind}.py"
    elif "clip_g" in given or module.endswith("sd3"):
        name = f"sd3_train{kind}.py"
    elif "ae" in given or module.endswith("flux") or FLUX.search(model):
        name = f"flux_train{kind}.py"
    elif XL.search(model) or "learning_rate_te2" in given:
        name = f"sdxl_train{kind}.py"
    else:
        name = "train_network.py" if module else "fine_tune.py" if "in_json" in given else "train_db.py"
    found.note(
        f"{file} does not say for which script it is: it is taken for {name}; if not: simpletuner import kohya -- SCRIPT.py --config_file {file}"
    )
    return SCRIPTS[name]


def model(script: Script, flags: Settings, found: Imported) -> None:
    location = flags["pretrained_model_name_or_path"]
    if not location:
        flags.problems.append("pretrained_model_name_or_path is missing")
    family = "sd2x" if script.family == "sd1x" and flags["v2"] else script.family
    if family == "flux" and flags["model_type"] == "chroma":
        family = "chroma"
    found.config |= {"model_family": family, "pretrained_model_name_or_path": location}
    vae = flags["ae"] if family in ("flux", "chroma", "lumina2") else flags["vae"]
    if vae:
        found.config["pretrained_vae_model_name_or_path"] = vae
    for name in ("t5xxl", "gemma2"):
        if name in script.flags and flags.says(name):
            found.lose(f"{name} {flags[name]}: it is taken from the base model; pretrained_t5_model_name_or_path names a folder of a T5")


def length(flags: Settings, command: Command | None, epoch: Epoch, found: Imported) -> None:
    """Steps, epochs, batches, checkpoints. A step of sd-scripts is one of the optimizer, as here."""
    config, processes = found.config, 1
    if command and command.launcher.get("num_processes", "").isdigit():
        processes = max(1, int(command.launcher["num_processes"]))
    if flags["max_train_epochs"]:
        config["num_train_epochs"] = flags["max_train_epochs"]
        flags.asked.add("max_train_steps")
    else:
        config["max_train_steps"] = flags.positive("max_train_steps")
    config |= {
        "gradient_accumulation_steps": flags.positive("gradient_accumulation_steps"),
        "gradient_checkpointing": bool(flags["gradient_checkpointing"] or flags["cpu_offload_checkpointing"]),
        "num_processes": processes,
        "output_dir": "/".join(filter(None, (flags["output_dir"] or "output", flags["output_name"]))),
        "max_grad_norm": flags["max_grad_norm"],
    }
    if flags["cpu_offload_checkpointing"]:
        config["gradient_checkpointing_backend"] = "offload"
    if flags["seed"] is None:
        found.note("there is no seed; here there always is one, 42, which also makes a resumed run the same as one that was not stopped")
    else:
        config["seed"] = flags["seed"]
    checkpoints(flags, found)
    evaluation(flags, found)
    schedule(flags, epoch.steps(config["train_batch_size"] * config["gradient_accumulation_steps"] * processes), found)


def checkpoints(flags: Settings, found: Imported) -> None:
    """When they are written, and how many are kept; nothing but the end is saved there by itself."""
    steps, epochs = flags["save_every_n_steps"] or 0, flags["save_every_n_epochs"] or 0
    if flags["max_train_epochs"] and flags["save_n_epoch_ratio"]:
        epochs = max(1, flags["max_train_epochs"] // flags["save_n_epoch_ratio"])
    found.config |= {"checkpoint_step_interval": steps, **({"checkpoint_epoch_interval": epochs} if epochs else {})}
    kept = []
    if steps:
        kept.append(flags["save_last_n_steps"] // steps + 1 if flags["save_last_n_steps"] else 0)  # those of so many steps, and the newest
    if epochs:
        kept.append(flags["save_last_n_epochs"] or 0)  # counts checkpoints, whatever its name says
    found.config["checkpoints_total_limit"] = sum(kept) if all(kept) else 0
    if len(kept) > 1 and any(kept):
        found.note("save_last_n_steps and save_last_n_epochs count by themselves there; here checkpoints of both kinds are counted together")


def evaluation(flags: Settings, found: Imported) -> None:
    """When held-out pictures are looked at, by the scripts that do."""
    if not any(name in flags.known and flags[name] for name in ("validate_every_n_steps", "validate_every_n_epochs")):
        return
    found.config["eval_steps_interval"] = flags["validate_every_n_steps"] or 0
    if flags["validate_every_n_epochs"]:
        found.config["eval_epoch_interval"] = flags["validate_every_n_epochs"]


def schedule(flags: Settings, of_epoch: int, found: Imported) -> None:
    config, name = found.config, flags["lr_scheduler"]
    total = config.get("max_train_steps") or config["num_train_epochs"] * of_epoch
    if name == "cosine_with_min_lr":
        name, config["lr_end"] = "cosine", float(f"{config['learning_rate'] * (flags['lr_scheduler_min_lr_ratio'] or 0):.12g}")
    if name not in SCHEDULES:
        found.lose(f"lr_scheduler {name}: there is no such schedule; it is constant now")
        name = "constant"
    warmup = flags["lr_warmup_steps"]
    use_schedule(found, name, 0 if name == "constant" else warmup, total, "lr_warmup_steps")
    if name == "constant" and warmup:
        found.note(f"lr_warmup_steps {warmup:g}: lr_scheduler constant ignores it there; constant_with_warmup would not")
    if name == "polynomial":
        config |= {"lr_power": flags["lr_scheduler_power"], "lr_end": POLYNOMIAL_END}
    if name == "cosine_with_restarts":
        config["lr_num_cycles"] = flags["lr_scheduler_num_cycles"]


def optimizer(flags: Settings, found: Imported) -> None:
    asked = flags["optimizer_type"]
    asked = "AdamW8bit" if flags["use_8bit_adam"] else "Lion" if flags["use_lion_optimizer"] else asked
    told = arguments(flags["optimizer_args"])
    ours = use_optimizer(found, asked, OPTIMIZERS, told, "optimizer_type")
    if asked.lower() == "adafactor" and told.get("relative_step", True):
        found.config["optimizer_config"] = {"weight_decay": 0.0}
        found.lose("optimizer_type AdaFactor, relative_step: it finds its own rate there, learning_rate holds here; usual is 1e-4")
    if ours in SCHEDULE_FREE and found.config["lr_scheduler"] != "constant":
        found.note(f"{ours} wants no schedule; lr_scheduler {found.config['lr_scheduler']} is kept as it was")
    if ours in FINDS_ITS_RATE and found.config.get("text_encoder_lr") == found.config["learning_rate"]:
        found.config.pop("text_encoder_lr")


def precision(script: Script, flags: Settings, found: Imported) -> None:
    config, said = found.config, flags["mixed_precision"]
    if said not in ("no", "fp16", "bf16"):
        flags.problems.append(f"mixed_precision {said!r} is not one of no, fp16, bf16")
    config |= {"mixed_precision": said, "vae_dtype": "fp32" if said == "no" or flags["no_half_vae"] else said}
    if flags["fp8_base"] or flags["fp8_base_unet"]:
        if script.trains == "lora":
            config["base_model_precision"] = "fp8-quanto"
        else:
            found.lose("fp8_base: a model of which all weights are trained is not held in 8 bits")
    if flags["blocks_to_swap"]:
        config["blocks_to_swap"] = flags["blocks_to_swap"]
        if script.trains == "full":
            config.pop("blocks_to_swap")
            found.lose(f"blocks_to_swap {flags['blocks_to_swap']}: only blocks of a frozen base wait in main memory")
    if flags["torch_compile"]:
        config["dynamo_backend"] = "inductor"
    config["vae_batch_size"] = flags["vae_batch_size"]


def looks(flags: Settings, file: Path | None, found: Imported) -> None:
    """Trackers, and pictures of sample prompts."""
    config = found.config
    with_ = flags["log_with"] or ("tensorboard" if flags["logging_dir"] else None)
    if with_:
        config |= {"report_to": with_}
        ours = {"logging_dir": "logging_dir", "log_tracker_name": "tracker_project_name", "wandb_run_name": "tracker_run_name"}
        config |= {key: flags[name] for name, key in ours.items() if flags[name]}
    if not flags["sample_prompts"]:
        return
    place = beside(flags["sample_prompts"], file)
    if not place.is_file():
        found.lose(f"sample_prompts {flags['sample_prompts']}: it is not here; write its prompts into a user_prompt_library")
        return
    use_looks(found, prompts_of(place, config["model_family"]))
    epochs = flags["sample_every_n_epochs"]
    if epochs:  # which win there
        config |= {"validation_step_interval": 0, "validation_epoch_interval": epochs}
    else:
        config["validation_step_interval"] = flags["sample_every_n_steps"] or 0
    config["validation_on_startup"] = bool(flags["sample_at_first"])


def publish(flags: Settings, found: Imported) -> None:
    """The hub: there each checkpoint is uploaded, and training waits for it unless it is told otherwise."""
    if flags["training_comment"]:
        found.config["modelspec_comment"] = flags["training_comment"]
    if not flags["huggingface_repo_id"]:
        return
    use_hub(found, flags["huggingface_repo_id"], flags["huggingface_repo_visibility"] != "public")
    if found.config["checkpoint_step_interval"] or "checkpoint_epoch_interval" in found.config:
        found.config |= {"push_checkpoints_to_hub": True, "push_to_hub_background": bool(flags["async_upload"])}
    if flags["huggingface_repo_type"] in (None, "model"):
        return
    found.lose(f"huggingface_repo_type {flags['huggingface_repo_type']}: results are uploaded to a repository of a model")


def prompts_of(place: Path, family: str) -> list[Look]:
    """The prompts of a .txt, .toml or .json file."""
    if place.suffix == ".txt":
        lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines()]
        return [look_of(line, family) for line in lines if line and not line.startswith("#")]
    content = read_settings(place)
    if isinstance(content, Mapping):
        shared = content.get("prompt", {})
        own = [{**{key: value for key, value in shared.items() if key != "subset"}, **subset} for subset in shared.get("subset", [])]
    else:
        own = [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in content]
    usual = LOOKS.get(family, USUAL_LOOK)
    names = {"negative": "negative_prompt", "width": "width", "height": "height", "steps": "sample_steps", "seed": "seed"}
    names |= {"guidance": "guidance_scale", "guidance_real": "scale"} if family == "flux" else {"guidance": "scale"}
    return [
        replace(usual, prompt=str(item["prompt"]), **{to: item[name] for to, name in names.items() if name in item})
        for item in own
        if "prompt" in item
    ]


def look_of(line: str, family: str) -> Look:
    """One line: a prompt, and behind it flags: w h width and height, d seed, l guidance, s steps, n negative prompt.

    Of Flux g is the guidance that the model is told, and l the real one; elsewhere g has no effect.
    """
    prompt, *told = re.split(r"\s--(?=[a-zA-Z]\s)", line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    kinds: dict[str, tuple[str, type]] = {"w": ("width", int), "h": ("height", int), "d": ("seed", int), "s": ("steps", int), "n": ("negative", str)}
    kinds |= {"g": ("guidance", float), "l": ("guidance_real", float)} if family == "flux" else {"l": ("guidance", float)}
    for word in told:
        letter, _, value = word.partition(" ")
        if letter.lower() in kinds:
            name, kind = kinds[letter.lower()]
            with contextlib.suppress(ValueError):  # as they do
                values[name] = kind(value.strip())
    return replace(LOOKS.get(family, USUAL_LOOK), **values)

"""`simpletuner export` and `merge`: every family and kind of adapter, in every format, read as its readers read it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters import weights
from simpletuner.adapters.formats.diffusers import settings
from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.original_names import LOKR_IN_DIFFUSERS
from simpletuner.adapters.ranks import RankRule
from simpletuner.adapters.reading import read_changes
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.training.export import FORMATS, check, export
from simpletuner.training.finished import Finished, open_finished
from simpletuner.training.merge import merge_full
from simpletuner.training.probe import make_probe
from tests.builders.finished import write_finished
from tests.builders.stable_diffusion import build_tiny_sd1
from tests.training.families import TINY, family, model, pipeline_of

PRESET = {"target_module": ["Attention", "FeedForward"]}
KINDS: dict[str, dict[str, Any]] = {
    "lokr": {"lycoris": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "apply_preset": PRESET}},
    "lokr, low rank": {"lycoris": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1.5, "factor": 4, "apply_preset": PRESET}},
    "loha": {"lycoris": {"algo": "loha", "linear_dim": 4, "linear_alpha": 3, "apply_preset": PRESET}},
    "lora of lycoris": {"lycoris": {"algo": "lora", "linear_dim": 4, "linear_alpha": 1, "apply_preset": PRESET}},
    "dora of lycoris": {"lycoris": {"algo": "lora", "linear_dim": 4, "linear_alpha": 1, "weight_decompose": True, "apply_preset": PRESET}},
    "glora": {"lycoris": {"algo": "glora", "linear_dim": 4, "linear_alpha": 1, "apply_preset": PRESET}},
    "diag-oft": {"lycoris": {"algo": "diag-oft", "linear_dim": 4, "rescaled": True, "apply_preset": PRESET}},
    "boft": {"lycoris": {"algo": "boft", "linear_dim": 4, "apply_preset": {"target_name": ["*to_q"], "use_fnmatch": True}}},
    "dylora": {"lycoris": {"algo": "dylora", "linear_dim": 4, "linear_alpha": 1, "block_size": 2, "apply_preset": PRESET}},
    "full": {"lycoris": {"algo": "full", "apply_preset": PRESET}},
    "tlora": {"lycoris": {"algo": "tlora", "linear_dim": 4, "linear_alpha": 2, "apply_preset": PRESET}},
    "ia3": {"lycoris": {"algo": "ia3", "apply_preset": PRESET}},
    "lora": {"lora_alpha": 6.0, "lora_rank": 4},
    "dora": {"lora_alpha": 6.0, "lora_rank": 4, "use_dora": True},
}
MAIN_KINDS = ("lokr", "lokr, low rank", "lora", "dora")
WITH_EVERY_KIND = ("sdxl", "flux", "auraflow")
"""A U-Net, a model with fused layers, and one with other names alone: what an algorithm does differently shows in these."""
FUSED = ("flux", "flux2", "flux2-dev", "chroma", "sd3", "lumina2", "pixart")
"""Models whose makers keep q, k and v in one layer."""
FUSED_WITH_MLP = ("flux", "chroma")
"""And in some blocks a further layer, which these adapters leave alone."""
FUSED_IN_COMFYUI = ("lumina2",)
"""ComfyUI knows no names for the parts of their fused layers."""


def cannot(name: str, kind: str, layout: str) -> str | None:
    """Why a format cannot hold an adapter, in part; None where it can."""
    if layout in ("kohya", "comfyui") and family(name).original_layout is None:
        return f"format {layout}: its readers load no adapters of this model"
    is_lora = kind in ("lora", "lora of lycoris", "dylora")
    if kind == "ia3" or (kind == "tlora" and layout != "lycoris"):
        return f"{layout} cannot hold"
    reads_lokr = kind.startswith("lokr") and family(name).original_layout in LOKR_IN_DIFFUSERS
    if layout == "diffusers" and not (is_lora or kind.startswith("dora") or reads_lokr):
        return "diffusers cannot hold"
    is_of_all = kind.startswith("dora") or kind == "full"
    fused = {"kohya": FUSED_WITH_MLP if is_of_all else FUSED, "comfyui": FUSED_IN_COMFYUI}.get(layout, ())
    if not is_lora and name in fused:
        return f"{layout} cannot hold"
    return None


def kinds_of(name: str) -> tuple[str, ...]:
    """A LyCORIS and a plain LoRA at least."""
    return tuple(KINDS) if name in WITH_EVERY_KIND else ("lokr", "lora") if TINY[name].is_brief else MAIN_KINDS


def finished_of(folder: Path, name: str, **options: Any) -> Finished:
    """What a run of this family left in `folder`."""
    length = {"tokenizer_max_length": TINY[name].tokenizer_max_length} if TINY[name].tokenizer_max_length else {}
    config = write_finished(folder, model_family=TINY[name].family or name, pretrained_model_name_or_path=str(model(name)), **length, **options)
    return open_finished(folder, config, has_settings=True)


class Silent:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TINY for kind in kinds_of(name)])
def test_every_format_is_read_to_what_was_trained_or_refused_with_a_way_out(tmp_path, name, kind):
    finished = finished_of(tmp_path / "run", name, **KINDS[kind])

    for layout in FORMATS:
        file, reason = tmp_path / f"{layout}.safetensors", cannot(name, kind, layout)
        if reason:
            with pytest.raises(ConfigError, match=reason) as refused:
                export(finished, layout, file, checks=False, console=Silent())
            assert "ormat" in refused.value.hint or "merge" in refused.value.hint
            assert not file.exists()
            continue
        export(finished, layout, file, checks=False, console=Silent())
        checked = check(finished, layout, file)
        assert (checked.missing, checked.unused) == ((), ())
        assert checked.comparison.effect > 20 * checked.comparison.difference, (layout, checked.said())
        assert checked.is_good


READ_BY_DIFFUSERS_TOO = ("sd1x", "sdxl")
"""Families whose pipelines also read kohya's layout; that of Flux does for models of the real width alone (see test_formats)."""


@pytest.mark.parametrize("name", READ_BY_DIFFUSERS_TOO)
def test_diffusers_reads_kohyas_layout_to_what_was_trained(tmp_path, name):
    finished = finished_of(tmp_path / "run", name, **KINDS["lora"])
    export(finished, "kohya", tmp_path / "lora.safetensors", checks=False, console=Silent())
    pipeline, probe = pipeline_of(name), make_probe(finished.family, finished.config.diffusion)
    denoiser = getattr(pipeline, finished.layout.folder)
    base = probe(denoiser)

    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")

    effect = probe(finished.trained()) - base
    assert (probe(denoiser) - base - effect).abs().max() < 1e-3 * effect.abs().max()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", ["lora", "lokr, low rank", "dora"])
@pytest.mark.parametrize("name", ["sdxl", "flux", "auraflow"])
def test_a_run_goes_on_from_a_file_of_any_format(tmp_path, name, kind, layout):
    finished = finished_of(tmp_path / "run", name, **KINDS[kind])
    if cannot(name, kind, layout):
        return
    export(finished, layout, tmp_path / "file.safetensors", checks=False, console=Silent())
    probe = make_probe(finished.family, finished.config.diffusion)
    trained, again = probe(finished.trained()), finished.base()
    finished.adapter.attach(again)

    finished.adapter.load(tmp_path / "file.safetensors")

    finished.adapter.train(False)
    effect = trained - probe(finished.base())
    assert (probe(again) - trained).abs().max() < 1e-3 * effect.abs().max()


def test_a_lora_of_another_alpha_keeps_its_effect_in_a_run_of_ours(tmp_path):
    """A file of diffusers says its alpha in the header alone; ours has another."""
    theirs = finished_of(tmp_path / "theirs", "auraflow", lora_alpha=1.0, lora_rank=4, size=0.5)
    ours = finished_of(tmp_path / "ours", "auraflow", lora_alpha=8.0, lora_rank=4)
    probe, denoiser = make_probe(ours.family, ours.config.diffusion), ours.base()
    ours.adapter.attach(denoiser)

    ours.adapter.load(tmp_path / "theirs")

    ours.adapter.train(False)
    expected = probe(theirs.trained())
    assert (probe(denoiser) - expected).abs().max() < 1e-3 * (expected - probe(theirs.base())).abs().max()


def test_an_adapter_for_another_model_is_refused_by_name(tmp_path):
    flux = finished_of(tmp_path / "flux", "flux", **KINDS["lora"])
    auraflow = finished_of(tmp_path / "auraflow", "auraflow", **KINDS["lora"])

    with pytest.raises(ConfigError, match=r"no adapter for AuraFlowTransformer2DModel.*says that it is for tiny-flux"):
        read_changes(flux.path, auraflow.layout, "AuraFlowTransformer2DModel")


def test_layers_of_text_encoders_are_refused_by_name(tmp_path):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS["lora"])
    save_file({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, tmp_path / "file.safetensors")

    with pytest.raises(ConfigError, match="also adapts text encoders"):
        read_changes(tmp_path / "file.safetensors", finished.layout, "U-Net")


def test_a_check_that_finds_another_function_keeps_no_file_and_fails(tmp_path):
    finished = finished_of(tmp_path / "run", "sd1x", **KINDS["lora"])
    parts = {layer: {**parts, "lora_up.weight": parts["lora_up.weight"] * 1.5} for layer, parts in finished.changes.items()}
    wrong = Finished(finished.path, finished.config, finished.family, finished.layout, parts, finished.adapter)

    (tmp_path / "there.safetensors").write_bytes(b"another's")
    with pytest.raises(SimpleTunerError, match="would not be what was trained"):
        export(wrong, "kohya", tmp_path / "file.safetensors", checks=True, console=Silent())
    with pytest.raises(SimpleTunerError, match="would not be what was trained"):
        export(wrong, "kohya", tmp_path / "there.safetensors", checks=True, console=Silent(), overwrites=True)
    with pytest.raises(ConfigError, match="is there already"):
        export(finished, "kohya", tmp_path / "there.safetensors", checks=False, console=Silent())

    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["there.safetensors"] and not list(tmp_path.glob(".*.safetensors"))
    assert (tmp_path / "there.safetensors").read_bytes() == b"another's"


def test_a_check_names_keys_that_its_reader_does_not_know_and_layers_that_it_misses(tmp_path):
    finished = finished_of(tmp_path / "run", "sd1x", **KINDS["lora"])
    export(finished, "kohya", tmp_path / "file.safetensors", checks=False, console=Silent())
    tensors = load_file(tmp_path / "file.safetensors")
    name = next(iter(sorted(tensors))).split(".")[0]
    save_file({key.replace(name + ".", "lora_unet_nowhere."): value for key, value in tensors.items()}, tmp_path / "file.safetensors")

    checked = check(finished, "kohya", tmp_path / "file.safetensors")

    assert len(checked.missing) == 1 and {key.split(".")[0] for key in checked.unused} == {"lora_unet_nowhere"}
    assert not checked.is_good and "1 missing" in checked.said() and "3 unused" in checked.said()


def test_a_file_says_what_it_is_for_and_nothing_of_where_it_was_made(tmp_path):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS["lora"], instance_prompt="a photo of zwx", resolution=1.0, resolution_type="area")

    export(finished, "kohya", tmp_path / "file.safetensors", checks=False, console=Silent())

    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.trigger_phrase"] == "a photo of zwx"
    assert said["modelspec.resolution"] == "1000x1000"
    assert said["modelspec.prediction_type"] == "epsilon"
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "6")
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]
    assert not any(str(tmp_path) in value or value.startswith("/") for value in said.values())


def test_the_size_of_the_network_is_that_of_the_file_and_not_of_the_run(tmp_path):
    """LoRAs of q, k and v that become one have the sum of their ranks."""
    finished = finished_of(tmp_path / "run", "flux", **KINDS["lora"])

    said = {}
    for layout in ("kohya", "comfyui"):
        export(finished, layout, tmp_path / f"{layout}.safetensors", checks=False, console=Silent())
        with safe_open(tmp_path / f"{layout}.safetensors", "pt") as file:
            said[layout] = (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"])

    ranks = Counter(value.shape[0] for key, value in load_file(tmp_path / "kohya.safetensors").items() if key.endswith("lora_down.weight"))
    assert ranks.most_common(1)[0][0] == 12
    assert said == {"kohya": ("12", "12"), "comfyui": ("4", "6")}


def test_a_t_lora_keeps_its_rule_in_the_librarys_layout_and_export_says_who_heeds_it(tmp_path):
    finished, console = finished_of(tmp_path / "run", "sdxl", **KINDS["tlora"]), Silent()
    export(finished, "lycoris", tmp_path / "alone" / "file.safetensors", checks=False, console=console)
    weights.write(tmp_path / "bare.safetensors", load_file(tmp_path / "alone" / "file.safetensors"), {})

    alone, bare = (open_finished(tmp_path / name, finished.config, has_settings=False) for name in ("alone/file.safetensors", "bare.safetensors"))

    assert alone.rank_rule() == finished.rank_rule() == RankRule(most=4, least=1, power=1.0)
    assert "set_timestep_mask" in console.said[0]
    assert bare.rank_rule() is None
    export(bare, "lycoris", tmp_path / "again.safetensors", checks=False, console=console)
    assert "the file holds no rank masks: all ranks are used at all timesteps" in "".join(console.said)


def test_generate_says_that_a_file_alone_holds_no_rank_masks(tmp_path, capfd):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS["tlora"])
    export(finished, "lycoris", tmp_path / "file.safetensors", checks=False, console=Silent())
    weights.write(tmp_path / "bare.safetensors", load_file(tmp_path / "file.safetensors"), {})
    of_model = ["--model_family", "sdxl", "--pretrained_model_name_or_path", str(model("sdxl"))]
    options = ["--validation_resolution", "32", "--validation_num_inference_steps", "1", "--output", str(tmp_path / "pictures")]

    said = {}
    for name in ("file", "bare"):
        assert main(["generate", "a cat", "--adapter", str(tmp_path / f"{name}.safetensors"), *of_model, *options]) == 0
        said[name] = "the file holds no rank masks: all ranks are used at all timesteps" in capfd.readouterr().out

    assert said == {"file": False, "bare": True}


def test_a_check_names_biases_of_which_comfyui_makes_nothing(tmp_path):
    finished = finished_of(tmp_path / "run", "flux", **KINDS["full"])
    export(finished, "comfyui", tmp_path / "file.safetensors", checks=False, console=Silent())
    tensors = load_file(tmp_path / "file.safetensors")
    whole = next(key for key in sorted(tensors) if key.endswith("img_attn.qkv.diff_b"))
    part = "transformer.transformer_blocks.0.attn.to_q.diff_b"
    save_file(
        {**{key: value for key, value in tensors.items() if key != whole}, part: tensors[whole].chunk(3)[0].clone()}, tmp_path / "file.safetensors"
    )

    checked = check(finished, "comfyui", tmp_path / "file.safetensors")

    assert checked.unused == (part,) and not checked.is_good


def test_diffusers_settings_give_each_rank_an_alpha_of_its_own():
    changes = {layer: {"lora_down.weight": torch.zeros(rank, 3)} for layer, rank in (("a", 2), ("b", 4), ("c", 4))}

    said = json.loads(settings(changes, Layout("transformer", None, {})))

    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (4, 4)
    assert said["transformer.rank_pattern"] == said["transformer.alpha_pattern"] == {"a": 2}


@pytest.mark.parametrize("kind", ["lokr", "dora", "diag-oft", "ia3", "tlora", "full"])
def test_a_merged_pipeline_answers_as_the_trained_model(tmp_path, kind, capfd):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS[kind])

    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0

    probe = make_probe(finished.family, finished.config.diffusion)
    merged = pipeline_of("sdxl", tmp_path / "merged").unet
    trained = probe(finished.trained())
    assert (probe(merged) - trained).abs().max() < 1e-3 * (trained - probe(finished.base())).abs().max()
    said = capfd.readouterr().out
    assert "one denoiser call differs by" in said
    assert ("holds no rank masks: all ranks are used at all timesteps" in said) == (kind == "tlora")
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 2


def test_a_checkpoint_of_all_weights_becomes_a_pipeline(tmp_path):
    config = write_finished(tmp_path / "run", model_family="sd1x", pretrained_model_name_or_path=str(model("sd1x")), model_type="full")

    assert main(["export", "--format", "lycoris", str(tmp_path / "run")]) == 2
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0

    found = pipeline_of("sd1x", tmp_path / "merged").unet.state_dict()
    written = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert config.adapters.model_type == "full"
    assert all(torch.equal(found[key], value) for key, value in written.items())


def test_the_command_exports_a_file_alone_of_which_it_is_told_the_model(tmp_path, capfd):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS["lora"])
    export(finished, "diffusers", tmp_path / "alone" / "lora.safetensors", checks=False, console=Silent())
    line = ["export", "--format", "comfyui", "--check", str(tmp_path / "alone" / "lora.safetensors")]

    assert main([*line, "--pretrained_model_name_or_path", str(model("sdxl"))]) == 0

    assert "no key missing or unused" in capfd.readouterr().out
    assert (tmp_path / "alone" / "lora-comfyui.safetensors").is_file()


def test_the_command_exports_a_folder_that_peft_saved_at_its_alpha(tmp_path):
    finished = finished_of(tmp_path / "run", "sdxl", **KINDS["lora"])
    (tmp_path / "peft").mkdir()
    tensors = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    save_file(
        {key.replace("unet.", "base_model.model.", 1): value for key, value in tensors.items()}, tmp_path / "peft" / "adapter_model.safetensors"
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6.0}))
    line = ["export", "--format", "kohya", str(tmp_path / "peft")]

    assert main([*line, "--model_family", "sdxl", "--pretrained_model_name_or_path", str(model("sdxl"))]) == 0

    found = read_changes(tmp_path / "peft" / "peft-kohya.safetensors", finished.layout, "U-Net")
    assert found.keys() == finished.changes.keys()
    assert all(torch.equal(found[layer][part], value) for layer, parts in finished.changes.items() for part, value in parts.items())


def test_the_command_says_what_it_lacks(tmp_path, capfd):
    save_file({"lycoris_x.alpha": torch.ones(())}, tmp_path / "file.safetensors")

    assert main(["export", "--format", "kohya", str(tmp_path / "file.safetensors")]) == 2
    assert "does not say which model it is for" in capfd.readouterr().err
    assert main(["export", "--format", "kohya", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export", "--format", "kohya", str(tmp_path / "empty")]) == 2
    assert "no whole checkpoint" in capfd.readouterr().err


def test_a_finished_pipeline_is_merged_in_the_precision_that_is_asked_for(tmp_path, capfd):
    build_tiny_sd1(tmp_path / "run" / "pipeline")
    config = load_config([Setting("model_family", "sd1x", "a test")], lambda name, flavour, location: {}).config

    for dtype in ("float32", "bfloat16"):
        merge_full(tmp_path / "run", config, tmp_path / dtype, dtype, Silent())

    whole = load_file(tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors")
    same = load_file(tmp_path / "float32/unet/diffusion_pytorch_model.safetensors")
    half = load_file(tmp_path / "bfloat16/unet/diffusion_pytorch_model.safetensors")
    assert whole.keys() == same.keys() == half.keys() and all(torch.equal(whole[name], same[name]) for name in whole)
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)
    assert (tmp_path / "bfloat16/vae/config.json").is_file() and (tmp_path / "bfloat16/model_index.json").is_file()

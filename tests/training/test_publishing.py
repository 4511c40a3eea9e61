"""A run that publishes: what the hub gets, what its page says, and what a failure leaves."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from PIL import Image

from simpletuner.adapters import weights
from simpletuner.console import Console
from simpletuner.errors import ConfigError
from simpletuner.training.building import build_family
from simpletuner.training.card_facts import CardSource, licence_of, losses_of
from simpletuner.training.prompts import Picture
from simpletuner.training.publishing import find_repository, repository_name
from simpletuner.types import Size
from tests.builders.finished import config_of
from tests.builders.hub_server import TOKEN, hub_server
from tests.builders.run import add_pictures, train_in_process, write_run
from tests.reporting.test_hub import point_to

PROMPT = "a | b `c` <b>d</b>"
OPTIONS = {
    "push_to_hub": True,
    "hub_model_id": "studio/portrait",
    "validation_prompt": PROMPT,
    "validation_resolution": "32",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "max_train_steps": 2,
    "checkpoint_step_interval": 1,
    "model_card_note": "A note of *my own*.",
    "modelspec_comment": "the second try",
}


def front_matter(page: str) -> dict:
    return yaml.safe_load(page.split("---\n")[1])


def code_of(page: str) -> str:
    return re.search(r"```python\n(.*?)\n```", page, re.DOTALL)[1]


def test_a_run_is_published_with_a_page_whose_snippet_runs(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, **OPTIONS, push_checkpoints_to_hub=True, push_to_hub_background=False)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    with hub_server() as hub:
        point_to(hub.address, monkeypatch)
        assert train_in_process(tmp_path) == 0

    output, received = tmp_path / "output", hub.repositories["studio/portrait"]
    said = capsys.readouterr().out
    assert hub.commits == ["Step 1 of 2", "After 2 steps"]
    assert received.keys() == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "lycoris_config.json",
        "simpletuner_config.json",
        "card/1.jpg",
        "card/1-before.jpg",
    }
    assert all(content == (output / name).read_bytes() for name, content in received.items())
    assert not any(secret in content for content in received.values() for secret in (TOKEN.encode(), str(tmp_path).encode()))
    assert TOKEN not in said and f"Published: {hub.address}/studio/portrait" in said
    assert weights.metadata_of(output)["modelspec.comment"] == "the second try"

    page = received["README.md"].decode()
    told = front_matter(page)
    assert told["widget"] == [{"text": PROMPT, "parameters": {"negative_prompt": "blurry, cropped, ugly"}, "output": {"url": "card/1.jpg"}}]
    assert (told["license"], told["pipeline_tag"], "not-for-all-audiences" in told["tags"]) == ("apache-2.0", "text-to-image", True)
    assert "base_model" not in told  # a folder of this machine is none on the hub
    assert "A note of *my own*." in page and "| pictures | 6 | 0 | filename |" in page

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(output))
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), "snippet", "exec"), {})
    assert asked == ["studio/portrait"]
    with Image.open("picture.png") as image:
        assert image.size == (32, 32)


def test_a_hub_that_says_no_at_the_end_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, **OPTIONS | {"validation_prompt": None, "lora_type": "standard", "lycoris_config": None})

    with hub_server() as hub:
        point_to(hub.address, monkeypatch)
        hub.failing = {"/commit/": [403]}
        code = train_in_process(tmp_path)

    said = " ".join(capsys.readouterr().out.split())
    assert code == 0 and (tmp_path / "output" / "pytorch_lora_weights.safetensors").is_file()
    assert "output was not published: the token (HF_TOKEN) may not write to studio/portrait" in said
    assert "simpletuner push output --to studio/portrait" in said
    assert hub.repositories == {"studio/portrait": {}}


def test_a_wrong_token_is_refused_before_anything_is_done(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, **OPTIONS)

    with hub_server() as hub:
        point_to(hub.address, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        code = train_in_process(tmp_path)

    assert code == 2
    assert "does not accept the token (HF_TOKEN)" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_without_publishing_the_page_is_there_and_its_snippet_loads_from_the_folder(tmp_path, monkeypatch):
    nothing = {"push_to_hub": None, "hub_model_id": None, "lora_type": "standard", "lycoris_config": None, "model_card_safe_for_work": True}
    write_run(tmp_path, **OPTIONS | nothing | {"use_ema": True})
    point_to("http://127.0.0.1:9", monkeypatch)  # nobody is asked

    assert train_in_process(tmp_path) == 0

    page = (tmp_path / "output" / "README.md").read_text()
    assert "folder = 'output'" in page and "simpletuner generate" in page and "--adapter output/ema" in page
    assert "license" not in front_matter(page) and "not-for-all-audiences" not in front_matter(page)["tags"]
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), "snippet", "exec"), {})
    assert Path("picture.png").is_file()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"output_dir": "runs/my lora (2)"}, "my-lora-2"),
        ({"tracker_project_name": "portraits"}, "portraits"),
        ({"tracker_project_name": "portraits", "hub_model_id": "ada/faces"}, "ada/faces"),
        ({"output_dir": "海辺"}, "lora"),
        ({"hub_model_id": f"{'o' * 50}/{'n' * 60}"}, f"{'o' * 50}/{'n' * 60}"),
        ({"output_dir": "n" * 120}, "n" * 96),
    ],
)
def test_a_repository_is_named_after_the_project_or_the_folder(options, name):
    assert repository_name(config_of(model_family="auraflow", push_to_hub=True, **options)) == name


def test_a_hub_that_does_not_answer_at_the_start_is_only_warned_of(monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)
    heard = io.StringIO()

    name = find_repository(config_of(model_family="auraflow", push_to_hub=True, output_dir="portrait"), True, Console(stream=heard))

    assert name == "portrait"
    assert heard.getvalue().startswith("warning: push_to_hub: the hub cannot be reached for portrait: ") and "The run goes on" in heard.getvalue()


@pytest.mark.parametrize(
    ("page", "licence"),
    [
        ("---\nlicense: other\nlicense_name: my-own\nlicense_link: https://example.org\ntags: [x]\n---\n", "license license_name license_link"),
        ("---\ntags: [x]\n---\n", ""),
        ("---\nlicense: [unclosed\n---\n", ""),
        ("---\n- a list\n---\n", ""),
        (None, ""),
    ],
)
def test_the_licence_is_what_the_page_of_the_base_says(tmp_path, page, licence):
    if page is not None:
        (tmp_path / "README.md").write_text(page)
    family = build_family(config_of(model_family="auraflow", pretrained_model_name_or_path=str(tmp_path)))

    assert list(licence_of(family, asks_hub=True)) == licence.split()


def test_held_out_losses_are_told_up_to_the_step(tmp_path):
    rows = [{"step": step, "loss/val/a": loss, "loss/val/a/noise_0-25": 9.0} for step, loss in ((0, 0.5), (10, 0.25), (20, 0.375), (30, 0.1))]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')

    assert losses_of(tmp_path / "evaluation.jsonl", 20) == [
        {"dataset": "a", "first": "0.5000 (step 0)", "best": "0.2500 (step 10)", "last": "0.3750 (step 20)"}
    ]


def test_each_prompt_has_its_own_pictures_and_settings_on_the_page(tmp_path):
    config = config_of(model_family="auraflow", output_dir=str(tmp_path), validation_num_inference_steps=30, validation_guidance=3.0)
    changes = {"validation_num_inference_steps": 5, "validation_guidance": 9.0}
    shown = [Picture("cat", "a cat", "", Size(64, 64), 42, changes), Picture("red_cat", "a red cat", "", Size(64, 64), 42)]
    for name in ("step_00100_cat_42_64x64.png", "step_00100_red_cat_42_64x64.png", "step_00100_cat_42_64x64.png.tmp", "step_00050_cat_42_64x64.webp"):
        (tmp_path / name).write_bytes(b"")
    source = CardSource(config, None, None, None, None, shown, {}, 100)

    found = source._pictures(100, tmp_path)

    assert [(one.after.name, one.settings) for one in found] == [
        ("step_00100_cat_42_64x64.png", "64x64, seed 42, in 5 steps, guidance 9"),
        ("step_00100_red_cat_42_64x64.png", "64x64, seed 42, in 30 steps, guidance 3"),
    ]


def test_a_run_that_ends_early_is_published_as_what_it_is(tmp_path, monkeypatch):
    never_better = {"early_stop_patience": 1, "eval_steps_interval": 1, "num_eval_images": 1, "eval_timesteps": 1, "learning_rate": 3.0}
    plain = {"validation_prompt": None, "max_train_steps": 40, "lora_type": "standard", "lycoris_config": None, "checkpoint_step_interval": 40}
    add_pictures(tmp_path / "others", 1, first=50)
    own = {"id": "pictures", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True}
    held_out = {**own, "id": "others", "instance_data_dir": "others", "dataset_type": "eval"}
    write_run(tmp_path, datasets=[own, held_out], **OPTIONS | never_better | plain)

    with hub_server() as hub:
        point_to(hub.address, monkeypatch)
        assert train_in_process(tmp_path) == 0

    page = (tmp_path / "output" / "README.md").read_text()
    (said,) = hub.commits
    step = int(re.fullmatch(r"Ended at (\d+) of 40 steps", said)[1])
    assert f"ended at {step} of 40 steps" in page and f"| {step} of 40 |" in page


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a b", "a--b", "a/b..c", "x.git", "é"])
def test_a_repository_that_the_hub_would_refuse_is_a_wrong_setting(name):
    with pytest.raises(ConfigError, match="is neither name nor owner/name"):
        config_of(model_family="auraflow", hub_model_id=name)

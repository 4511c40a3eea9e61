"""`simpletuner dataset check`: exit codes, the three forms of the report, and that nothing heavy is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.cli.main import main
from tests.builders.demonstration import landscape, write_demonstration
from tests.builders.run import write_run

PATHS = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])


@pytest.fixture
def config(write_config, tmp_path):
    """A config whose dataset has three pictures."""
    path = write_config(resolution=64)
    for number in range(3):
        landscape(96, 64 + 32 * number, number).save(tmp_path / "pictures" / f"a_view_{number}.png")
    return path


def check(capsys, *words):
    code = main(["dataset", "check", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_usable_datasets_give_0_and_a_table(config, capsys):
    code, shown, _ = check(capsys)

    assert code == 0
    assert "pictures" in shown and "Usable" in shown and "steps of 1 image (" in shown


def test_json_on_the_screen_is_nothing_but_json(config, capsys):
    code, shown, said = check(capsys, "--json")

    told = json.loads(shown)
    assert code == 0
    assert [image["file"] for image in told["backends"][0]["images"]] == [f"a_view_{number}.png" for number in range(3)]
    assert told["backends"][0]["images"][0]["captions"] == ["a view 0"]
    assert "index pictures" in said


def test_files_are_written_where_they_are_asked_for(config, capsys, tmp_path):
    code, shown, _ = check(capsys, "--json", "out/check.json", "--html", "out/check.html")

    assert code == 0
    assert json.loads((tmp_path / "out/check.json").read_text(encoding="utf-8"))["usable"] is True
    assert "data:image/jpeg;base64," in (tmp_path / "out/check.html").read_text(encoding="utf-8")
    assert "written: out/check.json" in shown


def test_options_are_taken_as_flags(config, capsys):
    _, shown, _ = check(capsys, "--json", "--resolution", "128", "--train_batch_size=2")

    told = json.loads(shown)
    assert told["totals"]["images_per_step"] == 2
    assert "128x128" in told["backends"][0]["buckets"]


def test_an_unusable_dataset_gives_3_and_the_others_are_examined(config, capsys, tmp_path):
    plain = {"type": "local", "caption_strategy": "filename"}
    datasets = [{"id": "gone", "instance_data_dir": "nowhere", **plain}, {"id": "pictures", "instance_data_dir": "pictures", **plain}]
    (tmp_path / "datasets.json").write_text(json.dumps(datasets))

    code, shown, _ = check(capsys)

    assert code == 3
    assert "folder nowhere does not exist" in shown and "a_view_" not in shown.split("Problems")[0]
    assert "Not usable as it is: 1 error" in shown
    assert check(capsys, "--only", "pictures")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "picture"], "did you mean 'pictures'"),
        (["--config", "nowhere.json"], "no config found"),
        (["--resolutoin", "64"], "--resolution"),
        (["--jsonn"], "--json"),
        (["--html", "config/config.json/page.html"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_gives_2(config, capsys, words, said):
    code, _, errors = check(capsys, *words)

    assert code == 2 and said in errors


def test_a_wrong_dataset_file_gives_2(config, capsys, tmp_path):
    (tmp_path / "datasets.json").write_text('[{"id": "pictures", "instance_data_dir": "pictures", "repeets": 2}]')

    code, _, errors = check(capsys)

    assert code == 2 and "repeets" in errors


def test_captions_are_counted_by_the_models_own_tokenizer(tmp_path, capsys):
    write_run(tmp_path, pictures=2)
    (tmp_path / "pictures" / f"{'x' * 40}.png").write_bytes((tmp_path / "pictures/picture_000.png").read_bytes())

    code, shown, _ = check(capsys, "--config", "config.json", "--json")

    told = json.loads(shown)
    assert code == 0 and told["assumed"] == []
    [problem] = [problem for problem in told["problems"] if problem["kind"] == "long caption"]
    assert problem["message"] == "1 caption longer than the 24 tokens that the model reads, the longest 41"
    # Pictures of 32 x 32 pixels in a VAE of stride 4; the third is a copy of the first.
    assert told["totals"]["latent_cache_bytes"] == 2 * (2 * 4 * 8 * 8 * 4)
    assert told["totals"]["text_cache_bytes"] == 4 * 24 * (32 * 4 + 8)


def test_the_demonstration_shows_every_kind_that_it_was_made_for(tmp_path, capsys):
    path = write_demonstration(tmp_path / "demonstration")

    code, shown, _ = check(capsys, "--config", str(path), "--json")

    told = json.loads(shown)
    kinds = {problem["kind"] for problem in told["problems"]}
    wanted = {"zero-byte", "broken", "truncated", "no caption", "exact duplicate", "near duplicate", "shared", "empty caption", "long caption"}
    assert code == 0
    assert kinds >= wanted | {"enlarged", "slightly enlarged", "cropped away", "extreme aspect", "lone bucket"}
    near = next(problem for problem in told["problems"] if problem["kind"] == "near duplicate")
    assert {"view-00.jpg", "view-00-small.png", "view-02.jpg", "view-02-edited.jpg"} - {"view-00.jpg"} <= set(near["files"])


def test_nothing_heavy_is_imported(config):
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "lycoris"}
    code = (
        "import sys; from simpletuner.cli.main import main; code = main(['dataset', 'check', '--html', 'check.html']);"
        f" print(code, sorted({heavy!r} & sys.modules.keys()))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS})

    assert result.stdout.splitlines()[-1] == "0 []", result.stdout + result.stderr

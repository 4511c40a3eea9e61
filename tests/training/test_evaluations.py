"""What evaluations are good for: the best checkpoint, a run that ends when it gets no better, and scores of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from simpletuner.models.clip_score import ClipScore
from simpletuner.options.validation import Validation
from simpletuner.training.evaluations import Book, Progress
from tests.builders.run import add_pictures, train_in_process, write_run
from tests.builders.stable_diffusion import build_clip_tokenizer

ONE_PROCESS = SimpleNamespace(is_main_process=True, num_processes=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_clip_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id, **small)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def filled(folder: Path, losses: dict[int, float], scores: dict[int, float]) -> Book:
    book = Book(folder)
    for step, loss in losses.items():
        book.put(step, {"loss/val/a": loss, "loss/val/b": loss + 2, "loss/val/a/noise_0-25": 0.0})
    for step, score in scores.items():
        book.put(step, {"clip/mean": score})
    return book


def test_figures_of_a_step_stand_beside_each_other_and_the_means_are_over_datasets(tmp_path):
    book = filled(tmp_path, {4: 1.0, 2: 3.0}, {2: 20.0})

    assert [row["step"] for row in book.rows()] == [2, 4] and book.rows()[0]["clip/mean"] == 20
    assert book.values("loss") == {2: 4.0, 4: 2.0} and book.values("clip") == {2: -20.0}


def progress(folder: Path, **options: Any) -> Progress:
    return Progress(folder, Validation(**options), ONE_PROCESS, print)


def test_the_best_checkpoint_is_one_that_is_there(tmp_path):
    filled(tmp_path, {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan")}, {2: 25.0, 6: 20.0})
    for step in (2, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()

    by_loss, by_clip = (progress(tmp_path, best_checkpoint=metric) for metric in ("loss", "clip"))

    assert (by_loss.best_of([2, 4, 6]), by_loss.best_of([2, 6]), by_loss.best_of([8]), by_clip.best_of([2, 6])) == (4, 6, None, 2)
    assert by_clip.note() == "best CLIP score 25.0000 at step 2: checkpoint-2; it was 20.0000 at step 6"
    assert json.loads((tmp_path / "best_checkpoint.json").read_text())["checkpoint"] == "checkpoint-2"
    (tmp_path / "evaluation.jsonl").unlink()
    assert by_loss.note() == "" and not (tmp_path / "best_checkpoint.json").exists()


def test_patience_ends_after_so_many_evaluations_that_were_no_better(tmp_path):
    book = filled(tmp_path, {0: 0.1, 2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}, {})

    assert [progress(tmp_path, early_stop_patience=number).is_over() for number in range(4)] == [False, True, True, False]
    book.drop_later(6)
    assert not progress(tmp_path, early_stop_patience=2).is_over()


def test_figures_that_are_not_finite_are_none(tmp_path):
    book = filled(tmp_path, {2: float("nan"), 4: 0.5}, {2: float("inf")})

    assert "NaN" not in (tmp_path / "evaluation.jsonl").read_text() and book.values("loss") == {4: 1.5} and book.values("clip") == {}


def test_a_run_that_gets_no_better_ends_early_keeps_the_best_and_ends_there_again(tmp_path, capsys):
    add_pictures(tmp_path / "others", 2, first=50)
    own = {"id": "pictures", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True}
    held_out = {**own, "id": "others", "instance_data_dir": "others", "dataset_type": "eval"}
    hot = {"learning_rate": 3.0, "eval_steps_interval": 1, "num_eval_images": 2, "eval_timesteps": 3, "early_stop_patience": 3}
    write_run(tmp_path, datasets=[own, held_out], max_train_steps=40, checkpoint_step_interval=1, checkpoints_total_limit=2, **hot)

    assert train_in_process(tmp_path) == 0

    said = " ".join(capsys.readouterr().out.split())
    values = Book(tmp_path / "output").values("loss")
    trained = sorted(step for step in values if step)
    best, last = min(trained, key=lambda step: (values[step], step)), trained[-1]
    assert last - best == 3 and last < 40 and f"it ended at step {last} of 40" in said
    kept = sorted(int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "output").glob("checkpoint-*"))
    assert kept == [best, last - 1, last] and json.loads((tmp_path / "output" / "best_checkpoint.json").read_text())["step"] == best

    assert train_in_process(tmp_path) == 0
    assert sorted(step for step in Book(tmp_path / "output").values("loss") if step) == trained


def test_the_score_is_the_cosine_of_image_and_text(clip):
    images = [Image.new("RGB", (40, 48), colour) for colour in ("red", "blue", "green")]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    read = processor(text=["a cat", "cat", "a"], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        answer = model(**read)
    norm = torch.nn.functional.normalize
    expected = 100 * (norm(answer.image_embeds.double()) * norm(answer.text_embeds.double())).sum(1).clamp(min=0)

    scores = ClipScore(str(clip))(images, ["a cat", "cat", "a"], torch.device("cpu"))

    assert scores == pytest.approx(expected.tolist(), abs=1e-3)


def test_pictures_of_validation_are_scored_and_a_missing_clip_costs_scores_alone(tmp_path, clip, capsys):
    looking = {"validation_prompt": "a cat", "validation_resolution": "32", "validation_num_inference_steps": 2, "validation_step_interval": 1}
    scored = {"evaluation_type": "clip", "max_train_steps": 1, "num_validation_images": 2, "report_to": "jsonl"}
    write_run(tmp_path, **looking, **scored, pretrained_evaluation_model_name_or_path=str(clip))
    assert train_in_process(tmp_path) == 0

    rows = {row["step"]: row for row in Book(tmp_path / "output").rows()}
    assert set(rows) == {0, 1} and all(row["clip/min"] <= row["clip/mean"] <= row["clip/max"] for row in rows.values())
    capsys.readouterr()

    assert train_in_process(tmp_path, "--pretrained_evaluation_model_name_or_path", str(tmp_path / "none"), "--max_train_steps", "2") == 0
    assert "there are no CLIP scores" in " ".join(capsys.readouterr().out.split())

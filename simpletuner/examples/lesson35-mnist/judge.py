"""Say how good a trained `lesson35-mnist` model is: which digits a classifier sees in its pictures, and its loss beside that of a trivial answer.

    python judge.py output/lesson35-mnist-small/pipeline

The classifier, scikit-learn's support vector machine, learns from the held-out digits, which the model has never seen. Also shows how a model
without a VAE is sampled with plain diffusers: its latents are the picture, and each of the pipeline's eight pixels a side is one of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AuraFlowPipeline
from fetch import NAMES, SIDE_PX, read_tar
from PIL import Image
from sklearn.svm import SVC

PIPELINE_STRIDE_PX = 8
"""What diffusers takes a latent pixel to be where there is no VAE."""
JUDGED_FROM = 5000
"""Digits that the classifier learns from, at most."""
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which the loss is taken; 0 is data, 1 is noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder that a run ended with")
    parser.add_argument("--data", type=Path, default=Path("datasets/lesson35-mnist"), help="what fetch.py wrote (default: %(default)s)")
    parser.add_argument("--each", type=int, default=20, help="pictures of each digit (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="tokenizer_max_length of the run (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, default=Path("digits.png"), help="where a sheet of the pictures goes (default: %(default)s)")
    args = parser.parse_args()

    drawn, drawn_labels = read_tar(args.data / "digits.tar")
    held_out, labels = read_tar(args.data / "held-out.tar")
    judge = SVC(gamma="scale", C=10).fit(features(held_out[:JUDGED_FROM]), labels[:JUDGED_FROM])
    print(f"the classifier reads {judge.score(features(drawn[:JUDGED_FROM]), drawn_labels[:JUDGED_FROM]):.1%} of the real digits to train on")

    pipeline: Any = AuraFlowPipeline.from_pretrained(args.pipeline, vae=None)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    asked = np.arange(10).repeat(args.each)
    prompts = [NAMES[digit] if number % 2 else str(digit) for number, digit in enumerate(asked)]
    pictures = render(pipeline, prompts, args.tokens, args.guidance)
    seen = judge.predict(features(pictures))
    print(f"it sees the digit that was asked for in {(seen == asked).mean():.1%} of {len(asked)} pictures")
    print("by digit:", ", ".join(f"{digit}: {(seen[asked == digit] == digit).mean():.0%}" for digit in range(10)))
    unasked = judge.predict(features(render(pipeline, [""] * 50, args.tokens, 1.0)))
    print(f"asked for nothing, it draws {len(set(unasked))} different digits in 50 pictures")
    show(pictures, args.each, args.sheet)

    model, best, average = losses(pipeline, held_out[:500], labels[:500], drawn, args.tokens)
    print(f"loss on held-out digits {model:.3f}; of the best answer that is linear in a pixel {best:.3f}; of the average answer {average:.3f}")


def features(pictures: Any) -> Any:
    """Pictures (N, 32, 32) as means of 2 x 2 pixels, (N, 256): hidden detail and noise of single pixels do not count."""
    return pictures.reshape(len(pictures), SIDE_PX // 2, 2, SIDE_PX // 2, 2).mean((2, 4)).reshape(len(pictures), -1)


def render(pipeline: Any, prompts: list[str], tokens: int, guidance: float) -> Any:
    """Pictures (N, 32, 32) in [0, 1], each from a seed of its own."""
    side = SIDE_PX * PIPELINE_STRIDE_PX
    seeds = [torch.Generator().manual_seed(1000 + number) for number in range(len(prompts))]
    settings = {"width": side, "height": side, "num_inference_steps": 50, "guidance_scale": guidance, "max_sequence_length": tokens}
    latents = pipeline(prompts, negative_prompt=[""] * len(prompts), generator=seeds, output_type="latent", **settings).images  # (N, 1, 32, 32)
    return (latents[:, 0].float().cpu().numpy() / 2 + 0.5).clip(0, 1)


def show(pictures: Any, columns: int, path: Path) -> None:
    """Write a sheet, one row a digit."""
    rows = [np.concatenate(list(pictures[start : start + columns]), axis=1) for start in range(0, len(pictures), columns)]
    Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8)).save(path)


@torch.no_grad()
def losses(pipeline: Any, pictures: Any, labels: Any, known: Any, tokens: int) -> tuple[float, float, float]:
    """Mean squared errors of the velocity over TIMES: of the model, of the best linear answer pixel by pixel, of the average answer."""
    data = torch.from_numpy(pictures).float()[:, None] * 2 - 1  # (N, 1, 32, 32)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    mean, variance = (torch.from_numpy(part).float() for part in ((known * 2 - 1).mean(0), (known * 2 - 1).var(0)))
    device = pipeline.device
    text, _, _, _ = pipeline.encode_prompt([NAMES[label] for label in labels], do_classifier_free_guidance=False, max_sequence_length=tokens)
    found = []
    for time in TIMES:
        noised, target = (1 - time) * data + time * noise, noise - data
        times = torch.full((len(data),), time, device=device)
        answer = pipeline.transformer(noised.to(device), encoder_hidden_states=text, timestep=times, return_dict=False)[0].cpu()
        # Of noised = (1 - t) x + t n with independent x and n, the least squares estimate of n - x.
        slope = (time - (1 - time) * variance) / ((1 - time) ** 2 * variance + time**2)
        linear = -mean + slope * (noised - (1 - time) * mean)
        found.append([float((guess - target).square().mean()) for guess in (answer, linear, -mean.expand_as(target))])
    model, best, average = np.mean(found, axis=0)
    return float(model), float(best), float(average)


if __name__ == "__main__":
    main()

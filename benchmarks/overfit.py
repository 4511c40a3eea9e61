"""Whether the loss on held-out pictures tells an overfitted run from a good one: the embedded example on few pictures, and on many.

    python benchmarks/overfit.py [--steps 300] [--few 4] [--json FILE]

Both runs see the same number of pictures and have the same settings; twelve neon pictures are held out from both. Prints the losses by step: the
training loss of the run with few pictures is the lower one, and its held-out loss turns upwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "simpletuner" / "examples" / "digits"
HELD_OUT = 12
LOOKS = 10
"""Times that held-out pictures are looked at, evenly."""


def lay(folder: Path, count: int, steps: int, batch: int) -> None:
    """The example with so many neon pictures to learn from, and the held-out ones; no regularisation, which would hold it back."""
    sys.path.insert(0, str(ROOT))
    from simpletuner.relaxed_json import load_relaxed

    pictures = sorted(path for path in (EXAMPLE / "images" / "neon").iterdir() if path.suffix == ".png")
    step = len(pictures) // HELD_OUT
    held_out = pictures[::step][:HELD_OUT]
    rest = [path for path in pictures if path not in held_out]
    every = max(1, len(rest) // count)
    for name, some in {"learned": rest[::every][:count], "held_out": held_out}.items():
        (folder / name).mkdir(parents=True)
        for path in some:
            shutil.copy(path, folder / name)
            shutil.copy(path.with_suffix(".txt"), folder / name)
    data = [
        {"id": "learned", "type": "local", "instance_data_dir": "learned", "caption_strategy": "textfile", "crop": False},
        {"id": "held-out", "type": "local", "instance_data_dir": "held_out", "caption_strategy": "textfile", "crop": False, "dataset_type": "eval"},
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(data))
    changes: dict[str, Any] = {
        "data_backend_config": "multidatabackend.json",
        "output_dir": "output",
        "cache_dir": "cache",
        "max_train_steps": steps,
        "train_batch_size": batch,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "caption_dropout_probability": 0.0,
        "validation_disable": True,
        "checkpoint_step_interval": steps // LOOKS,
        "checkpoints_total_limit": 1,
        "eval_steps_interval": steps // LOOKS,
        "num_eval_images": HELD_OUT,
        "eval_timesteps": 8,
        "report_to": "jsonl",
    }
    config = load_relaxed(EXAMPLE / "config.json")
    config = json.loads(json.dumps(config).replace("{example}", str(EXAMPLE)))
    for key in ("validation_prompt", "user_prompt_library"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))


def losses(folder: Path) -> dict[str, Any]:
    """Held-out losses by step, the training loss over the last tenth of the run, and the checkpoint that was called the best."""
    rows = [json.loads(line) for line in (folder / "output" / "evaluation.jsonl").read_text().splitlines()]
    trained = [
        json.loads(line)["train_loss"] for line in (folder / "output" / "logs" / "metrics.jsonl").read_text().splitlines() if "train_loss" in line
    ]
    best = json.loads((folder / "output" / "best_checkpoint.json").read_text())
    return {
        "held_out": {int(row["step"]): row["loss/val/held-out"] for row in rows},
        "trained": statistics.fmean(trained[-max(1, len(trained) // LOOKS) :]),
        "best": best["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--many", type=int, default=48)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for label, count in {"few": arguments.few, "many": arguments.many}.items():
            folder = Path(name) / label
            lay(folder, count, arguments.steps, batch=4)
            line = [sys.executable, "-m", "simpletuner", "train", "--config", str(folder / "config.json")]
            subprocess.run(line, check=True, cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
            found[label] = {"pictures": count, **losses(folder)}
    print(f"{'step':>6} {arguments.few:>4} pictures {arguments.many:>4} pictures")
    for step, loss in found["few"]["held_out"].items():
        print(f"{step:6} {loss:13.4f} {found['many']['held_out'][step]:13.4f}")
    print(f"{'train':>6} {found['few']['trained']:13.4f} {found['many']['trained']:13.4f}   over the last tenth")
    print(f"{'best':>6} {found['few']['best']:13} {found['many']['best']:13}   checkpoint kept")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How much memory a large frozen base takes while it is read and quantised, layer by layer, in a process of its own for each precision.

    python benchmarks/streaming.py [--blocks 11] [--precision int8-quanto ...]

Writes benchmarks/results/streaming.json. Random weights in AuraFlow's architecture; the file is made once, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=11, help="single-stream blocks; 11 make 2.6 billion parameters")
    parser.add_argument("--precision", nargs="*", default=["no_change", "int8-quanto", "fp8wo-torchao"])
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "PRECISION", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        parameters = make(Path(folder), arguments.blocks)
        rows = []
        for precision in arguments.precision:
            for start in ("first", "second") if precision != "no_change" else ("first",):
                command = [sys.executable, __file__, "--measure", folder, precision, f"{folder}/cache"]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                rows.append({"precision": precision, "start": start, **json.loads(answer)})
                print(json.dumps(rows[-1]))
    result = {"parameters": parameters, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make(folder: Path, blocks: int) -> int:
    """Write the base, and give its number of parameters."""
    import torch
    from diffusers import AuraFlowTransformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    model = AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=blocks, pos_embed_max_size=9216)
    model.save_pretrained(folder / "transformer", max_shard_size="2GB")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder: str, precision: str, cache: str) -> dict[str, float]:
    """Read the base in this process: megabytes of the interpreter with its libraries, of the network, and at the peak; seconds."""
    import importlib
    from dataclasses import replace

    import torch
    from diffusers import AuraFlowTransformer2DModel

    from simpletuner.memory.parts import bytes_of
    from simpletuner.memory.precision import quantiser_of
    from simpletuner.memory.settle import recipe_of
    from simpletuner.memory.weight_store import WeightStore
    from simpletuner.models.loading import stream_network
    from simpletuner.models.source import Part

    importlib.import_module("accelerate")
    recipe = recipe_of(precision, torch.bfloat16, torch.device("cpu"))
    recipe = replace(recipe, store=WeightStore(Path(cache) / precision, True, print))
    quantiser_of(recipe.row, "cpu", recipe.key)
    before, began = peak_mb(), time.monotonic()
    network = stream_network(AuraFlowTransformer2DModel, Part("transformer", folder, ("transformer",)), recipe)
    seconds = time.monotonic() - began
    held = sum(bytes_of(value) for value in [*network.parameters(), *network.buffers()]) / 2**20
    over = peak_mb() - before - held
    return {"libraries_mb": round(before), "network_mb": round(held), "over_network_mb": round(over), "seconds": round(seconds, 1)}


def peak_mb() -> float:
    """The most memory that this process ever had, files that are mapped included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())

"""What adapters and quantised bases cost a step: layer by layer, and in a model of some 50 M parameters, in turns in one process.

    python benchmarks/adapters.py [--rounds 7] [--steps 2] [--json FILE]

Layers: forward, and backward to the input and the factors, as shares of lycoris' default, which builds the changed weight, or for plain LoRA of
PEFT's own way. `none` is the layer without an adapter. Everything is in bf16
with random weights; on a busy machine look at the spread before you believe a ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
WHOLE = {"lora_dim": 10_000}
LAYERS = [
    ("lokr", 770, 576, 576, {**WHOLE, "factor": 8}),
    ("lokr", 770, 576, 1536, {**WHOLE, "factor": 8}),
    ("lokr", 770, 1536, 576, {**WHOLE, "factor": 8}),
    ("lokr", 770, 576, 576, {"lora_dim": 8, "factor": 8}),
    ("lora", 770, 576, 576, {"lora_dim": 16}),
    ("loha", 770, 576, 576, {"lora_dim": 4}),
    ("loha", 770, 576, 576, {"lora_dim": 8}),
    ("lokr", 1024, 3072, 3072, {**WHOLE, "factor": 16}),
    ("loha", 1024, 3072, 3072, {"lora_dim": 8}),
]
"""Adapter, tokens, inputs, outputs, settings: those of the 50 M model, and of AuraFlow."""
LORAS = [(770, 576, 576, 16), (1024, 3072, 3072, 16)]
"""Tokens, inputs, outputs, rank."""
PRODUCTS = [(770, 576, 576), (770, 576, 1536), (770, 1536, 576), (1024, 3072, 3072), (512, 3072, 8192)]
PRECISIONS = ["int8-matmul", "int8-rotated", "int8-torchao", "int8-quanto", "int8dq-torchao"]


def adapted(kind: str, inputs: int, outputs: int, settings: dict[str, Any], way: str) -> nn.Module:
    """A frozen layer with an adapter on it: materialised, bypass (both the library's), or ours."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    from simpletuner.adapters.factored import quicken

    layer = nn.Linear(inputs, outputs).bfloat16().requires_grad_(False)
    module = {"lokr": LokrModule, "lora": LoConModule, "loha": LohaModule}[kind]("layer", layer, 1.0, bypass_mode=way != "materialised", **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    if way == "ours":
        quicken([module])
    if way != "none":
        module.apply_to()
    return layer


def lora_of_peft(inputs: int, outputs: int, rank: int, is_quick: bool) -> nn.Module:
    """A frozen layer with a plain LoRA, computed by us, or as PEFT does it with the casts that we spare it."""
    from simpletuner.adapters.adapter import Targets
    from simpletuner.adapters.kinds.standard import Standard
    from simpletuner.options.adapters import Adapters

    network = nn.ModuleDict({"layer": nn.Linear(inputs, outputs).bfloat16()})
    Standard(Adapters(lora_rank=rank), Targets(suffixes=("layer",))).attach(network)
    if not is_quick:
        del network["layer"].forward
    return network["layer"]


def pass_of(layer: nn.Module, tokens: int, inputs: int) -> Callable[[], None]:
    """Forward and backward."""
    x = torch.randn(1, tokens, inputs).bfloat16().requires_grad_()

    def step() -> None:
        answer = layer(x)
        answer.backward(answer.detach())
        x.grad = None

    return step


def shares(contenders: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, Any]:
    """The seconds of the first, and by round what the others take of it."""
    from benchmarks.harness import Contender, figures, ratio, take_turns

    found = take_turns([Contender(name, step) for name, step in contenders.items()], rounds, steps, torch.device("cpu"))
    first, *_ = found
    of_first = {name: ratio(found[first], turns) for name, turns in found.items() if name != first}
    return {first: figures(found[first])["seconds"], **of_first}


def steps_of_a_model() -> dict[str, Callable[[], None]]:
    """A step of the 50 M AuraFlow with a LoKr: lycoris' default first."""
    from lycoris import LycorisNetwork

    from benchmarks import bare
    from benchmarks.networks import CLASSES, latents_of, random_network, twin
    from simpletuner.adapters.factored import quicken
    from simpletuner.memory.settle import recipe_of, settle

    device, dtype = torch.device("cpu"), torch.bfloat16
    network: Any = random_network("auraflow", "medium", device, dtype)
    width = network.config.joint_attention_dim
    feeds = [bare.feed_of(latents_of("auraflow", 256, 256, 2, device), {"prompt": torch.randn(2, 120, width)}, device, dtype)]

    def ours(precision: str, is_quick: bool) -> Callable[[], None]:
        base = twin(network) if precision == "no_change" else copy.deepcopy(network)
        if precision != "no_change":
            settle(base, recipe_of(precision, dtype, device, ["pos_embed*", "time*", "context*", "proj_out*", "norm_out*"]))
        LycorisNetwork.apply_preset({"target_module": list(CLASSES["auraflow"])})
        adapters = LycorisNetwork(base, lora_dim=10_000, alpha=1, network_module="lokr", factor=8, bypass_mode=True)
        if is_quick:
            quicken(adapters.loras)
        adapters.apply_to()
        step = bare.loop("auraflow", base, list(adapters.parameters()), feeds, dtype)
        step.adapters = adapters  # type: ignore[attr-defined]  # layers refer to it weakly
        return step

    found = {"lycoris": bare.library("auraflow", twin(network), 8, feeds, False)[0]}
    found["lycoris, bypass"] = ours("no_change", is_quick=False)
    found["ours"] = ours("no_change", is_quick=True)
    return found | {f"ours, {precision}": ours(precision, is_quick=True) for precision in PRECISIONS}


def main() -> None:
    from simpletuner.memory.precision import find
    from simpletuner.memory.settle import quantiser_here

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each per round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}

    def tell(name: str, contenders: dict[str, Callable[[], None]]) -> None:
        found = rows[name] = shares(contenders, arguments.rounds, arguments.steps)
        (first, seconds), *others = found.items()
        print(f"{name}: {first} {seconds * 1e3:.1f} ms", flush=True)
        for other, share in others:
            print(f"    {other:20} {share['median']:.2f} of it ({share['least']:.2f} to {share['most']:.2f})", flush=True)

    for kind, tokens, inputs, outputs, settings in LAYERS:
        ways = ("materialised", "bypass", "ours", "none")
        layers = {way: pass_of(adapted(kind, inputs, outputs, settings, way), tokens, inputs) for way in ways}
        tell(f"{kind} {settings}, {tokens} x {inputs} to {outputs}", layers)
    for tokens, inputs, outputs, rank in LORAS:
        whose = {"peft": lora_of_peft(inputs, outputs, rank, False), "ours": lora_of_peft(inputs, outputs, rank, True)}
        whose["none"] = nn.Linear(inputs, outputs).bfloat16().requires_grad_(False)
        tell(f"plain LoRA of rank {rank}, {tokens} x {inputs} to {outputs}", {way: pass_of(layer, tokens, inputs) for way, layer in whose.items()})
    for tokens, inputs, outputs in PRODUCTS:
        plain = nn.Linear(inputs, outputs).bfloat16().requires_grad_(False)
        layers = {"bf16": pass_of(plain, tokens, inputs)}
        for precision in PRECISIONS:
            quantiser = quantiser_here(find(precision), "cpu", "base_model_precision")
            assert quantiser is not None
            layers[precision] = pass_of(quantiser.quantise(copy.deepcopy(plain)), tokens, inputs)
        tell(f"product, {tokens} x {inputs} to {outputs}", layers)
    tell("step of the 50 M AuraFlow, LoKr of factor 8, batch 2 at 256 px", steps_of_a_model())
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

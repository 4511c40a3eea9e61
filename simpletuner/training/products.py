"""Which layers of a base in 8 bits multiply in 8 bits: those where it is faster on this machine, timed at the first start and kept with the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from simpletuner.console import Console
from simpletuner.data.sampler import Sampler
from simpletuner.errors import Stopped
from simpletuner.memory.products import Product, Timed, eight_bit_layers, products_of, time_products
from simpletuner.memory.residency import release
from simpletuner.memory.shapes_only import META, shapes_only
from simpletuner.memory.timing import Stopwatch, TimingBook
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.plan_step import ShapedStep, new_garbage_alone
from simpletuner.training.step import Step
from simpletuner.training.trainer import Trainer
from simpletuner.types import Batch

FILE = "products.json"
FOLDER = "timings"
"""In `cache_dir`."""
BUDGET_SECONDS = 1.0
POSITIONS = 256
"""Of the stream of batches, among which the commonest size of pictures is found."""


@dataclass(frozen=True, slots=True)
class Products:
    """What was chosen for a run. Checkpoints hold it: a run that goes on does as before, whatever a new measurement would say."""

    precision: str
    plain: frozenset[str]
    """Names of the layers whose weights are made plain."""
    said: str = ""
    """For the summary; empty if there was nothing to choose."""

    def save(self, folder: Path) -> None:
        """Write the choice beside a checkpoint, where there was one."""
        if self.said:
            text = json.dumps({"precision": self.precision, "plain": sorted(self.plain), "said": self.said}, indent=1)
            (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, precision: str) -> Products | None:
        """Give what `save` wrote; None if nothing was, or for another precision."""
        if not (folder / FILE).is_file():
            return None
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(precision, frozenset(found["plain"]), found["said"]) if found["precision"] == precision else None


class ProductChoice:
    """The choice of a run, made once it is known where the run goes on from."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._precision = config.memory.base_model_precision
        self._made = Products(self._precision, frozenset())

    def settle(self, denoiser: nn.Module, trainer: Trainer, sampler: Sampler, console: Console) -> str:
        """Choose, and have the denoiser's layers compute so. All processes call it; the first one chooses. Before anything is compiled.

        Args:
            denoiser: with its adapter.
            trainer: as it starts or goes on; nothing of it is changed.

        Returns:
            What was chosen, for the summary; empty if there was nothing to choose.
        """
        layers, wish = eight_bit_layers(denoiser), self._config.memory.eight_bit_products
        if not layers or wish == "all":
            return ""
        if wish == "none":
            self._made = Products(self._precision, frozenset(layers))
        else:
            chosen = [self._chosen(denoiser, trainer, sampler, console)] if trainer.accelerator.is_main_process else [None]
            (found,) = broadcast_object_list(chosen)
            self._made = found
        for name, layer in layers.items():
            layer.multiplies_in_8_bits = name not in self._made.plain
        return self._made.said

    def save(self, folder: Path) -> None:
        """Write it beside a checkpoint."""
        self._made.save(folder)

    def _chosen(self, denoiser: nn.Module, trainer: Trainer, sampler: Sampler, console: Console) -> Products:
        step = trainer.state.step
        before = Products.load(Path(self._config.training.output_dir) / f"checkpoint-{step}", self._precision) if step else None
        if before is not None:
            return before
        try:
            return self._timed(denoiser, trainer, sampler)
        except Stopped:
            raise
        except Exception as error:  # of a network that cannot compute on shapes, or memory that is short: all works without
            release()
            if trainer.stop.is_made:  # a signal, or what a library made of it
                raise
            console.say(f"note: 8-bit products cannot be timed, and are taken for all layers: {error}")
            return Products(self._precision, frozenset(), "all layers multiply in 8 bits, which could not be timed")

    def _timed(self, denoiser: nn.Module, trainer: Trainer, sampler: Sampler) -> Products:
        layers = eight_bit_layers(denoiser)
        products = products_of(layers, tokens_of(trainer.step, commonest_batch(trainer, sampler)))
        if not products:
            return Products(self._precision, frozenset())
        dtype = next(iter(layers.values())).scale.dtype
        book = TimingBook(Path(self._config.data.cache_dir) / FOLDER, trainer.step.device, dtype)
        known = dict(book.rows)
        timed = time_products(products.values(), dtype, book, Stopwatch(trainer.step.device, BUDGET_SECONDS))
        if book.rows != known:
            book.save()
            release()
        plain = frozenset(name for name, product in products.items() if not takes_8_bits(timed[product]))
        return Products(self._precision, plain, describe(products, timed, dtype))


def takes_8_bits(timed: Timed | None) -> bool:
    """Whether a layer multiplies in 8 bits; so do those that no time was left for."""
    return timed is None or timed.wins


def describe(products: Mapping[str, Product], timed: Mapping[Product, Timed | None], dtype: torch.dtype) -> str:
    """Say how many layers multiply in 8 bits, and how much faster those are that most is computed in."""
    counts = Counter(products.values())
    taken = [product for product in counts if takes_8_bits(timed[product])]
    said = f"{sum(counts[product] for product in taken)} of {len(products)} layers multiply in 8 bits"
    shares = {product: counts[product] * found.plain for product in taken if (found := timed[product]) is not None}
    if shares:
        first = max(shares, key=lambda product: (shares[product], str(product)))
        found = timed[first]
        assert found is not None
        said += f" ({found.plain / found.eight_bit:.1f} x as fast as plain ones at {first.inputs} to {first.outputs})"
    others = len(products) - sum(counts[product] for product in taken)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float32"}[dtype]
    said += f"; {others}, where it is no faster, in {name}" if others else ""
    untimed = sum(counts[product] for product in taken if timed[product] is None)
    return said + (f"; for {untimed} of them no time was left" if untimed else "")


def commonest_batch(trainer: Trainer, sampler: Sampler) -> Batch:
    """The first batch whose pictures are of the size that most batches are of."""
    positions = range(min(POSITIONS, sampler.batches_per_epoch()))
    kinds = [(plan.bucket, len(plan.samples)) for plan in map(sampler.at, positions)]
    (kind, _), *_ = Counter(kinds).most_common(1)
    return trainer.loader.batch_at(kinds.index(kind))


def tokens_of(step: Step, batch: Batch) -> dict[str, int]:
    """Tokens of a batch that come to each Linear layer of the denoiser, by its name, counted on shapes alone."""
    found: dict[str, int] = {}
    if step.encode is not None:
        with torch.no_grad():
            batch = replace(batch, text=step.encode(batch.prompts, batch.text))
    denoiser = step.family.empty_denoiser().to(torch.float32)
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(_counting(name, found))
    shaped = ShapedStep(step.family, denoiser, step.adapter, step.process, step.loss, META, 0, 0, draws_latents=False)
    with shapes_only(), new_garbage_alone(), torch.no_grad():
        step.family.predict(denoiser, shaped.noise(batch, 0, 0), batch)
    return found


def _counting(name: str, found: dict[str, int]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found[name] = max(found.get(name, 0), inputs[0].numel() // inputs[0].shape[-1])

    return count

"""What memory a run will take, phase by phase, before anything is loaded: its own code runs on shapes alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from simpletuner.adapters.adapter import Adapter
from simpletuner.errors import ConfigError
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import repeated_blocks
from simpletuner.memory.precision import Row, quantiser_of
from simpletuner.memory.quantisers.quantiser import Quantiser
from simpletuner.memory.residency import vae_dtype, weight_dtype
from simpletuner.memory.settle import recipe_of, settle
from simpletuner.memory.shapes_only import StandIn, shapes_only
from simpletuner.memory.tracker import Tracker
from simpletuner.models.blueprint import blueprint, decode, encode, read_tokens, text_networks, vae_network
from simpletuner.models.family import ModelFamily
from simpletuner.models.offline import config_here
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.objective import loss_of
from simpletuner.training.plan_step import (
    ShapedStep,
    StepBytes,
    Streamed,
    count_picture,
    count_step,
    counted,
    shaped_batch,
    streamed,
    widest,
    zeros_like_pixels,
)
from simpletuner.training.prompts import pictures
from simpletuner.types import Size

Counted = dict[Any, tuple[Any, Sequence[str]]]
Device = Literal["cuda", "cpu"]
PROGRAM_BYTES = 550_000_000
"""Of Python and the libraries in main memory, as measured with all of them imported."""
CUDA_BYTES = 600_000_000
"""What CUDA itself takes of a card: its context, and kernels' workspaces. What PyTorch's allocator rounds up and leaves unused comes on top."""
WINDOW_BYTES = 1 << 28
"""Of a file that is read, in main memory at a time, and of quantised layers that are on their way to the disk."""
NO_SHAPES = ("bnb",)
"""Libraries that cannot quantise a tensor without numbers."""
CPU = torch.device("cpu")
VAE = "VAE"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run."""

    name: str
    vram_bytes: int
    """The most on the accelerator at a time; 0 where there is none."""
    ram_bytes: int
    """The most in main memory at a time, the program itself included."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What the larger of the two is made of, where that is known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a run."""

    phases: tuple[Phase, ...]
    size: Size
    """Of the pictures of the largest batch."""
    batch_size: int
    device: Device
    notes: tuple[str, ...]

    @property
    def peak_vram_bytes(self) -> int:
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        return max(phase.ram_bytes for phase in self.phases)

    @property
    def card_bytes(self) -> int:
        """What the card must have free."""
        return self.peak_vram_bytes + CUDA_BYTES if self.peak_vram_bytes else 0

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def as_json(self) -> dict[str, Any]:
        phases = [
            {"name": one.name, "vram_bytes": one.vram_bytes, "ram_bytes": one.ram_bytes, **({"parts": dict(one.parts)} if one.parts else {})}
            for one in self.phases
        ]
        return {
            "phases": phases,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "cuda_bytes": CUDA_BYTES if self.peak_vram_bytes else 0,
            "picture": str(self.size),
            "batch_size": self.batch_size,
            "device": self.device,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class DenoiserBytes:
    """What the denoiser takes in a run."""

    step: StepBytes
    """As if all of it were on the device."""
    offload: Streamed
    blocks: int
    """How many could wait in main memory."""
    largest_layer: int
    """Before it is quantised."""
    picture: int
    """That a call takes for a picture of validation, beyond what is kept."""
    shown: Size | None
    """The largest picture of validation."""


def plan_run(config: TrainConfig, size: Size, batch_size: int, device: Device = "cuda", references: int = 0) -> Plan:
    """Plan a run.

    Args:
        size: of the pictures of the largest batch, in pixels.
        batch_size: their number.
        device: where the run computes.
        references: pictures that each is trained with.

    Raises:
        SimpleTunerError: what the run would refuse of its model and adapter too, or a model that nothing tells the shapes of.
    """
    return Planner(config, size, batch_size, device, references).plan()


class Planner:
    """Counts the phases of one run."""

    def __init__(
        self, config: TrainConfig, size: Size, batch_size: int, device: Device, references: int = 0, counted_before: Counted | None = None
    ) -> None:
        """
        Args:
            counted_before: what other planners of the same run, with other options of memory, have counted; it is added to.
        """
        self._config, self._size, self._count, self._device, self._references = config, size, batch_size, device, references
        self._counted: Counted = {} if counted_before is None else counted_before
        self._notes: list[str] = []

    def plan(self) -> Plan:
        family = build_family(self._config)
        adapter = build_adapter(self._config, family)  # refuses what is wrong with its file
        with tempfile.TemporaryDirectory() as folder:
            model, assumed = blueprint(family, Path(folder))
            self._notes += assumed
            found = self._once("step", lambda: self._count_denoiser(model, adapter))
            phases = [self._text(model), *self._vae(model), *self._denoiser(model, adapter, found)]
        return Plan(tuple(phases), self._size, self._count, self._device, tuple(dict.fromkeys(self._notes)))

    def count_denoiser(self) -> DenoiserBytes:
        """Count the denoiser alone: no text encoder and no VAE."""
        family = build_family(self._config)
        with tempfile.TemporaryDirectory() as folder:
            model, adapter = blueprint(family, Path(folder))[0], build_adapter(self._config, family)
            return self._once("step", lambda: self._count_denoiser(model, adapter))

    def weights_with(self, options: Sequence[Memory]) -> list[Streamed]:
        """What the frozen denoiser, in the precision of the config, has where under each of these options."""
        family = build_family(self._config)
        adapter = build_adapter(self._config, family)
        with tempfile.TemporaryDirectory() as folder, shapes_only():
            denoiser = self._load(blueprint(family, Path(folder))[0], adapter)
            return [streamed(denoiser, one) for one in options]

    def _once(self, what: str, count: Callable[[], Any]) -> Any:
        """Count something, or give what was counted of it under the same options."""
        data, training = self._config.data, self._config.training
        batches: tuple[Any, ...] = (data.text_encoder_batch_size,) if what == "text" else (data.vae_batch_size,)
        if what == "step":
            batches = (self._count, training.gradient_accumulation_steps, training.ema_device, self._config.optim.optimizer)
        memory = self._config.memory.model_dump(mode="json").items()
        of_text_and_vae = ("text_", "vae_")
        mine = [value for key, value in memory if (key.startswith(f"{what}_") or (what == "step" and not key.startswith(of_text_and_vae)))]
        key = (what, batches, tuple(mine), self._config.memory.mixed_precision)
        if key not in self._counted:
            before = len(self._notes)
            found = count()
            self._counted[key] = found, self._notes[before:]
        found, notes = self._counted[key]
        self._notes += notes
        return found

    def _phase(self, name: str, on_device: int, in_main: int = 0, parts: Mapping[str, int] | None = None) -> Phase:
        """A phase, by what it has on the device and besides in main memory, the program left aside."""
        if self._device == "cpu":
            return Phase(name, 0, PROGRAM_BYTES + on_device + in_main, parts or {})
        return Phase(name, on_device, PROGRAM_BYTES + in_main, parts or {})

    # Before the denoiser.

    def _text(self, model: ModelFamily) -> Phase:
        phase: Phase = self._once("text", lambda: self._count_text(model))
        return phase

    def _count_text(self, model: ModelFamily) -> Phase:
        memory, dtype, largest, work = self._config.memory, weight_dtype(self._config.memory), 0, 0
        precisions = [getattr(memory, f"text_encoder_{number}_precision") for number in range(1, 5)]
        with shapes_only(), Tracker() as tracker:
            networks = text_networks(model)
            for number, (network, precision) in enumerate(zip(networks, precisions), start=1):
                network.to(dtype)
                largest = max(largest, widest(network, dtype))
                settle(network, self._recipe(precision, dtype, (), f"text_encoder_{number}_precision"))
            with counted(tracker) as taken:
                weights = tracker.now
            for network in networks:
                with counted(tracker) as taken:
                    read_tokens(network, self._config.data.text_encoder_batch_size, model.text_tokens)
                work = max(work, taken[0])
        return self._phase("text", weights + max(work, largest), WINDOW_BYTES, {"weights": weights, "temporaries": max(work, largest)})

    def _vae(self, model: ModelFamily) -> list[Phase]:
        """Encoding pictures; nothing without a VAE."""
        if not model.source.has_vae:
            return []
        count = self._config.data.vae_batch_size
        weights, work = self._once("vae", lambda: self._vae_bytes(model, self._size, count, decodes=False))
        pixels = count * 3 * self._size.width * self._size.height * 4
        return [self._phase("vae", weights + work, WINDOW_BYTES + pixels, {"weights": weights, "temporaries": work})]

    def _vae_bytes(self, model: ModelFamily, size: Size, count: int, *, decodes: bool) -> tuple[int, int]:
        """Bytes of a VAE, and those that it works in."""
        memory, dtype = self._config.memory, vae_dtype(self._config.memory, torch.device(self._device))
        with shapes_only(), Tracker() as tracker:
            vae: Any = vae_network(model).to(dtype)
            if memory.vae_enable_slicing:
                vae.enable_slicing()
            if memory.vae_enable_tiling:
                vae.enable_tiling()
            with counted(tracker) as taken:
                weights = tracker.now
            with counted(tracker) as taken:
                latents = encode(vae, zeros_like_pixels(count, size, dtype))
            if decodes:
                with counted(tracker) as taken:
                    decode(vae, latents)
        return weights, taken[0]

    # The denoiser.

    def _stays(self, model: ModelFamily) -> dict[str, int]:
        """Bytes of the networks that are there while the denoiser is trained."""
        found = {}
        if self._config.adapters.train_text_encoder:
            found["text encoders"] = self._text(model).parts["weights"]
            self._notes.append("the activations of text encoders that are trained are not counted")
        if self._config.memory.keep_vae_loaded or self._config.data.vae_cache_disable:
            found[VAE] = sum(phase.parts["weights"] for phase in self._vae(model))  # there is one at most
        return found

    def _count_denoiser(self, model: ModelFamily, adapter: Adapter) -> DenoiserBytes:
        config, memory, dtype = self._config, self._config.memory, weight_dtype(self._config.memory)
        process = model.process(config.diffusion)
        shown, stays = self._shown(model), self._stays(model)
        with shapes_only(), ExitStack() as counting:
            if config.adapters.train_text_encoder:  # not watched: their bytes are among those that stay
                adapter.attach_text(model.empty_text_networks())
            tracker = counting.enter_context(Tracker())
            denoiser = self._load(model, adapter)
            blocks, largest = len(repeated_blocks(denoiser)), widest(denoiser, torch.float32 if adapter.trains_base else dtype)
            adapter.attach(denoiser)
            for name, size in stays.items():
                tracker.add(size, name)
            offload = streamed(denoiser, memory)
            enable_checkpointing(denoiser, memory, tracker.to_host)
            denoiser.train()
            step = ShapedStep(model, denoiser, adapter, process, loss_of(config.diffusion, process), CPU, 0, 0, draws_latents=False)
            text = model.text_shapes([config_here(model.source.part(name)) for name in model.parts if name.startswith("text_encoder")])
            autocast = partial(self._autocast, adapter)
            figures = self._step(step, shaped_batch(model, text, self._size, self._count, self._references), tracker, autocast)
            picture = count_picture(step, shaped_batch(model, text, shown, 2), tracker, autocast=autocast) if shown else 0
        return DenoiserBytes(figures, offload, blocks, largest, picture, shown)

    def _denoiser(self, model: ModelFamily, adapter: Adapter, found: DenoiserBytes) -> list[Phase]:
        """The phases that it is there in."""
        figures, offload = found.step, found.offload
        phases = [self._load_phase(figures, offload, adapter, found.largest_layer), self._step_phase(figures, offload)]
        if found.shown:
            phases.append(self._picture_phase(model, figures, offload, found.picture, found.shown))
        return [*phases, self._save_phase(figures, offload, adapter)]

    def _load(self, model: ModelFamily, adapter: Adapter) -> nn.Module:
        if adapter.trains_base:
            return model.load_denoiser(torch.float32, 0)
        memory = self._config.memory
        return model.load_frozen(self._recipe(memory.base_model_precision, weight_dtype(memory), model.delicate_layers, "base_model_precision"), 0)

    def _step(self, step: ShapedStep, batch: Any, tracker: Tracker, autocast: Any) -> StepBytes:
        training = self._config.training
        row = find_optimizer(self._config.optim.optimizer)
        return count_step(
            step,
            batch,
            tracker,
            autocast=autocast,
            state_bytes=row.state_bytes,
            average_bytes=4 if training.use_ema and training.ema_device == "accelerator" else 0,
            accumulates=training.gradient_accumulation_steps > 1,
        )

    def _load_phase(self, figures: StepBytes, offload: Streamed, adapter: Adapter, largest: int) -> Phase:
        weights = figures.parts["weights"]
        if adapter.trains_base:  # read into main memory, and moved from there
            return self._phase("load", weights, weights if self._device == "cuda" else 0, {"weights": weights})
        resident = weights - offload.waiting
        host = WINDOW_BYTES + self._waiting(offload)
        return self._phase("load", resident + largest, host, {"weights": resident, "temporaries": largest})

    def _step_phase(self, figures: StepBytes, offload: Streamed) -> Phase:
        parts = {**figures.parts, "weights": figures.parts["weights"] - offload.waiting + offload.places}
        host = figures.host + self._waiting(offload) + self._average(figures)
        return self._phase("step", figures.peak - offload.waiting + offload.places, host, {name: size for name, size in parts.items() if size})

    def _picture_phase(self, model: ModelFamily, figures: StepBytes, offload: Streamed, picture: int, shown: Size) -> Phase:
        weights, work = self._vae_bytes(model, shown, 1, decodes=True) if model.source.has_vae else (0, 0)
        weights = 0 if VAE in figures.parts else weights  # it stays, and is counted there
        kept = figures.kept - offload.waiting + offload.places
        peak = kept + weights + max(picture, work)
        parts = {"kept from training": kept, VAE: weights, "temporaries": max(picture, work)}
        return self._phase("validation", peak, self._waiting(offload) + self._average(figures) + WINDOW_BYTES, parts)

    def _save_phase(self, figures: StepBytes, offload: Streamed, adapter: Adapter) -> Phase:
        """Tensors come to main memory to be written: an adapter as a whole, and once more as the bytes of its file."""
        copied = 4 * figures.trained * (1 if adapter.trains_base else 2)
        kept = figures.kept - offload.waiting + offload.places
        return self._phase("save", kept, copied + self._waiting(offload) + self._average(figures), {})

    # Small things.

    def _waiting(self, offload: Streamed) -> int:
        """Main memory of the blocks that wait; none of it is sure to be taken where they wait on a disk."""
        return 0 if offload.on_disk else offload.host

    def _average(self, figures: StepBytes) -> int:
        training = self._config.training
        return 4 * figures.trained if training.use_ema and training.ema_device == "cpu" else 0

    def _recipe(self, precision: str, dtype: torch.dtype, keep: Sequence[str], key: str) -> Any:
        return replace(recipe_of(precision, dtype, CPU, keep, key), quantiser_for=self._quantiser)

    def _quantiser(self, row: Row, device: str, key: str) -> Quantiser | None:
        """The library itself, which knows best what it takes; a stand-in where it is not here, or is for other devices."""
        if not row.library:
            return None
        if row.library in NO_SHAPES or row.needs_cuda:
            return StandIn(row.bits)
        try:
            return quantiser_of(replace(row, compiles=False), device, key)
        except ConfigError:
            self._notes.append(f"{row.package} is not installed: {row.name} is counted as {row.bits:g} bits a weight")
            return StandIn(row.bits)

    def _autocast(self, adapter: Adapter) -> AbstractContextManager[None]:
        dtype = weight_dtype(self._config.memory)
        return torch.autocast("cpu", dtype) if adapter.trains_base and dtype != torch.float32 else nullcontext()

    def _shown(self, family: ModelFamily) -> Size | None:
        """The largest picture of validation, if there are any."""
        shown = pictures(self._config.validation, 0, family)
        return max((picture.size for picture in shown), key=lambda size: size.width * size.height, default=None)

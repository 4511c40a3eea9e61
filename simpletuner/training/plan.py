"""What memory a run will take, phase by phase, before anything is loaded: its own code runs on shapes alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.adapters.adapter import Adapter
from simpletuner.models.blueprint import blueprint
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.plan_networks import DenoiserBytes, Device, Networks, TextBytes
from simpletuner.training.plan_step import EMA, OPTIMIZER, StepBytes, Streamed, new_garbage_alone
from simpletuner.types import Size

Counted = dict[Any, tuple[Any, Sequence[str]]]
PROGRAM_BYTES = 550_000_000
"""Of Python and the libraries in main memory, as measured with all of them imported."""
CUDA_BYTES = 600_000_000
"""What CUDA itself takes of a card: its context, and kernels' workspaces. What PyTorch's allocator rounds up and leaves unused comes on top."""
WINDOW_BYTES = 1 << 28
"""Of a file that is read, in main memory at a time, and of quantised layers that are on their way to the disk."""
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
    spare_bytes: int = 0
    """Of main memory, that it does without where there is less."""


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
            "card_bytes": self.card_bytes,
            "picture": str(self.size),
            "batch_size": self.batch_size,
            "device": self.device,
            "notes": list(self.notes),
        }


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
        with self._networks() as (networks, adapter):
            found = self._denoiser_bytes(networks, adapter)
            phases = [self._text(networks), *self._vae(networks), *self._denoiser(networks, adapter, found)]
        return Plan(tuple(phases), self._size, self._count, self._device, tuple(dict.fromkeys(self._notes)))

    def count_denoiser(self) -> DenoiserBytes:
        """Count the denoiser alone: no VAE, and no text encoder unless it is trained."""
        with self._networks() as (networks, adapter):
            return self._denoiser_bytes(networks, adapter)

    def weights_with(self, options: Sequence[Memory]) -> list[Streamed]:
        """What the frozen denoiser, in the precision of the config, has where under each of these options."""
        with self._networks() as (networks, adapter):
            return networks.weights_with(adapter, options)

    @contextmanager
    def _networks(self) -> Iterator[tuple[Networks, Adapter]]:
        family = build_family(self._config)
        adapter = build_adapter(self._config, family)  # refuses what is wrong with its file
        with tempfile.TemporaryDirectory() as folder, new_garbage_alone():
            model, assumed = blueprint(family, Path(folder))
            self._notes += assumed
            yield Networks(self._config, self._device, model, family, self._notes), adapter

    def _once(self, what: str, count: Callable[[], Any]) -> Any:
        """Count something, or give what was counted of it under the same options."""
        data, training, memory = self._config.data, self._config.training, self._config.memory.model_dump(mode="json")
        mine = {key: value for key, value in memory.items() if key.startswith(f"{what}_")}
        batches: tuple[Any, ...] = (data.text_encoder_batch_size,) if what == "text" else (data.vae_batch_size,)
        if what == "step":
            batches = (self._count, training.gradient_accumulation_steps, training.ema_device, self._config.optim.optimizer)
            batches += (self._config.optim.optimizer_release_gradients,)
            mine = {key: value for key, value in memory.items() if not key.startswith(("text_", "vae_"))}
        key = (what, batches, tuple(mine.items()), memory["mixed_precision"])
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

    def _text_bytes(self, networks: Networks) -> TextBytes:
        found: TextBytes = self._once("text", networks.text)
        return found

    def _text(self, networks: Networks) -> Phase:
        found = self._text_bytes(networks)
        weights, temporaries = sum(found.weights.values()), max(found.work, found.quantising)
        return self._phase("text", weights + temporaries, WINDOW_BYTES, {"weights": weights, "temporaries": temporaries})

    def _vae(self, networks: Networks) -> list[Phase]:
        """Encoding pictures; nothing without a VAE."""
        if not networks.model.source.has_vae:
            return []
        count = self._config.data.vae_batch_size
        weights, work = self._once("vae", lambda: networks.vae(self._size, count, decodes=False))
        pixels = count * 3 * self._size.width * self._size.height * 4
        return [self._phase("vae", weights + work, WINDOW_BYTES + pixels, {"weights": weights, "temporaries": work})]

    # The denoiser.

    def _denoiser_bytes(self, networks: Networks, adapter: Adapter) -> DenoiserBytes:
        def count() -> DenoiserBytes:
            return networks.denoiser(adapter, self._size, self._count, self._references, self._stays(networks))

        found: DenoiserBytes = self._once("step", count)
        return found

    def _stays(self, networks: Networks) -> dict[str, int]:
        """Bytes of the networks that are there while the denoiser is trained."""
        found = {}
        if self._config.adapters.train_text_encoder:
            weights, frozen = self._text_bytes(networks).weights, networks.model.frozen_text
            found["text encoders"] = sum(size for name, size in weights.items() if name not in frozen)
        if self._config.memory.keep_vae_loaded or self._config.data.vae_cache_disable:
            found[VAE] = sum(phase.parts["weights"] for phase in self._vae(networks))  # there is one at most
        return found

    def _denoiser(self, networks: Networks, adapter: Adapter, found: DenoiserBytes) -> list[Phase]:
        """The phases that it is there in."""
        figures, offload = found.step, found.offload
        phases = [self._load_phase(figures, offload, adapter, found.loading), self._step_phase(figures, offload)]
        if found.shown:
            phases.append(self._picture_phase(networks, figures, offload, found.picture, found.shown))
        return [*phases, self._save_phase(figures, offload, adapter)]

    def _load_phase(self, figures: StepBytes, offload: Streamed, adapter: Adapter, loading: int) -> Phase:
        weights = figures.parts["weights"]
        if adapter.trains_base:  # read into main memory, and moved from there
            return self._phase("load", weights, weights if self._device == "cuda" else 0, {"weights": weights})
        resident = weights - offload.waiting
        host = WINDOW_BYTES + self._waiting(offload)
        return self._phase("load", resident + loading, host, {"weights": resident, "temporaries": loading})

    def _step_phase(self, figures: StepBytes, offload: Streamed) -> Phase:
        parts = {**figures.parts, "weights": figures.parts["weights"] - offload.waiting + offload.places}
        host = figures.host + self._waiting(offload) + self._average(figures)
        return self._phase("step", figures.peak - offload.waiting + offload.places, host, {name: size for name, size in parts.items() if size})

    def _picture_phase(self, networks: Networks, figures: StepBytes, offload: Streamed, picture: int, shown: Size) -> Phase:
        weights, work = networks.vae(shown, 1, decodes=True) if networks.model.source.has_vae else (0, 0)
        weights = 0 if VAE in figures.parts else weights  # it stays, and is counted there
        kept = figures.kept - offload.waiting + offload.places
        peak = kept + weights + max(picture, work)
        parts = {"kept from training": kept, VAE: weights, "temporaries": max(picture, work)}
        return self._phase("validation", peak, self._waiting(offload) + self._average(figures) + WINDOW_BYTES, parts)

    def _save_phase(self, figures: StepBytes, offload: Streamed, adapter: Adapter) -> Phase:
        """Copies of what is saved wait in main memory to be written, while steps go on: an adapter as a whole, and once more as its file's bytes."""
        in_files = 4 * figures.trained * (1 if adapter.trains_base else 2)
        weights, besides = figures.parts["weights"] if adapter.trains_base else 4 * figures.trained, self._waiting(offload) + self._average(figures)
        copies = weights + sum(figures.parts.get(name, 0) for name in (OPTIMIZER, EMA)) + self._average(figures)
        resident = offload.places - offload.waiting
        behind = self._phase("save", figures.peak + resident, figures.host + besides + copies + in_files)
        between = self._phase("save", figures.kept + resident, besides + in_files)  # two steps, where there is no room for copies
        return replace(behind, spare_bytes=behind.ram_bytes - between.ram_bytes)

    # Small things.

    def _waiting(self, offload: Streamed) -> int:
        """Main memory of the blocks that wait; none of it is sure to be taken where they wait on a disk."""
        return 0 if offload.on_disk else offload.host

    def _average(self, figures: StepBytes) -> int:
        training = self._config.training
        return 4 * figures.trained if training.use_ema and training.ema_device == "cpu" else 0

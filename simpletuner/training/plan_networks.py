"""What each network of a run takes: text encoders, VAE and denoiser, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from simpletuner.adapters.adapter import Adapter
from simpletuner.adapters.effect import FileEffect
from simpletuner.adapters.targets import adaptable
from simpletuner.errors import ConfigError
from simpletuner.memory.casting import casting
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import is_asked_for, repeated_blocks
from simpletuner.memory.precision import Row, quantiser_of
from simpletuner.memory.quantisers.quantiser import Quantiser
from simpletuner.memory.residency import DTYPES, vae_dtype, weight_dtype
from simpletuner.memory.settle import Recipe, recipe_of, settle
from simpletuner.memory.shapes_only import META, StandIn, Twins, shapes_only
from simpletuner.memory.tracker import Tracker
from simpletuner.models.blueprint import decode, encode, read_tokens, text_networks, vae_network
from simpletuner.models.clip import text_model
from simpletuner.models.family import ModelFamily
from simpletuner.models.offline import config_here
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.optim.rules import trains_in
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.assistant import find_assistant
from simpletuner.training.assistant_rules import location_of
from simpletuner.training.objective import loss_of
from simpletuner.training.plan_step import (
    ShapedStep,
    StepBytes,
    Streamed,
    Training,
    count_picture,
    count_step,
    counted,
    held_bytes,
    shaped_batch,
    streamed,
    update_of,
    widest,
    zeros_like_pixels,
)
from simpletuner.training.prompts import pictures
from simpletuner.types import Size

Device = Literal["cuda", "cpu"]
NO_SHAPES = ("bnb",)
"""Libraries that cannot quantise a tensor without numbers."""
ASSISTANT_RANK = 16
"""Of an assistant that is not on this machine."""


@dataclass(frozen=True, slots=True)
class TextBytes:
    """What text encoders take."""

    weights: Mapping[str, int]
    """Of each, by its folder, in its final precision."""
    quantising: int
    """For one layer, besides what it becomes."""
    work: int
    """That captions are encoded in."""


@dataclass(frozen=True, slots=True)
class DenoiserBytes:
    """What the denoiser takes in a run."""

    step: StepBytes
    """As if all of it were on the device."""
    offload: Streamed
    blocks: int
    """How many could wait in main memory."""
    loading: int
    """Beyond its own bytes."""
    picture: int
    """That a call takes for a picture of validation, beyond what is kept."""
    shown: Size | None
    """The largest picture of validation."""


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of a run, as their configurations tell them."""

    config: TrainConfig
    device: Device
    model: ModelFamily
    """A blueprint."""
    real: ModelFamily
    """The family itself, which knows where its files are."""
    notes: list[str]
    """What had to be assumed; it is added to."""

    # Before the denoiser.

    def text(self) -> TextBytes:
        """Count the text encoders, each in its precision, reading as many captions as are encoded at a time."""
        dtype, quantising, work = weight_dtype(self.config.memory), 0, 0
        with shapes_only(), Tracker() as tracker:
            networks = dict(zip(self._text_folders, text_networks(self.model)))
            for number, network in enumerate(networks.values(), start=1):
                network.to(dtype)
                key = f"text_encoder_{number}_precision"
                recipe, largest = self._recipe(getattr(self.config.memory, key), dtype, (), key)
                settle(network, recipe)
                quantising = max(quantising, largest(network))
            for network in networks.values():
                with counted(tracker) as taken:
                    read_tokens(network, self.config.data.text_encoder_batch_size, self.model.text_tokens)
                work = max(work, taken[0])
            return TextBytes({name: held_bytes(network) for name, network in networks.items()}, quantising, work)

    def vae(self, size: Size, count: int, *, decodes: bool) -> tuple[int, int]:
        """Bytes of the VAE, and those that it encodes, or else decodes, so many pictures in."""
        memory, dtype = self.config.memory, vae_dtype(self.config.memory, torch.device(self.device))
        with shapes_only(), Tracker() as tracker:
            vae: Any = vae_network(self.model).to(dtype)
            if memory.vae_enable_slicing:
                vae.enable_slicing()
            if memory.vae_enable_tiling:
                vae.enable_tiling()
            with counted(tracker) as taken:
                latents = encode(vae, zeros_like_pixels(count, size, dtype))
            if decodes:
                with counted(tracker) as taken:
                    decode(vae, latents)
            return held_bytes(vae), taken[0]

    # The denoiser.

    def denoiser(self, adapter: Adapter, size: Size, count: int, references: int, stays: Mapping[str, int]) -> DenoiserBytes:
        """Count a step and a picture.

        Args:
            count: pictures of a batch, of that size, each with so many references.
            stays: bytes of other networks that are there throughout, by what they are called.
        """
        config, model, shown = self.config, self.model, self.shown
        process = model.process(config.diffusion)
        beside = self._assistant()
        with shapes_only(), ExitStack() as counting:
            encode = self._trained_text(adapter) if config.adapters.train_text_encoder else None  # their weights are among what stays
            tracker = counting.enter_context(Tracker())
            if self._casts(adapter):
                counting.enter_context(casting(self.device))
            denoiser, loading = self.load(adapter)
            blocks = len(repeated_blocks(denoiser))
            beside(denoiser)
            adapter.attach(denoiser)
            for name, taken in stays.items():
                tracker.add(taken, name)
            offload = streamed(denoiser, config.memory)
            enable_checkpointing(denoiser, config.memory, tracker.to_host)
            denoiser.train()
            step = ShapedStep(model, denoiser, adapter, process, loss_of(config.diffusion, process), META, 0, 0, draws_latents=False, encode=encode)
            text = model.text_shapes([config_here(model.source.part(name)) for name in self._text_folders])
            autocast = partial(self._autocast, adapter)
            batch = partial(shaped_batch, model, text, size, count, references)
            figures = count_step(step, batch, tracker, self._training(adapter), autocast=autocast)
            picture = count_picture(step, partial(shaped_batch, model, text, shown, 2), tracker, autocast=autocast) if shown else 0
        return DenoiserBytes(figures, offload, blocks, loading, picture, shown)

    def weights_with(self, adapter: Adapter, options: Sequence[Memory]) -> list[Streamed]:
        """What the frozen denoiser has where under each of these options."""
        with shapes_only():
            denoiser, _ = self.load(adapter)
            return [streamed(denoiser, one) for one in options]

    def load(self, adapter: Adapter) -> tuple[nn.Module, int]:
        """The denoiser in its final precision, and the bytes that loading it takes beyond its own. To be called among shapes."""
        dtype = self._dtype(adapter)
        if adapter.trains_base:
            return self.model.load_denoiser(dtype, 0), 0
        recipe, largest = self._recipe(self.config.memory.base_model_precision, dtype, self.model.delicate_layers, "base_model_precision")
        denoiser = self.model.load_frozen(recipe, 0)
        return denoiser, largest(denoiser, at_once=not is_asked_for(self.config.memory))

    @property
    def shown(self) -> Size | None:
        """The largest picture of validation, if there are any."""
        shown = pictures(self.config.validation, 0, self.model)
        return max((picture.size for picture in shown), key=lambda size: size.width * size.height, default=None)

    def _dtype(self, adapter: Adapter) -> torch.dtype:
        """Of the denoiser's numbers that are not quantised."""
        memory = self.config.memory
        return DTYPES[trains_in(self.config.optim, memory)] if adapter.trains_base else weight_dtype(memory)

    def _casts(self, adapter: Adapter) -> bool:
        return adapter.trains_base and weight_dtype(self.config.memory) != self._dtype(adapter)

    def _autocast(self, adapter: Adapter) -> AbstractContextManager[None]:
        return torch.autocast("cpu", weight_dtype(self.config.memory)) if self._casts(adapter) else nullcontext()

    def _training(self, adapter: Adapter) -> Training:
        """What there is of each number that is trained."""
        training, optim = self.config.training, self.config.optim
        row, in_bf16 = find_optimizer(optim.optimizer), adapter.trains_base and self._dtype(adapter) == torch.bfloat16
        update, at_once = update_of(row.name, self.device, in_bf16=in_bf16)
        return Training(
            state_bytes=row.bf16_state_bytes if in_bf16 and row.bf16_by else row.state_bytes,
            average_bytes=4 if training.use_ema and training.ema_device == "accelerator" else 0,
            update_bytes=update,
            update_numbers=at_once,
            accumulates=training.gradient_accumulation_steps > 1,
            releases=adapter.trains_base and optim.optimizer_release_gradients,
        )

    # What is trained or stands beside it.

    def _trained_text(self, adapter: Adapter) -> Callable[[Sequence[str], Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """Put the adapter on text encoders; give what encodes captions with them, its answers' bytes aside."""
        memory, keys = self.config.memory, self.model.adaptable_text
        networks: dict[str, Any] = dict(zip(self._text_folders, text_networks(self.model)))
        trained = [networks[name] for name in dict.fromkeys(key.split(".")[0] for key in keys)]
        for network in trained:
            network.to(weight_dtype(memory))
            if memory.gradient_checkpointing:
                network.gradient_checkpointing_enable({"use_reentrant": False})
        adapter.attach_text({key: text_model(networks[key.split(".")[0]]) for key in keys})
        adapter.train(True)

        def encode(prompts: Sequence[str], cached: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            states = [read_tokens(network, len(prompts), self.model.text_tokens, grads=torch.is_grad_enabled()) for network in trained]
            answers = torch.stack([state.sum() for state in states]).sum()  # a single number, which they all hang on
            return {name: tensor + answers if tensor.is_floating_point() else tensor for name, tensor in cached.items()}

        return encode

    def _assistant(self) -> Callable[[nn.Module], None]:
        """What puts the assistant on a denoiser; one that is not on this machine is taken to be a usual LoRA of all blocks."""
        location, strength = location_of(self.config, self.real), self.config.adapters.assistant_lora_strength
        if location is None or not strength:
            return lambda denoiser: None
        if Path(location).expanduser().exists():
            here = find_assistant(self.config, self.real)
            return lambda denoiser: here.attach(denoiser, META)
        self.notes.append(f"the assistant {location} is not on this machine: taken to be a LoRA of rank {ASSISTANT_RANK} on all blocks")
        return lambda denoiser: FileEffect(_usual_lora(denoiser, ASSISTANT_RANK)).attach(denoiser, META)

    # Small things.

    @property
    def _text_folders(self) -> list[str]:
        return [name for name in self.model.parts if name.startswith("text_encoder")]

    def _recipe(self, precision: str, dtype: torch.dtype, keep: Sequence[str], key: str) -> tuple[Recipe, Callable[..., int]]:
        """How a network is held, and what then tells the bytes that its layers took on their way.

        These are those of the largest layer, or, `at_once`, what there is beyond the network when all of it comes to the device.
        """
        used: list[Quantiser | None] = []

        def quantiser_for(row: Row, device: str, key: str) -> Quantiser | None:
            used.append(self._quantiser(row, key))
            return used[-1]

        def largest(network: nn.Module, *, at_once: bool = False) -> int:
            (quantiser,) = used
            if isinstance(quantiser, Twins):
                return quantiser.beyond(network) if at_once else max(quantiser.work.values(), default=0)
            return 0 if quantiser is None else widest(network, dtype)  # of a stand-in no more is known

        return replace(recipe_of(precision, dtype, META, keep, key), quantiser_for=quantiser_for), largest

    def _quantiser(self, row: Row, key: str) -> Quantiser | None:
        """The library itself, which knows best what it takes; a stand-in where it is not here, or is for other devices."""
        if not row.library:
            return None
        if row.library in NO_SHAPES or row.needs_cuda:
            return StandIn(row.bits)
        try:
            with _disable_current_modes():  # what a library makes when it is first imported has numbers, and is none of the network's
                quantiser = quantiser_of(replace(row, compiles=False), "cpu", key)
        except ConfigError:
            self.notes.append(f"{row.package} is not installed: {row.name} is counted as {row.bits:g} bits a weight")
            return StandIn(row.bits)
        return Twins(quantiser) if quantiser is not None else None


def _usual_lora(denoiser: nn.Module, rank: int) -> dict[str, Mapping[str, Tensor]]:
    """A LoRA's tensors for each Linear layer of the blocks."""
    blocks = tuple(f"{name}." for name in repeated_blocks(denoiser))
    layers = {name: layer for name, layer in adaptable(denoiser).items() if name.startswith(blocks) and isinstance(layer, nn.Linear)}
    return {
        name: {"lora_down.weight": torch.empty(rank, layer.in_features), "lora_up.weight": torch.empty(layer.out_features, rank)}
        for name, layer in layers.items()
    }

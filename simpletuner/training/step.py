"""One micro-step: a batch to a loss per sample, with randomness that depends only on where the run is.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from simpletuner.adapters.adapter import Adapter
from simpletuner.adapters.effect import Effect
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.process import Process
from simpletuner.diffusion.rollout import ScheduledSampling, roll_out
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import seed_from
from simpletuner.training.parts import WHOLE, part_of
from simpletuner.types import Batch, Drawn, Noised


def seed_dropouts(device: torch.device, seed: int) -> None:
    """Seed the generators that are drawn from, as `torch.manual_seed` does; that looks for every kind of device, at milliseconds a call."""
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def resting(denoiser: nn.Module, adapter: Effect) -> Iterator[None]:
    """Have both answer as they do when nothing is trained: without any dropout."""
    was_training = denoiser.training
    denoiser.eval()
    adapter.train(False)
    try:
        yield
    finally:
        adapter.train(True)
        denoiser.train(was_training)


@dataclass(frozen=True, slots=True)
class Step:
    """Everything a micro-step needs, put together once a run."""

    family: ModelFamily
    denoiser: nn.Module
    adapter: Adapter
    process: Process
    loss: Loss
    device: torch.device
    seed: int
    rank: int
    draws_latents: bool
    """A fresh latent from the cached posterior each time; its mean otherwise."""
    scheduled_sampling: ScheduledSampling | None = None
    """Which samples the model itself brings to the time at which they are trained."""
    encode: Callable[[Sequence[str], Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    """Prompts, and what a batch's `text` holds, to what it is to hold, where text encoders are trained as well."""

    def losses(self, batch: Batch, step: int, micro_step: int, rows: slice = WHOLE) -> Tensor:
        """Train on one batch, or on some of its samples, as far as its losses.

        Args:
            step: optimizer steps done before this one.
            micro_step: position within the step's gradient accumulation.
            rows: the samples; what is drawn for them does not depend on which others there are.

        Returns:
            Float32 losses, (B,), with a graph.
        """
        # Dropouts inside adapters draw from torch's own generators; seeding them here makes those resumable too.
        seed_dropouts(self.device, seed_from("dropout", self.seed, step, self.rank, micro_step))
        noised = self.noise(batch, step, micro_step, rows)
        batch = part_of(batch, rows)
        target = self._parent_prediction(noised, batch) if batch.is_regularisation else noised.target
        prediction = self.predict(noised, batch)
        mask, sampling = self._mask(batch, target), self.scheduled_sampling
        if noised.drift is not None and sampling is not None and sampling.reflex is not None:
            losses = sampling.reflex(self.loss, prediction, noised, mask)
        else:
            losses = self.loss(prediction, target, noised.time, mask)
        return losses if noised.weight is None else losses * noised.weight

    def make_ready(self, batch: Batch, step: int, micro_step: int) -> Batch:
        """Do ahead what needs no device: draw, and scale latents. Called from the loader's threads; what a step gives is the same without it."""
        references = tuple({**one, "scaled": self.family.scale_latents(one["mean"].float())} for one in batch.references)
        return replace(batch, drawn=self.draw(batch, step, micro_step), references=references)

    def draw(self, batch: Batch, step: int, micro_step: int) -> Drawn:
        """Draw latents, time and noise for a batch, in that order, from one CPU generator; then the way of a rollout from another."""
        generator = torch.Generator().manual_seed(seed_from("noise", self.seed, step, self.rank, micro_step))
        raw = batch.latents["mean"]
        if self.draws_latents:
            raw = raw + batch.latents["std"] * torch.randn(raw.shape, generator=generator)
        latents = self.family.scale_latents(raw.float())  # (B, C, h, w)
        time = self.process.sample_time(len(batch.samples), self.family.tokens(latents), generator)
        noise, mixed = self.process.draw_noise(latents.shape, step, generator)
        guidance = self.process.draw_guidance(len(batch.samples), generator)
        return Drawn((step, micro_step), latents, noise, time, mixed, guidance, self._way(time, batch, step, micro_step))

    def noise(self, batch: Batch, step: int, micro_step: int, rows: slice = WHOLE) -> Noised:
        """Mix in the noise that is drawn for a batch, and bring some samples to their time by the model itself.

        Of all that is drawn, `rows` are given.
        """
        drawn = batch.drawn
        if drawn is None or drawn.place != (step, micro_step):
            drawn = self.draw(batch, step, micro_step)
        batch, way = part_of(batch, rows), None if drawn.way is None else drawn.way[:, rows]
        latents, noise, time = (tensor[rows].to(self.device, non_blocking=True) for tensor in (drawn.latents, drawn.noise, drawn.time))
        mixed, guidance = (None if some is None else some[rows].to(self.device, non_blocking=True) for some in (drawn.mixed, drawn.guidance))
        way = None if way is None else way.to(self.device, non_blocking=True)

        def at(time: Tensor) -> Noised:
            noised = self.process.add_noise(latents, noise, time, mixed)
            return noised if guidance is None else replace(noised, guidance=guidance)

        noised = at(time)
        if way is None:
            return noised
        rolled = self._roll_out(at(way[0]), way, batch)
        return replace(noised, latents=rolled, drift=rolled - noised.latents)

    def _way(self, time: Tensor, batch: Batch, step: int, micro_step: int) -> Tensor | None:
        """The times of a rollout, (K + 1, B). Regularisation pictures keep the model as it was, from latents as they were."""
        if self.scheduled_sampling is None or batch.is_regularisation:
            return None
        generator = torch.Generator().manual_seed(seed_from("rollout", self.seed, step, self.rank, micro_step))
        return self.scheduled_sampling.way(time, step, self.process, generator)

    @torch.no_grad()
    def _roll_out(self, start: Noised, way: Tensor, batch: Batch) -> Tensor:
        """Latents as the model makes them on a way, without dropouts."""
        assert self.scheduled_sampling is not None
        with resting(self.denoiser, self.adapter):
            latents = roll_out(self.process, lambda noised: self._answer(noised, batch), start, way, self.scheduled_sampling.order)
        torch.clear_autocast_cache()  # of 16-bit copies of trained weights that were made without gradients
        return latents

    def _answer(self, noised: Noised, batch: Batch) -> Tensor:
        """What the denoiser says, (B, C, h, w)."""
        self.adapter.at_time(noised.time)
        if self.encode is not None:
            batch = replace(batch, text=self.encode(batch.prompts, batch.text))
        return self.family.predict(self.denoiser, noised, batch)

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        """What the denoiser says, in the form of `noised.target`."""
        return self.process.answer(self._answer(noised, batch), noised)

    def _mask(self, batch: Batch, target: Tensor) -> Tensor | None:
        """How much each place counts, (B, 1, h, w) as the target (B, C, h, w) has it; None is all alike."""
        if batch.mask is None:
            return None
        mask = batch.mask.to(self.device, non_blocking=True)
        return mask if mask.shape[-2:] == target.shape[-2:] else adaptive_avg_pool2d(mask, (target.shape[-2], target.shape[-1]))

    @torch.no_grad()
    def _parent_prediction(self, noised: Noised, batch: Batch) -> Tensor:
        """What the untrained base answers: the target that keeps regularisation pictures as they were."""
        self.adapter.set_strength(0.0)
        self.adapter.train(False)
        try:
            return self.predict(noised, batch)
        finally:
            self.adapter.set_strength(1.0)
            self.adapter.train(True)

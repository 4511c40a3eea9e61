"""The two phases before training: captions encoded and the text encoders gone, images encoded and the VAE gone."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simpletuner.console import Console
from simpletuner.data.embeds import EmbedCache, NoEmbeds
from simpletuner.data.index import Changes
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import Loader
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.data.variation import Expansion, Variation, expand
from simpletuner.errors import MemoryLimitError, SimpleTunerError
from simpletuner.memory.residency import release, vae_dtype, weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.base import text_recipes
from simpletuner.training.besides import Masks, besides_of, mask_caches
from simpletuner.training.datasets import Datasets, changes_of
from simpletuner.training.identities import identified_parts, learn_identities
from simpletuner.training.long_captions import LongCaptions
from simpletuner.training.recovery import attempt_twice
from simpletuner.training.text_places import TextPlaces
from simpletuner.types import Sample

Loaded = TypeVar("Loaded")
Tell = Callable[[str], None]


class Vae:
    """The VAE when it is needed: loaded at its first use, and again after a release. Safe to use from the loader's thread."""

    def __init__(self, family: ModelFamily, options: Memory, device: torch.device, memo_folder: Path, *, stays: bool) -> None:
        """
        Args:
            memo_folder: where digests of large weight files are remembered.
            stays: it is needed again and again, so it is never released.
        """
        self._family, self._options, self._device, self._memo_folder, self._stays = family, options, device, memo_folder, stays
        self._vae: nn.Module | None = None
        self._lock = threading.RLock()

    def get(self) -> nn.Module:
        """The VAE on the accelerator.

        Raises:
            MemoryLimitError: there is no room for it.
        """
        with self._lock:
            if self._vae is None:
                self._vae = loaded(self._load, "the VAE was loaded", "Set vae_dtype to bf16, or leave vae_cache_disable out, if it is set.")
            return self._vae

    def _load(self) -> nn.Module:
        vae: Any = self._family.load_vae(self._device, vae_dtype(self._options, self._device))
        if self._options.vae_enable_slicing:
            vae.enable_slicing()
        if self._options.vae_enable_tiling:
            vae.enable_tiling()
        network: nn.Module = vae
        return network

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode (B, 3, H, W) in [-1, 1] to raw `mean` and `std`, (B, C, h, w), on the CPU."""
        with self._lock:
            vae = self.get()
            moments = self._family.encode_pixels(vae, pixels.to(self._device))
            return {name: tensor.cpu() for name, tensor in moments.items()}

    def fingerprint(self) -> str:
        """What latents depend on besides the pixels, precision included."""
        tiling = " tiled" if self._options.vae_enable_tiling else ""
        return f"{self._family.vae_fingerprint(self._memo_folder)} {vae_dtype(self._options, self._device)}{tiling}"

    def release(self) -> None:
        if self._stays:
            return
        with self._lock:
            release(self._vae)
            self._vae = None


class TextEncoders:
    """The text encoders when they are needed: loaded at the first prompt, gone after `release`. Safe to use from the loader's threads."""

    def __init__(self, family: ModelFamily, options: Memory, device: torch.device, memo_folder: Path, only: Sequence[str] = ()) -> None:
        """
        Args:
            memo_folder: where digests of large weight files are remembered.
            only: folders of those that are loaded, if not all are; they encode their share if they are the family's frozen ones.
        """
        self._family, self._options, self._memo_folder, self._only = family, options, memo_folder, tuple(only)
        self.device = self._device = device
        self._encoders: Any = None
        self._lock = threading.RLock()

    def get(self) -> Any:
        """The encoders on the accelerator.

        Raises:
            MemoryLimitError: there is no room for them.
        """
        with self._lock:
            if self._encoders is None:
                hint = "Set text_encoder_1_precision, and those of further encoders, to int8-quanto or nf4-bnb."
                self._encoders = loaded(self._load, "the text encoders were loaded", hint)
            return self._encoders

    def _load(self) -> Any:
        dtype, recipes = weight_dtype(self._options), text_recipes(self._options, self._device)
        if self._only:
            return self._family.load_some_text(self._only, self._device, dtype, recipes)
        return self._family.load_text_encoders(self._device, dtype, recipes)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to the family's tensors, (B, ...), on the CPU."""
        with self._lock:
            encoded = (self._family.encode_frozen if self._only else self._family.encode_text)(self.get(), prompts)
            return {name: tensor.cpu() for name, tensor in encoded.items()}

    def fingerprint(self) -> str:
        """What embeddings depend on besides the prompt, precision included."""
        precisions = " ".join(recipe.row.name for recipe in text_recipes(self._options, self._device))
        return f"{self._family.text_fingerprint(self._memo_folder)} {weight_dtype(self._options)} {precisions}{' '.join(('', *self._only))}"

    def release(self) -> None:
        with self._lock:
            release(self._encoders)
            self._encoders = None


def loaded(load: Callable[[], Loaded], what: str, hint: str) -> Loaded:
    """What `load` gives, tried twice.

    Raises:
        MemoryLimitError: memory ran out both times.
    """
    found = attempt_twice(load)
    if found is None:
        raise MemoryLimitError(f"memory ran out while {what}", hint=hint)
    return found


@dataclass(frozen=True, slots=True)
class Caches:
    """What the two phases leave behind."""

    config: TrainConfig
    datasets: Datasets
    """As they are when all images were read: without those that turned out to be damaged."""
    trained_encoders: TextEncoders | None
    """Those that stay, since they are trained."""
    embeds: EmbedCache | NoEmbeds
    """Of all other text encoders."""
    latents: LatentCache
    masks: Masks
    vae: Vae
    variations: Mapping[str, Variation]
    """Dataset id to the versions of its captions."""
    versions: Mapping[str, str]
    """Dataset id to how many embeddings they make."""
    let_go: Callable[[], None]
    """To be called when the run is over, see `Opened.let_go`."""

    def loader(self, sampler: Sampler) -> Loader:
        return Loader(
            sampler,
            self.latents,
            self.embeds,
            caption_dropout=self.config.data.caption_dropout_probability,
            seed=self.config.training.seed,
            variations=self.variations,
            besides=besides_of(self.datasets, self.latents, self.masks),
            mask_probability=self.config.data.masked_loss_probability,
            prefetch=self.config.data.dataloader_prefetch_qlen,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """The caches of a run before anything is loaded or encoded: what is kept where, and under which key."""

    config: TrainConfig
    family: ModelFamily
    places: TextPlaces
    encoders: TextEncoders
    """Those whose answers are cached, or else all."""
    trained_encoders: TextEncoders | None
    embeds: EmbedCache | NoEmbeds
    vae: Vae
    stores: Mapping[str, Store]
    """Where each dataset's latents and masks are kept, by dataset id; empty if nothing is."""
    warn: Callable[[str], None]

    def prompts(self, datasets: Datasets, shown: Sequence[str]) -> tuple[dict[str, Expansion], dict[str, str]]:
        """What the captions of each dataset can become, and everything that a run can ask for, as `TextPlaces.assign` gives it.

        Args:
            shown: prompts of validation.
        """
        expansions = {dataset.id: expand(discovery.samples, dataset.variation) for dataset, discovery in datasets.found}
        return expansions, self.places.assign(expansions, self.config.data.caption_dropout_probability, shown)

    def latents(self, datasets: Datasets) -> LatentCache:
        data = self.config.data
        return LatentCache(
            lambda sample: self.stores.get(sample.backend),
            self.vae.encode,
            self.vae.fingerprint(),
            datasets.images(),
            data.vae_batch_size,
            warn=self.warn,
            is_ondemand=data.vae_cache_ondemand,
        )

    def masks(self, datasets: Datasets) -> Masks:
        return mask_caches(datasets, self.stores, self.family.vae_stride, warn=self.warn, is_ondemand=self.config.data.vae_cache_ondemand)

    def take_over(self) -> None:
        """Finish what killed runs left on this machine, as `finish` does."""
        for store in (*self.places.stores, *self.stores.values()):
            store.sweep()
        self.finish()

    def finish(self) -> None:
        """Wait until all that was made is where it belongs.

        Raises:
            DatasetError: a bucket does not take it.
        """
        for store in (*self.places.stores, *self.stores.values()):
            store.close()

    def let_go(self) -> None:
        """As `finish`, for what was made while a run trained. It is over, so that a bucket that does not take it is an error no more but is said."""
        for store in (*self.places.stores, *self.stores.values()):
            try:
                store.close()
            except SimpleTunerError as error:
                # Not by the console: what other processes than the first made matters too.
                print("warning:", ". ".join(filter(None, (error.message, error.hint))), file=sys.stderr, flush=True)


def open_caches(config: TrainConfig, family: ModelFamily, datasets: Datasets, device: torch.device, warn: Callable[[str], None]) -> Opened:
    """Settle what a run caches and under which keys, whether to fill the caches or to ask what is used of them."""
    memo_folder = Path(config.data.cache_dir)
    places = TextPlaces(datasets.plan)
    is_trained, frozen = config.adapters.train_text_encoder, family.frozen_text
    encoders = TextEncoders(family, config.memory, device, memo_folder, frozen if is_trained else ())
    trained_encoders = encoders if is_trained else None
    if is_trained and frozen:
        trained_encoders = TextEncoders(family, config.memory, device, memo_folder, [key.split(".")[0] for key in family.adaptable_text])
    embeds: EmbedCache | NoEmbeds = NoEmbeds()
    if frozen or not is_trained:
        embeds = EmbedCache(places.of, encoders.encode, encoders.fingerprint(), config.data.text_encoder_batch_size, warn=warn)
    vae = Vae(family, config.memory, device, memo_folder, stays=config.data.vae_cache_disable or config.memory.keep_vae_loaded)
    stores = {} if config.data.vae_cache_disable else datasets.stores()
    return Opened(config, family, places, encoders, trained_encoders, embeds, vae, stores, warn)


def fill_caches(
    config: TrainConfig, family: ModelFamily, datasets: Datasets, shown: Sequence[str], console: Console, accelerator: Accelerator, stage: Tell
) -> Caches:
    """Encode whatever is missing: captions first, with nothing else loaded, then images, with the text encoders gone, unless they are trained.

    Args:
        shown: prompts of validation, encoded along with the captions.
        stage: is told which of the two begins.
    """
    if accelerator.is_local_main_process:
        learn_identities(family, identified_parts(config, family), Path(config.data.cache_dir), console)
    accelerator.wait_for_everyone()  # the others find there what this one learned
    opened = open_caches(config, family, datasets, accelerator.device, console.warn)
    long_captions = LongCaptions(Path(config.data.cache_dir), opened.encoders.fingerprint(), family.text_tokens)
    if accelerator.is_local_main_process:
        opened.take_over()
    accelerator.wait_for_everyone()  # or machines would not miss the same, and their shares would not add up

    def encode_captions(datasets: Datasets) -> dict[str, Expansion]:
        expansions, prompts = opened.prompts(datasets, shown)
        if isinstance(opened.embeds, EmbedCache):
            fill_text(opened.embeds, opened.encoders, family, prompts, long_captions, console, accelerator)
        else:
            long_captions.add(list(prompts), family.count_tokens(opened.encoders.get(), list(prompts)))
            long_captions.warn(prompts, console)
        return expansions

    stage("init_text_embed_cache")
    expansions = encode_captions(datasets)
    for name, expansion in expansions.items():
        for note in expansion.notes:
            console.say(f"note: dataset {name!r}: {note}")

    stage("init_vae_cache")
    vae, latents, masks = opened.vae, opened.latents(datasets), opened.masks(datasets)
    if config.data.vae_cache_disable or config.data.vae_cache_ondemand:
        missing = latents.missing(datasets.crops())
        say_changes(datasets, missing, console)
        if missing or config.data.vae_cache_disable:
            vae.get()  # now, rather than from the loader's thread in the middle of a step
    else:
        while fill_latents(latents, masks, datasets, console, accelerator):
            datasets = datasets.looked_at_again(family, console, accelerator)
            latents, masks = opened.latents(datasets), opened.masks(datasets)
            vae.release()  # captions of images that now take the place of damaged ones may be new
            expansions = encode_captions(datasets)
        vae.release()
    opened.finish()
    versions = {name: expansion.count for name, expansion in expansions.items()}
    return Caches(config, datasets, opened.trained_encoders, opened.embeds, latents, masks, vae, datasets.variations(), versions, opened.let_go)


def fill_text(
    cache: EmbedCache,
    encoders: TextEncoders,
    family: ModelFamily,
    prompts: Mapping[str, str],
    long_captions: LongCaptions,
    console: Console,
    accelerator: Accelerator,
) -> None:
    """Encode what is missing, each process its share, say which captions are too long, and let the encoders go.

    Args:
        prompts: what must be there, each with the caption of which it is a version.
    """
    missing = cache.missing(prompts)
    accelerator.wait_for_everyone()  # all look before any writes, or their shares would not add up
    if missing:
        long_captions.add(missing, family.count_tokens(encoders.get(), missing))
        if accelerator.is_main_process:
            long_captions.save()
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with console.bar("text embeddings", len(mine), "captions") as bar:
            cache.fill(mine, bar)
        encoders.release()
    long_captions.warn(prompts, console)
    accelerator.wait_for_everyone()


def fill_latents(cache: LatentCache, masks: Masks, datasets: Datasets, console: Console, accelerator: Accelerator) -> bool:
    """Encode what is missing, and make the masks that are missing, each process its share.

    Returns:
        Whether any process found an image to be other than its header said, so that the datasets must be looked at again.
    """
    missing = cache.missing(datasets.crops())
    absent = {name: one.missing(datasets.masks(name)) for name, one in masks.items()}
    say_changes(datasets, [*missing, *(mask for several in absent.values() for mask in several)], console)
    accelerator.wait_for_everyone()  # all look before any writes, or their shares would not add up
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        with console.bar("latents", len(mine), "images") as bar:
            cache.fill(mine, bar)
    for name, several in absent.items():
        share = several[accelerator.process_index :: accelerator.num_processes]
        if share:
            with console.bar(f"masks of {name}", len(share), "masks") as bar:
                masks[name].fill(share, bar)
    accelerator.wait_for_everyone()  # also where nothing was missing: others may have looked a moment earlier
    if accelerator.num_processes > 1:
        datasets.book.catch_up(datasets.files())
    found = torch.tensor([datasets.book.has_set_aside], device=accelerator.device)
    return bool(accelerator.gather(found).any().item())


def say_changes(datasets: Datasets, missing: Sequence[Sample], console: Console) -> None:
    """Say of each dataset what changed since the last start, and how much there is to encode."""
    counts = Counter(sample.backend for sample in missing)
    found = {dataset.id: (changes_of(discovery), discovery.changes) for dataset, discovery in datasets.found}
    found |= {
        one.conditioning.id: (str(one.changes) if one.changes != Changes() else "", one.changes)
        for several in datasets.companions.values()
        for one in several
    }
    for name, (said, changes) in found.items():
        if said or counts[name]:
            up_to = "up to " if changes.touched else ""
            console.say(f"dataset {name!r}: {said or 'nothing changed'}; {up_to}{counts[name]} to encode")

"""What nearly every family does alike: a KL autoencoder, a denoiser of one class of diffusers, text encoders in pairs with tokenizers.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models import pixels as pixel_space
from simpletuner.models.clip import text_model
from simpletuner.models.family import ModelFamily
from simpletuner.models.identity import digest_files
from simpletuner.models.latents import LatentSpec, Scaling, decode_any_precision, encode_posterior, scaling_of, stride_of
from simpletuner.models.loading import load_network, random_network, stream_network
from simpletuner.models.source import Part, is_local
from simpletuner.models.streaming import Settle, settle_layers
from simpletuner.models.t5 import check_width, encoder_class
from simpletuner.models.text import TextEncoder, load_text_encoder, no_text_encoder, width_of
from simpletuner.types import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.options.diffusion import Diffusion

RELEASED_ALIGNMENT_PX = 64
"""Of pictures of a thousand pixels a side this makes a few dozen buckets; in most models' own 16 px there would be hundreds."""


class UsualFamily(ModelFamily):
    """A family in diffusers layout that states its classes; what it does otherwise it overrides."""

    denoiser_class: ClassVar[str]
    """The denoiser's class in diffusers."""
    vae_class: ClassVar[str] = "AutoencoderKL"
    """The VAE's class in diffusers."""
    text_parts: Sequence[tuple[str, str]]
    """Folders of each text encoder and its tokenizer, in the order in which `encode_text` wants them."""
    released_latents: ClassVar[LatentSpec] = LatentSpec(channels=4, stride_px=8)
    """Of the released models' VAE."""
    released_text_width: ClassVar[int] = 4096
    """Of the released models' text encoder: of a T5-XXL, if not given."""
    vae_has_shift: ClassVar[bool] = False
    """Whether the pipeline undoes the VAE's `shift_factor` when it decodes."""
    takes_pixels: ClassVar[bool] = False
    """Whether a denoiser of the family can be trained without a VAE, on pixels."""

    # Before anything is loaded.

    def check_source(self) -> None:
        if not self.source.has_vae and not self.takes_pixels:
            raise ConfigError(
                f"without a VAE {self.source_name()} would be trained on pixels, which model_family {self.options.model_family} cannot",
                hint="Leave out pretrained_vae_model_name_or_path none. model_family auraflow can be trained so.",
            )
        super().check_source()
        if not self.source.has_vae and self.source.is_here:
            assert self.vae_config  # made now, or refused
        if self.source.is_here and all(is_local(part.location) for part in self._t5_encoders):
            self._check_t5()

    @property
    def _t5_encoders(self) -> list[Part]:
        """What takes the place of the model's own T5, if anything does."""
        return [self.source.part(name) for name in self.source.foreign_text_parts if name.startswith("text_encoder")]

    def _check_t5(self) -> None:
        for part in self._t5_encoders:
            encoder_class(part.config(), part.location)
            check_width(part.config(), self.denoiser_config, part.location)

    @property
    def alignment_px(self) -> int:
        """64 for the released models, which is known without asking the hub; for others the step in which they take sizes."""
        if self.source.is_released and not (self.source.is_replaced(self.denoiser_folder) or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX
        return self.step_px

    @property
    def step_px(self) -> int:
        """Sides are multiples of this for the denoiser and its pipeline."""
        raise NotImplementedError

    @property
    def longest_px(self) -> int | None:
        """The longest side of which the denoiser knows positions; None if it knows any."""
        return None

    def check_size(self, size: Size) -> None:
        if size.width % self.step_px or size.height % self.step_px:
            raise ConfigError(
                f"{size} is not a size that {self.source_name()} can take: both sides must be multiples of {self.step_px}",
                hint=f"Set aspect_bucket_alignment to {self.alignment_px}, or leave it out.",
            )
        if self.longest_px is not None and max(size.width, size.height) > self.longest_px:
            raise ConfigError(
                f"{size} is too large for {self.source_name()}: it knows positions up to {self.longest_px} pixels a side",
                hint=f"Ask for at most {self.longest_px}x{self.longest_px}.",
            )

    # Text.

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> list[TextEncoder]:
        return self.load_some_text([name for name, _ in self.text_parts], device, dtype, settles)

    def load_some_text(self, names: Collection[str], device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> list[TextEncoder]:
        self._check_t5()
        given = dict(enumerate(settles))
        return [
            load_text_encoder(self.source, device, dtype, *pair, given.get(number)) if pair[0] in names else no_text_encoder()
            for number, pair in enumerate(self.text_parts)
        ]

    @property
    def frozen_text(self) -> Sequence[str]:
        trained = {key.split(".")[0] for key in self.adaptable_text}
        return [name for name, _ in self.text_parts if trained and name not in trained]

    def text_modules(self, encoders: Sequence[TextEncoder]) -> list[nn.Module]:
        return [text.encoder for text in encoders]

    def text_networks(self, encoders: Sequence[TextEncoder]) -> dict[str, nn.Module]:
        return self._networks_in(self.adaptable_encoders(encoders))

    def adaptable_encoders(self, encoders: Sequence[TextEncoder]) -> dict[str, nn.Module]:
        wanted = {key.split(".")[0] for key in self.adaptable_text}
        return {name: text.encoder for (name, _), text in zip(self.text_parts, encoders) if name in wanted}

    def empty_text_networks(self) -> dict[str, nn.Module]:
        import torch

        def empty(name: str) -> nn.Module:
            kind: Any = self.source.class_of(name)
            with torch.device("meta"):
                network: nn.Module = kind(kind.config_class.from_dict(self.source.part(name).config()))
            return network

        return self._networks_in({name: empty(name) for name, _ in self.text_parts if any(key.split(".")[0] == name for key in self.adaptable_text)})

    def _networks_in(self, encoders: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {key: text_model(encoders[name]) for key in self.adaptable_text if (name := key.split(".")[0]) in encoders}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        """`prompt` (T, D) of one encoder, and its `mask` (T)."""
        return {"prompt": (self.text_tokens, width_of(encoders[0], self.released_text_width)), "mask": (self.text_tokens,)}

    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        names = [name for pair in self.text_parts for name in pair]
        files = {f"{name}/{file}": path for name in names for file, path in self.source.part(name).files().items()}
        return f"{digest_files(files, memo_folder)} {self.text_tokens}"

    # Latents.

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        if not self.source.has_vae:
            return pixel_space.stand_in(self.vae_config, device)
        import diffusers

        vae: nn.Module = load_network(getattr(diffusers, self.vae_class), self.source.part("vae"), dtype).to(device)
        decode_any_precision(vae)
        return vae

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        return encode_posterior(vae, pixels) if self.source.has_vae else pixel_space.encode(pixels, self.vae_config["latent_channels"])

    def vae_fingerprint(self, memo_folder: Path | None = None) -> str:
        return super().vae_fingerprint(memo_folder) if self.source.has_vae else f"pixels {self.vae_config['latent_channels']}"

    def scale_latents(self, raw: Tensor) -> Tensor:
        return self._scaling.scale(raw)

    # Training.

    def load_denoiser(self, dtype: torch.dtype, seed: int) -> nn.Module:
        import diffusers

        kind, part = getattr(diffusers, self.denoiser_class), self.source.part(self.denoiser_folder)
        return self.prepare_denoiser(random_network(kind, part, dtype, seed) if self.starts_random else load_network(kind, part, dtype))

    def load_frozen(self, settle: Settle, seed: int) -> nn.Module:
        import diffusers

        kind, part = getattr(diffusers, self.denoiser_class), self.source.part(self.denoiser_folder)
        if self.starts_random:
            return self.prepare_denoiser(settle_layers(random_network(kind, part, settle.dtype, seed), settle, []))
        return self.prepare_denoiser(stream_network(kind, part, settle))

    def prepare_denoiser(self, denoiser: nn.Module) -> nn.Module:
        """What the family changes of a denoiser as diffusers made it; nothing."""
        return denoiser

    def denoiser_fingerprint(self, memo_folder: Path | None = None) -> str:
        return digest_files(self.source.part(self.denoiser_folder).files(), memo_folder)

    def empty_denoiser(self) -> nn.Module:
        import diffusers
        import torch

        with torch.device("meta"):
            denoiser: nn.Module = getattr(diffusers, self.denoiser_class).from_config(self.denoiser_config)
        return denoiser

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        return self.pipeline_around(denoiser, vae, self.sampler())

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.text_tokens}

    def pipeline_around(self, denoiser: nn.Module, vae: nn.Module, scheduler: Any, **parts: Any) -> Any:
        """The family's pipeline with these parts and no text encoders."""
        import diffusers

        nothing = dict.fromkeys(name for pair in self.text_parts for name in pair)
        kind = getattr(diffusers, self.pipeline_class)
        return kind(vae=vae, scheduler=scheduler, **{self.denoiser_folder: denoiser}, **nothing, **parts)

    def sampler(self, **changes: Any) -> Any:
        """The scheduler that the model came with, with changes to its configuration."""
        return self.source.class_of("scheduler").from_config(self.source.part("scheduler").config(), **changes)

    # What the configuration files say, each read once.

    @cached_property
    def denoiser_config(self) -> Mapping[str, Any]:
        return self.source.part(self.denoiser_folder).config()

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        if not self.source.has_vae:
            return pixel_space.config_in_place_of_vae(self.denoiser_config, self.source_name())
        return self.source.part("vae").config()

    def latent_spec(self, vae: Mapping[str, Any] | None) -> LatentSpec:
        return self.released_latents if vae is None else LatentSpec(int(vae.get("latent_channels", self.released_latents.channels)), stride_of(vae))

    @property
    def vae_stride(self) -> int:
        return self.latent_spec(self.vae_config).stride_px

    @cached_property
    def _scaling(self) -> Scaling:
        return scaling_of(self.vae_config, self.vae_has_shift)


def pooled_inputs(text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
    """Embeddings `prompt` and `pooled` of a prompt and a negative one, as the pipelines name them."""
    return {
        "prompt_embeds": text["prompt"],
        "pooled_prompt_embeds": text["pooled"],
        "negative_prompt_embeds": negative["prompt"],
        "negative_pooled_prompt_embeds": negative["pooled"],
    }


def both_ways_inputs(text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `encode_both_ways` made of a prompt and a negative one, as the pipelines name it."""
    return {
        "prompt_embeds": text["prompt"],
        "prompt_attention_mask": text["mask"],
        "negative_prompt_embeds": negative["negative"],
        "negative_prompt_attention_mask": negative["negative_mask"],
        "negative_prompt": None,  # of some it is empty words otherwise, which they then refuse beside embeddings
    }

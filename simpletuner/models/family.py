"""The contract of a model family: a recipe that holds no weights.

A family states facts as class attributes and says how its parts are loaded and called. It is built once for a
run with the `Models` section of the options. Importing a family imports no torch, so that facts are cheap:
diffusers, transformers and torch are imported inside the verbs, late and per family.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from simpletuner.models.files import nearest_path
from simpletuner.models.identity import digest_files
from simpletuner.models.latents import LatentSpec
from simpletuner.models.layout import check_model, save_model
from simpletuner.models.recognise import Shapes
from simpletuner.models.source import Source, is_local

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.process import Process
    from simpletuner.models.streaming import Settle
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.models import Models
    from simpletuner.options.validation import Validation
    from simpletuner.types import Batch, Noised, Size


class ModelFamily(ABC):
    """One model family with the paths and flavour that a run chose."""

    flavours: ClassVar[Mapping[str, str]]
    """Flavour name to hub id; the first is the default."""
    billions: ClassVar[Mapping[str, float]] = {}
    """Flavour name to the denoiser's parameters in billions, as its makers say."""
    objective: ClassVar[Literal["flow", "denoising"]]
    """Which of the options of the objective have an effect: those of flow matching, or those of epsilon and v prediction."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Option key to the value that this family prefers over the general default."""
    flavour_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Flavour to the values that it prefers over those, such as the few steps to which it is distilled."""
    assistants: ClassVar[Mapping[str, str]] = {}
    """Flavour to the adapter on the hub that stands beside it while training: `owner/name`, or `owner/name/file.safetensors`."""
    tiny_autoencoder: ClassVar[str | None] = None
    """Hub id of an autoencoder for previews that takes the same latents, as the denoiser sees them."""
    takes_references: ClassVar[bool] = False
    """Whether the denoiser can be shown further pictures (`Batch.references`) besides the one that it learns."""
    class_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Short class names that users write in LyCORIS presets, to this family's classes in diffusers."""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the modules that a plain LoRA adapts."""
    lora_target_sets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Other sets of such suffixes, which `flux_lora_target` chooses by name."""
    pipeline_loads_lora: ClassVar[bool] = True
    """Whether the pipeline of diffusers has `load_lora_weights`; where not, PEFT puts a plain LoRA on the denoiser."""
    adaptable_text: Mapping[str, str] = {}
    """Text encoders for which the pipeline of diffusers loads a LoRA, by how their keys begin in its files, to their layout's name in the
    table of layer names that exports use."""
    delicate_layers: ClassVar[tuple[str, ...]] = (
        "*embed*",
        "time_*",
        "img_in",
        "txt_in",
        "caption_projection*",
        "norm_out*",
        "proj_out",
        "all_final_layer*",
    )
    """Globs of the denoiser's layers that are never quantised: those that numbers come in by, the time among them, and go out by. They are few,
    and their errors reach everything."""
    risky_layers: ClassVar[Mapping[str, str]] = {}
    """Globs of the denoiser's layers with which adapters are known to have failed, to what is known, in a sentence."""
    denoiser_folder: ClassVar[str] = "transformer"
    """The denoiser's sub-folder in diffusers layout: transformer or unet."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options that mean something in few families, this among them: see `OF_FEW_FAMILIES` in `options/effects.py`."""
    original_layout: ClassVar[str | None] = None
    """The layout in which the model's makers publish it, by its name in the table of layer names that exports use; None if it is not there."""
    modelspec_architecture: str | None = None
    """What the model specification that adapter files carry calls the architecture; the family's name if not given."""
    kohya_base: str | None = None
    """What kohya's scripts, and the tools that read their files, call the base model; the family's name if not given."""
    parts: tuple[str, ...]
    """Sub-folders of a whole model that training or validation reads, the denoiser's among them; a model without a VAE lacks that one."""
    t5_parts: ClassVar[tuple[str, ...]] = ()
    """Those of them that are a T5 and its tokenizer, in whose place `pretrained_t5_model_name_or_path` puts another."""
    text_prefixes: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    """Text encoders that single files in the layout of the model's makers hold, to what stands before the names of their tensors there."""

    def __init__(self, options: Models) -> None:
        """
        Raises:
            ConfigError: no such flavour.
        """
        self.options = options
        self.source = Source(
            options,
            self.flavours,
            self.t5_parts,
            denoiser=self.denoiser_folder,
            text_prefixes=self.text_prefixes,
            flavours_of=self.flavours_of,
        )
        if not self.source.has_vae:
            self.parts = tuple(name for name in self.parts if name != "vae")

    # Facts that may differ between a family's models; where they do not, a class attribute.

    @property
    @abstractmethod
    def pipeline_class(self) -> str:
        """The class in diffusers that samples this model."""

    @property
    def idle(self) -> Mapping[str, str]:
        """Options without effect in this model, besides those of other objectives, to the reason. Asks nothing of the hub."""
        return {}

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """Tell of a denoiser in a single file which flavours it may be of, by the names and shapes of its tensors in either layout.

        The one first whose settings are taken; none if it is of no flavour, or all are alike and the first of all will do.
        """
        return ()

    @property
    def takes_real_guidance(self) -> bool:
        """Whether `validation_guidance_real` has an effect. Asks nothing of the hub."""
        return False

    @property
    def masks_attention(self) -> bool:
        """Whether the denoiser's attention is kept from seeing padding, at least in some batches. Asks nothing of the hub."""
        return False

    # Before anything is loaded.

    def source_name(self) -> str:
        """The hub id or folder of the model, as the user would write it."""
        return self.source.location

    def notes(self) -> list[str]:
        """Settings of the model that have no effect in this run, a sentence each."""
        options, name = self.options, self.denoiser_folder
        subfolders = {"transformer": options.pretrained_transformer_subfolder, "unet": options.pretrained_unet_subfolder}
        other = "unet" if name == "transformer" else "transformer"
        found = []
        if not is_local(self.source.location) and (near := nearest_path(self.source.location)):
            found.append(f"{self.source.location} is taken for a repository on the hub, since there is no such folder; there is {near}")
        if self.source.is_replaced(other) or subfolders[other]:
            found.append(f"pretrained_{other}_model_name_or_path and its subfolder have no effect: {options.model_family} has no {other}")
        if subfolders[name] and not self.source.is_replaced(name):
            found.append(f"pretrained_{name}_subfolder has no effect without pretrained_{name}_model_name_or_path")
        if options.pretrained_t5_model_name_or_path and not self.t5_parts:
            found.append(f"pretrained_t5_model_name_or_path has no effect: {options.model_family} reads no T5")
        return [*found, *self.source.notes(self.parts)]

    def objective_notes(self, options: Diffusion) -> list[str]:
        """What the options of the objective change in what the model says of itself, a sentence each."""
        return []

    def check_source(self) -> None:
        """Refuse a local folder that lacks a needed part or is of another family; what is on the hub is not asked for.

        Raises:
            ConfigError: names the folder, what is missing and what there is.
        """
        check_model(self.source, self.pipeline_class, self.parts, [self.denoiser_folder] if self.starts_random else [])

    @property
    def starts_random(self) -> bool:
        """Whether the denoiser is built from its configuration alone."""
        return self.options.model_init == "random"

    @property
    @abstractmethod
    def alignment_px(self) -> int:
        """Both sides of a bucket and of a validation picture are multiples of this. May read configuration files."""

    @abstractmethod
    def check_size(self, size: Size) -> None:
        """Refuse a picture that the denoiser cannot take. Called for every bucket and every validation size.

        Raises:
            ConfigError: says which sizes there are.
        """

    # Text: called first, while nothing else is loaded.

    @abstractmethod
    def load_text_encoders(self, device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> Any:
        """Load tokenizers and text encoders, frozen; whatever object `encode_text` wants.

        Args:
            settles: how the networks are held, in the order of `text_modules`; in `dtype` on `device` if not given.
        """

    @property
    def frozen_text(self) -> Sequence[str]:
        """Folders of the text encoders that stay as they are where others are trained: what they make of a prompt is made once, and kept."""
        return ()

    def load_some_text(self, names: Collection[str], device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> Any:
        """As `load_text_encoders`, only the encoders of these folders; for a family that has `frozen_text`, or all of them."""
        return self.load_text_encoders(device, dtype, settles)

    @abstractmethod
    def text_modules(self, encoders: Any) -> list[nn.Module]:
        """The networks among `encoders`, in the order of text_encoder_1_precision to text_encoder_4_precision."""

    def text_networks(self, encoders: Any) -> dict[str, nn.Module]:
        """The networks among `encoders` that a LoRA can be put on, by the keys of `adaptable_text`."""
        return {}

    def empty_text_networks(self) -> dict[str, nn.Module]:
        """The same without numbers, on the meta device."""
        return {}

    def adaptable_encoders(self, encoders: Any) -> dict[str, nn.Module]:
        """The encoders that these networks are, or lie in, by their folders."""
        return {}

    @abstractmethod
    def encode_text(self, encoders: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to fixed-length tensors by the family's own names, e.g. `prompt` (B, T, D), `mask` (B, T)."""

    def encode_frozen(self, encoders: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The share of `encode_text` that the encoders of `frozen_text` have in it, (B, ...), by any names; the others need not be loaded."""
        return {}

    def encode_trained(self, encoders: Any, prompts: Sequence[str], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `encode_text` gives; the encoders of `frozen_text` need not be loaded.

        Args:
            frozen: what `encode_frozen` gave of these prompts, on the encoders' device.
        """
        return self.encode_text(encoders, prompts)

    @abstractmethod
    def count_tokens(self, encoders: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, end token included; to warn of captions over `text_tokens`."""

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """T, the fixed number of text tokens."""

    @abstractmethod
    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        """The shapes of what `encode_text` makes of one prompt, by the same names; those that end in "mask" are of 8-byte integers.

        Args:
            encoders: configurations of the text encoders, in their order; None stands for that of the released models.
        """

    @abstractmethod
    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        """Identity of all that text embeddings depend on besides the prompt and the precision: weights, tokenizer, length.

        Args:
            memo_folder: where digests of large files may be remembered.
        """

    # Latents: called second, with the text encoders gone.

    @abstractmethod
    def latent_spec(self, vae: Mapping[str, Any] | None) -> LatentSpec:
        """Channels and stride of raw latents.

        Args:
            vae: configuration of the VAE; None stands for that of the released models.
        """

    @property
    @abstractmethod
    def vae_stride(self) -> int:
        """Pixels to a latent pixel."""

    @abstractmethod
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    @abstractmethod
    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """Encode (B, 3, H, W) in [-1, 1] to raw `mean` and `std` of the posterior, float32, (B, C, h, w) each."""

    @abstractmethod
    def scale_latents(self, raw: Tensor) -> Tensor:
        """Raw latents as the VAE gave them to the scaled ones that the denoiser sees, (B, C, h, w)."""

    def vae_fingerprint(self, memo_folder: Path | None = None) -> str:
        """Identity of all that raw latents depend on besides the pixels and the precision: weights and config of the VAE."""
        return digest_files(self.source.part("vae").files(), memo_folder)

    # Training: called every step, but for loading.

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """Load the denoiser on the CPU in `dtype`; with `model_init: random`, from its configuration and the seed.

        It comes frozen and in evaluation mode; torch's own generators are left as they were.
        """

    @abstractmethod
    def load_frozen(self, settle: Settle, seed: int) -> nn.Module:
        """Load the denoiser layer by layer to its final form and place, frozen and in evaluation mode.

        Its weights are never all in memory in the form of the file; otherwise as `load_denoiser`.
        """

    @abstractmethod
    def denoiser_fingerprint(self, memo_folder: Path | None = None) -> str:
        """Identity of the denoiser's files.

        Args:
            memo_folder: where digests of large files may be remembered.
        """

    @abstractmethod
    def empty_denoiser(self) -> nn.Module:
        """The denoiser without numbers, on the meta device: names and shapes, which its configuration tells."""

    @abstractmethod
    def process(self, options: Diffusion) -> Process: ...

    @abstractmethod
    def tokens(self, latents: Tensor) -> int:
        """Image tokens that the denoiser makes of latents (B, C, h, w)."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """One denoiser call, in the denoiser's dtype; answers in the form of `noised.target`, (B, C, h, w)."""

    # Looking: called when pictures are due.

    @abstractmethod
    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        """A diffusers pipeline without text encoders, around parts already loaded; it samples as the options say that it was trained."""

    @abstractmethod
    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        """Encoded prompt and negative prompt, both of one picture or more, as arguments of the pipeline's call."""

    @abstractmethod
    def pipeline_text_arguments(self) -> dict[str, Any]:
        """Arguments that make the plain pipeline encode text as we do, e.g. its max_sequence_length."""

    def pipeline_call_arguments(self, guidance: float | None) -> dict[str, Any]:
        """Arguments of the plain pipeline's call that set the strength of guidance, and keep it from changing the size that it is asked for."""
        return {"guidance_scale": guidance}

    def guidance_arguments(self, options: Validation) -> dict[str, Any]:
        """The same, for guidance of every sort that the options ask for."""
        return self.pipeline_call_arguments(options.validation_guidance)

    def start_strength(self, options: Diffusion) -> float | None:
        """Share of the sampling steps that the pipeline makes of a picture that it improves; None where it makes pictures from noise alone."""
        return None

    def pipeline_callback(self, after_step: Callable[[int, Tensor], None]) -> dict[str, Any]:
        """Arguments of the pipeline's call that have it tell which sampling step, from 0, is done, and the latents after it as it holds them."""

        def told(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            after_step(index, tensors["latents"])
            return tensors

        return {"callback_on_step_end": told}

    # Done: called at the end of a run that trained the denoiser itself.

    def save_pipeline(self, denoiser: nn.Module, folder: Path, others: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        """Write a whole model that diffusers loads: this denoiser, and the other parts as they came.

        Args:
            others: parts that are written from memory too, by their folders.
        """
        save_model(self.source, {self.denoiser_folder: denoiser, **others}, folder)

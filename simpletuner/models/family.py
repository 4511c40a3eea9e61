"""The contract of a model family: a recipe that holds no weights.

A family states facts as class attributes and says how its parts are loaded and called. It is built once for a
run with the `Models` section of the options. Importing a family imports no torch, so that facts are cheap:
diffusers, transformers and torch are imported inside the verbs, late and per family.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from simpletuner.models.identity import digest_files
from simpletuner.models.layout import check_model, save_model
from simpletuner.models.source import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.process import Process
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.models import Models
    from simpletuner.types import Batch, Noised, Size


class ModelFamily(ABC):
    """One model family with the paths and flavour that a run chose."""

    flavours: ClassVar[Mapping[str, str]]
    """Flavour name to hub id; the first is the default."""
    objective: ClassVar[Literal["flow", "denoising"]]
    """Which of the options of the objective have an effect: those of flow matching, or those of epsilon and v prediction."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Option key to the value that this family prefers over the general default."""
    takes_references: ClassVar[bool] = False
    """Whether the denoiser can be shown further pictures (`Batch.references`) besides the one that it learns."""
    class_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Short class names that users write in LyCORIS presets, to this family's classes in diffusers."""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the modules that a plain LoRA adapts."""
    lora_target_sets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Other sets of such suffixes, which `flux_lora_target` chooses by name."""
    denoiser_folder: ClassVar[str] = "transformer"
    """The denoiser's sub-folder in diffusers layout: transformer or unet."""
    original_layout: ClassVar[str | None] = None
    """The layout in which the model's makers publish it, by its name in the table of layer names that exports use; None if it is not there."""
    modelspec_architecture: ClassVar[str | None] = None
    """What the model specification that adapter files carry calls the architecture; the family's name if not given."""
    kohya_base: ClassVar[str | None] = None
    """What kohya's scripts, and the tools that read their files, call the base model; the family's name if not given."""
    parts: tuple[str, ...]
    """Sub-folders of a whole model that training or validation reads, the denoiser's among them; a model without a VAE lacks that one."""
    t5_parts: ClassVar[tuple[str, ...]] = ()
    """Those of them that are a T5 and its tokenizer, in whose place `pretrained_t5_model_name_or_path` puts another."""

    def __init__(self, options: Models) -> None:
        """
        Raises:
            ConfigError: no such flavour.
        """
        self.options = options
        self.source = Source(options, self.flavours, self.t5_parts)
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
    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load tokenizers and text encoders, frozen; whatever object `encode_text` wants."""

    @abstractmethod
    def text_modules(self, encoders: Any) -> list[nn.Module]:
        """The networks among `encoders`, in the order of text_encoder_1_precision to text_encoder_4_precision."""

    @abstractmethod
    def encode_text(self, encoders: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to fixed-length tensors by the family's own names, e.g. `prompt` (B, T, D), `mask` (B, T)."""

    @abstractmethod
    def count_tokens(self, encoders: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, end token included; to warn of captions over `text_tokens`."""

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """T, the fixed number of text tokens."""

    @abstractmethod
    def text_fingerprint(self, memo_folder: Path | None = None) -> str:
        """Identity of all that text embeddings depend on besides the prompt and the precision: weights, tokenizer, length.

        Args:
            memo_folder: where digests of large files may be remembered.
        """

    # Latents: called second, with the text encoders gone.

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

    # Done: called at the end of a run that trained the denoiser itself.

    def save_pipeline(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a whole model that diffusers loads: this denoiser, and the other parts as they came."""
        save_model(self.source, self.denoiser_folder, denoiser, folder)

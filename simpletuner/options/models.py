"""Options of the model: its family, its flavour, and where its parts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.options.option import REQUIRED, Section, option


class Models(Section):
    """Which model is trained, and where its parts come from."""

    model_family: str = option(REQUIRED, ask="Which family of model?", choices_from="family")
    """Family of the base model: it decides how the model is loaded, trained and sampled."""

    model_flavour: str | None = option(None, ask="Which flavour of it?", choices_from="flavour")
    """Flavour of the family, a published model on the hub. The family's first one if not given."""

    pretrained_model_name_or_path: str | None = option(None, ask="Hub id or folder of the base model (empty for the flavour's own)?")
    """The base model to take instead of the flavour's: hub id or folder, in diffusers layout, or a single `.safetensors` file in the layout
    of the model's makers, by path or by its address on the hub."""

    single_file_base_model: str | None = option(None, advanced=True)
    """Hub id or folder, in diffusers layout, that gives what a single file does not hold: settings, tokenizers, the noise schedule, and parts
    such as text encoders. The flavour that the file is of, if not given."""

    pretrained_transformer_model_name_or_path: str | None = option(None, advanced=True)
    """Hub id, folder or single file of a transformer to take instead of the base model's own."""

    pretrained_transformer_subfolder: str | None = option(None, advanced=True)
    """Folder of the transformer inside `pretrained_transformer_model_name_or_path`; `transformer` if not given."""

    pretrained_unet_model_name_or_path: str | None = option(None, advanced=True)
    """Hub id, folder or single file of a U-Net to take instead of the base model's own."""

    pretrained_unet_subfolder: str | None = option(None, advanced=True)
    """Folder of the U-Net inside `pretrained_unet_model_name_or_path`; `unet` if not given."""

    pretrained_vae_model_name_or_path: str | None = option(None, advanced=True)
    """Hub id, folder or single file of a VAE to take instead of the base model's own. `none` trains on the pixels themselves, without a VAE."""

    pretrained_t5_model_name_or_path: str | None = option(None, advanced=True)
    """Hub id or folder of a T5 with its tokenizer to take instead of the base model's own, where it has one; it stays frozen. The folder may
    be laid out as transformers' own are, or as one of diffusers'."""

    revision: str | None = option(None, advanced=True)
    """Branch, tag or commit on the hub; the main branch if not given."""

    variant: str | None = option(None, advanced=True)
    """Variant of the weight files, such as `fp16` in model.fp16.safetensors."""

    model_init: Literal["pretrained", "random"] = option("pretrained", advanced=True)
    """Where the denoiser's weights come from. `random` takes its config.json alone and trains from scratch."""

    flux_attention_masked_training: bool = option(False, advanced=True)
    """Hide the padding of a Flux.1 prompt from the model, in training and in pictures. For a base that was trained so; `libreflux` always is."""

    tokenizer_max_length: int | None = option(None, ge=1, advanced=True)
    """Text tokens that a caption is cut or filled to; the family's own number if not given."""

    data_aesthetic_score: float = option(7.0, ge=0, le=10, advanced=True)
    """How good the pictures are, from 1 to 10: what a Stable Diffusion XL refiner is told of each, in training and in validation."""

    def at_folder(self, folder: Path) -> Models:
        """The same with a folder as the whole model, of which nothing is replaced or random."""
        replaced = {f"pretrained_{part}_model_name_or_path" for part in ("transformer", "unet", "vae")}
        beside = {"model_flavour", "pretrained_transformer_subfolder", "pretrained_unet_subfolder", "single_file_base_model", "revision", "variant"}
        return self.model_copy(
            update={**dict.fromkeys((*replaced, *beside)), "pretrained_model_name_or_path": str(folder), "model_init": "pretrained"}
        )

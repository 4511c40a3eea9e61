"""How well pictures fit their prompts, by a CLIP: CLIPScore of Hessel et al. 2021 (https://arxiv.org/abs/2104.08718) without its factor of 2.5.

100 max(cos(image, text), 0), as torchmetrics and the papers on text-to-image models give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

IMAGES_AT_ONCE = 8


class ClipScore:
    """A CLIP that waits in main memory and comes to the accelerator to score."""

    def __init__(self, location: str) -> None:
        """
        Args:
            location: a folder or hub id of a CLIPModel in the layout of transformers.

        Raises:
            OSError, ValueError: there is none.
        """
        from transformers import CLIPModel, CLIPProcessor

        self._model: Any = CLIPModel.from_pretrained(location).eval().requires_grad_(False)
        self._processor: Any = CLIPProcessor.from_pretrained(location)

    def __call__(self, images: Sequence[Image], prompts: Sequence[str], device: torch.device) -> list[float]:
        """The score of each picture with its prompt, of which as much is read as CLIP can."""
        import torch

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model.to(device, dtype)
        scores: list[float] = []
        try:
            with torch.no_grad():
                for start in range(0, len(images), IMAGES_AT_ONCE):
                    some = slice(start, start + IMAGES_AT_ONCE)
                    read = self._processor(text=list(prompts[some]), images=list(images[some]), return_tensors="pt", padding=True, truncation=True)
                    read = {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in read.items()}
                    answer = self._model(**read)
                    cosines = torch.cosine_similarity(answer.image_embeds.float(), answer.text_embeds.float())
                    scores += (100 * cosines.clamp(min=0)).tolist()
        finally:
            self._model.to("cpu", torch.float32)
        return scores

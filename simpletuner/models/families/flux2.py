"""Flux.2: a flow-matching transformer that reads a language model's inner states; dev is distilled to a guidance it is told, klein is not.

Letters: B batch, C latent channels, h w latent pixels, N image tokens (h/2 x w/2), T text tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.flow import flow_matching, pack, unpack
from simpletuner.models.latents import LatentSpec
from simpletuner.models.loading import load_network
from simpletuner.models.recognise import Shapes
from simpletuner.models.source import is_local
from simpletuner.models.text import TextEncoder, load_encoder, width_of
from simpletuner.models.usual import UsualFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.diffusion.flow import FlowMatching
    from simpletuner.models.streaming import Settle
    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.validation import Validation
    from simpletuner.types import Batch, Noised

DEV, KLEIN = "Flux2Pipeline", "Flux2KleinPipeline"
DISTILLED = {"validation_guidance": 1.0, "validation_num_inference_steps": 4}
"""How pictures are made by klein where it is distilled to few steps."""
STATES_READ = {DEV: (10, 20, 30), KLEIN: (9, 18, 27)}
"""After how many layers of the language model its states are read; the pipelines' own choice."""
RELEASED_TEXT_WIDTHS = {"dev": 5120, "klein-9b": 4096, "klein-4b": 2560}
TEXT_TOKENS = 512
SHIFT = 3.0


class Flux2(UsualFamily):
    objective: ClassVar = "flow"
    flavours: ClassVar = {
        "klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
        "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
        "dev": "black-forest-labs/FLUX.2-dev",
        "klein-9b-distilled": "black-forest-labs/FLUX.2-klein-9B",
        "klein-4b-distilled": "black-forest-labs/FLUX.2-klein-4B",
    }
    billions: ClassVar = {"klein-9b": 9, "klein-4b": 4, "dev": 32, "klein-9b-distilled": 9, "klein-4b-distilled": 4}
    defaults: ClassVar = {"flow_schedule_shift": SHIFT, "validation_guidance": 4.0}
    flavour_defaults: ClassVar = {"klein-9b-distilled": DISTILLED, "klein-4b-distilled": DISTILLED}
    class_aliases: ClassVar = {
        "Attention": ("Flux2Attention", "Flux2ParallelSelfAttention"),
        "FeedForward": ("Flux2FeedForward",),
        "TransformerBlock": ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        "JointTransformerBlock": ("Flux2TransformerBlock",),
        "SingleTransformerBlock": ("Flux2SingleTransformerBlock",),
    }
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj")
    lora_target_sets: ClassVar = {
        "all": (
            *lora_targets,
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_out"),
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        )
    }
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
    takes_references = True
    text_parts = (("text_encoder", "tokenizer"),)
    denoiser_class = "Flux2Transformer2DModel"
    original_layout = "flux2"
    modelspec_architecture = "flux-2"
    vae_class = "AutoencoderKLFlux2"
    released_latents = LatentSpec(channels=32, stride_px=8)

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """By the width, of which the modulation of a block is three times as much."""
        modulation = denoiser.get("single_stream_modulation.lin.weight", denoiser.get("single_stream_modulation.linear.weight"))
        if modulation is None:
            return ()
        named = {6144: ("dev",), 4096: ("klein-9b", "klein-9b-distilled"), 3072: ("klein-4b", "klein-4b-distilled")}
        return named.get(modulation[0] // 3, ())

    # Before anything is loaded.

    @property
    def pipeline_class(self) -> str:
        """As the model's own list of parts says; what the flavours are is known without asking the hub."""
        try:
            base = self.source.base if self.source.knows("") else self.flavours.get(self.options.model_flavour or "", "")
            if base in self.flavours.values() and not is_local(base):
                return DEV if base == self.flavours["dev"] else KLEIN
            return DEV if base and self.source.index.get("_class_name") == DEV else KLEIN
        except ConfigError:  # a folder without such a list, a file that is none: `check_source` has more to say of it
            return KLEIN

    @property
    def idle(self) -> Mapping[str, str]:
        try:
            base = self.source.base if self.source.knows("") else None
        except ConfigError:
            return {}
        if base is None or not (is_local(base) or base in self.flavours.values()):
            return {}  # only the hub could tell
        if self.pipeline_class == DEV:
            return {"validation_negative_prompt": "a model distilled from guidance takes no negative prompt"}
        return {"distilled_guidance": "klein is told no guidance; that is for dev"}

    @property
    def takes_real_guidance(self) -> bool:
        return not (self.source.is_released or is_local(self.source.location)) or self.pipeline_class == KLEIN

    @property
    def step_px(self) -> int:
        return self.vae_stride * 2

    # Text.

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype, settles: Sequence[Settle] = ()) -> list[TextEncoder]:
        from transformers import AutoTokenizer

        # Of dev's tokenizer, a processor, only the part for text is wanted: the one for pictures needs torchvision.
        tokenizer = AutoTokenizer.from_pretrained(self.source.part("tokenizer").folder())
        return [TextEncoder(tokenizer, load_encoder(self.source, device, dtype, "text_encoder", settles[0] if settles else None))]

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, 3 D): the states after three layers of the language model, side by side; of padding too, which the denoiser sees."""
        import torch

        (text,) = encoders
        padded = {"padding": "max_length", "truncation": True, "max_length": self.text_tokens, "return_tensors": "pt"}
        inputs = self._tokenize(text.tokenizer, prompts, **padded).to(next(text.encoder.parameters()).device)
        with torch.no_grad():
            states = text.encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,  # nobody reads the logits, and those of all tokens are large
            ).hidden_states
        return {"prompt": torch.cat([states[layers] for layers in STATES_READ[self.pipeline_class]], dim=-1)}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        """The language model of a flavour is as wide as its kind and size have it: Mistral Small 24B, Qwen3 8B, Qwen3 4B."""
        released = RELEASED_TEXT_WIDTHS.get((self.source.flavour or "klein-9b").removesuffix("-distilled"), 0)
        width = width_of(encoders[0], released)
        return {"prompt": (self.text_tokens, len(STATES_READ[self.pipeline_class]) * width)}

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenize(encoders[0].tokenizer, prompts)["input_ids"]]

    @property
    def text_tokens(self) -> int:
        return self.options.tokenizer_max_length or TEXT_TOKENS

    def _tokenize(self, tokenizer: Any, prompts: Sequence[str], **padding: Any) -> Any:
        """Put prompts into the model's chat template as its pipeline does, and make tokens of them."""
        if self.pipeline_class == DEV:
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            return tokenizer.apply_chat_template(format_input(list(prompts)), tokenize=True, return_dict=True, **padding)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return tokenizer(texts, verbose=False, **padding)

    # Latents.

    def scale_latents(self, raw: Tensor) -> Tensor:
        """Every latent pixel of a patch of 2 x 2 has a mean and a deviation of its own."""
        mean, std = self._statistics
        return unpack((pack(raw) - mean.to(raw)) / std.to(raw), raw.shape[-2], raw.shape[-1])

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (4 C,) each, that the VAE's batch norm has learned; they are nowhere but in its weights."""
        import diffusers
        import torch

        vae = load_network(getattr(diffusers, self.vae_class), self.source.part("vae"), torch.float32)
        return vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)

    # Training.

    def process(self, options: Diffusion) -> FlowMatching:
        return flow_matching(options, SHIFT, options.distilled_guidance if self.denoiser_config.get("guidance_embeds", True) else None)

    def tokens(self, latents: Tensor) -> int:
        return int((latents.shape[-2] // 2) * (latents.shape[-1] // 2))

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The velocity noise - latents, (B, C, h, w)."""
        import torch

        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        height, width = noised.latents.shape[-2:]
        prompt = batch.text["prompt"].to(device, dtype)  # (B, T, 3 D)
        references = [(one["scaled"] if "scaled" in one else self.scale_latents(one["mean"].float())).to(device) for one in batch.references]
        pictures = [noised.latents, *references]
        tokens = self.tokens(noised.latents)  # N
        velocity: Tensor = denoiser(
            hidden_states=torch.cat([pack(picture.to(dtype)) for picture in pictures], dim=1),  # (B, N + those of references, 4 C)
            encoder_hidden_states=prompt,
            timestep=noised.time.to(dtype),  # (B,), in [0, 1]; rounded to the model's dtype, as the pipeline does
            guidance=None if noised.guidance is None else noised.guidance.float(),
            img_ids=torch.cat([_grid(picture, number) for number, picture in enumerate(pictures)]),
            txt_ids=_positions(device, words=prompt.shape[1]),
            return_dict=False,
        )[0]
        return unpack(velocity[:, :tokens], height, width)

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        distilled = {"is_distilled": bool(self.source.index.get("is_distilled"))} if self.pipeline_class == KLEIN else {}
        return self.pipeline_around(denoiser, vae, self.sampler(), **distilled)

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.pipeline_class == DEV:
            return {"prompt_embeds": text["prompt"]}
        return {"prompt_embeds": text["prompt"], "negative_prompt_embeds": negative["prompt"]}

    def guidance_arguments(self, options: Validation) -> dict[str, Any]:
        """Klein's guidance is a real one, by either name."""
        real = options.validation_guidance_real
        return self.pipeline_call_arguments(real if self.pipeline_class == KLEIN and real > 1 else options.validation_guidance)


def _grid(latents: Tensor, number: int) -> Tensor:
    """Where the tokens of a picture lie, (N, 4). Reference pictures stand at 10, 20, ... (Flux2Pipeline._prepare_image_ids)."""
    ids = _positions(latents.device, rows=latents.shape[-2] // 2, columns=latents.shape[-1] // 2)
    ids[:, 0] = 10 * number
    return ids


def _positions(device: torch.device, pictures: int = 1, rows: int = 1, columns: int = 1, words: int = 1) -> Tensor:
    """Where each token lies, (tokens, 4): picture, row, column, word."""
    import torch

    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (pictures, rows, columns, words)))

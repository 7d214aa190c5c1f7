"""Pipelines of diffusers with tiny random parts, made in code: nothing is downloaded."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 16  # of the text embedding
SIZE = 16  # of a latent; pictures are twice as large
ADDED = {  # SDXL's UNet takes sizes and a pooled text too, and the texts of two encoders
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded(make: Callable[..., nn.Module]) -> Callable[..., Any]:
    """The same weights wherever and whenever the part is made; in evaluation mode, as pipelines load them."""

    def build(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs).eval()

    return build


@seeded
def unet(**changes: Any) -> Any:
    """A text-to-image UNet with cross-attention at the top level, as SD's, so inside and outside of the region."""
    options: dict[str, Any] = {
        "sample_size": SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**(options | changes))


@seeded
def plain_unet(**changes: Any) -> Any:
    """An unconditional one."""
    options: dict[str, Any] = {
        "sample_size": SIZE,
        "block_out_channels": (8, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(options | changes))


@seeded
def vae(kind: str = "AutoencoderKL") -> Any:
    options: dict[str, Any] = {"block_out_channels": [4, 8], "latent_channels": 4, "norm_num_groups": 2}
    if kind == "AutoencoderKL":
        options |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    else:
        options = {"block_out_channels": [32, 64], "latent_channels": 4, "down_block_types": ["DownEncoderBlock2D"] * 2}
    return getattr(diffusers, kind)(**options)


@seeded
def text_encoder(kind: type[nn.Module] = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=54,
        projection_dim=WIDTH,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
    )
    return kind(config)


@seeded
def image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=WIDTH,
        patch_size=16,
    )
    return CLIPVisionModelWithProjection(config)


def tokenizer() -> CLIPTokenizer:
    """Letters, letters that end a word, and the two marks."""
    letters = (*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase))
    vocab = {token: k for k, token in enumerate((*letters, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def image_processor() -> Any:
    return CLIPImageProcessor(crop_size=32, size=32)


def scheduler(kind: str = "DDIMScheduler", **options: Any) -> Any:
    return getattr(diffusers, kind)(**(NOISE | options))


def picture(seed: int = 0, size: int = 2 * SIZE) -> Tensor:
    """(1, 3, size, size) in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_image(kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """A Stable Diffusion pipeline of the given class."""
    base: dict[str, Any] = {
        "unet": unet(),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": scheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if parts.get("image_encoder") is None:
        parts.pop("image_encoder", None)
    return quiet(getattr(diffusers, kind)(**(base | parts)))


def sdxl(kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    base: dict[str, Any] = {
        "unet": unet(**ADDED),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": scheduler("EulerDiscreteScheduler"),
        "add_watermarker": False,
    }
    return quiet(getattr(diffusers, kind)(**(base | parts)))


@contextlib.contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Count the calls of a module by a plain hook."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()

"""Architectures of well-known UNets, as diffusers configurations: shapes only, no weights.

A preset is a name for a configuration and a native size. Nothing is counted by name: `flops` and `regions` treat a
preset as they treat any other model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "Preset", "tiny"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One architecture.

    Attributes:
        title: what people call it.
        config: diffusers configuration, with the class as "_class_name"; what is left out is the class's default.
        size: native spatial shape of the sample (of the latent, where there is one).
        frames: frames of a video sample; 0 for images.
    """

    title: str
    config: Mapping[str, Any] = field(repr=False)
    size: tuple[int, ...]
    frames: int = 0


_SD = {"_class_name": "UNet2DConditionModel", "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
_SIMPLE = {
    "_class_name": "UNet2DConditionModel",
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "sd15": Preset(
            "Stable Diffusion 1.5, 512×512",
            {**_SD, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            (64, 64),
        ),
        "sd21": Preset(
            "Stable Diffusion 2.1, 768×768",
            {
                **_SD,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            (96, 96),
        ),
        "sdxl": Preset(
            "Stable Diffusion XL, 1024×1024",
            {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            (128, 128),
        ),
        "svd": Preset(
            "Stable Video Diffusion, 14 frames of 1024×576",
            {"_class_name": "UNetSpatioTemporalConditionModel", "sample_size": 96, "num_frames": 14},
            (72, 128),
            frames=14,
        ),
        "kandinsky22": Preset(
            "Kandinsky 2.2 decoder, 512×512",
            {
                **_SIMPLE,
                "in_channels": 4,
                "out_channels": 8,
                "block_out_channels": (384, 768, 1152, 1536),
                "cross_attention_dim": 768,
                "encoder_hid_dim": 1280,
                "encoder_hid_dim_type": "image_proj",
                "addition_embed_type": "image",
            },
            (64, 64),
        ),
        "deepfloyd-if": Preset(
            "DeepFloyd IF-I-XL, pixels, 64×64",
            {
                **_SIMPLE,
                "in_channels": 3,
                "out_channels": 6,
                "block_out_channels": (704, 1408, 2112, 2816),
                "cross_attention_dim": 2816,
                "cross_attention_norm": "group_norm",
                "encoder_hid_dim": 4096,
                "addition_embed_type": "text",
                "act_fn": "gelu",
            },
            (64, 64),
        ),
        "ddpm-cifar10": Preset(
            "DDPM on CIFAR-10, pixels, 32×32",
            {
                "_class_name": "UNet2DModel",
                "sample_size": 32,
                "block_out_channels": (128, 256, 256, 256),
                "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": None,
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
            },
            (32, 32),
        ),
    }
)


def tiny(preset: Preset) -> Preset:
    """The same architecture at a tenth of its width and a quarter of its size: what a CPU runs in a moment.

    Example:
        >>> tiny(PRESETS["sd15"]).config["block_out_channels"], tiny(PRESETS["sd15"]).size
        ((32, 64, 128, 128), (16, 16))
    """
    config = dict(preset.config)
    video = config["_class_name"] == "UNetSpatioTemporalConditionModel"
    wide = config.get("block_out_channels", (320, 640, 1280, 1280))
    config["block_out_channels"] = tuple(max(32, channels // 320 * 32) for channels in wide)
    for name in ("num_attention_heads",) if video else ("attention_head_dim",):
        if video or config.get(name) is not None:
            config[name] = 8
    return Preset(f"{preset.title}, at a tenth of its width", config, tuple(max(16, n // 32 * 8) for n in preset.size),
                  frames=min(preset.frames, 2))  # fmt: skip

"""Real-size configurations of the zoo's main UNets, on the meta device: no weights in memory.

Their regions are those of the tiny ones: the same modules where the structure is the same, else the same but for the
numbers of levels and layers.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from clockwork_hooks.models import example_inputs, load_model

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A real-size UNet.

    Attributes:
        title: the model it is the configuration of.
        tiny: its case in `ZOO`.
        build: makes (model, args, kwargs) on meta.
        entry: module that returns the entry; "" where the parent computes it.
        exit: module that returns the exit, the innermost.
        same: is it built of the very modules that the tiny one is built of?
        slow: left to the slow tests, as the fast ones are to stay so.
    """

    title: str
    tiny: str
    build: Callable[[], Call]
    entry: str
    exit: str
    same: bool = False
    slow: bool = True


def _preset(name: str) -> Callable[[], Call]:
    return lambda: load_model(name)


def _diffusers(kind: str, *, size: tuple[int, ...] | None = None, frames: int = 0, **config: Any) -> Callable[[], Call]:
    """A class of diffusers; its defaults are a real model's unless the configuration says otherwise."""

    def build() -> Call:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(diffusers, kind)(**config).eval().to("meta")
        return model, *example_inputs(kind, model.config, size=size, frames=frames)

    return build


def _meta(make: Callable[[], Any], *args: tuple[int, ...], **kwargs: tuple[int, ...]) -> Callable[[], Call]:
    """Any model, with inputs of these shapes."""

    def build() -> Call:
        with torch.device("meta"):
            model = make().eval().to("meta")
            return model, tuple(map(torch.zeros, args)), {name: torch.zeros(shape) for name, shape in kwargs.items()}

    return build


def _ddpm() -> nn.Module:
    from tests.zoo.lucidrains import Unet

    unet: nn.Module = Unet(dim=128, dim_mults=(1, 2, 4, 8))
    return unet


def _karras() -> nn.Module:
    from tests.zoo.lucidrains import KarrasUnet

    unet: nn.Module = KarrasUnet(image_size=64)
    return unet


def _imagen() -> nn.Module:
    from tests.zoo.imagen import Unet

    attentions = (False, True, True, True)
    sizes = {"dim": 512, "dim_mults": (1, 2, 3, 4), "num_resnet_blocks": 3, "text_embed_dim": 768}
    unet: nn.Module = Unet(**sizes, layer_attns=attentions, layer_cross_attns=attentions)
    return unet


def _monai() -> nn.Module:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    attention = {"attention_levels": (False, True, True), "num_head_channels": (0, 512, 768)}
    return DiffusionModelUNet(3, 7, 3, num_res_blocks=2, channels=(256, 512, 768), **attention)


_LAYERS = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
_STAGE_B = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
    "num_attention_heads": (-1, -1, 20, 20),
    "down_num_layers_per_block": (2, 6, 28, 6),
    "up_num_layers_per_block": (6, 28, 6, 2),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "block_types_per_layer": (_LAYERS, _LAYERS, (*_LAYERS, "SDCascadeAttnBlock"), (*_LAYERS, "SDCascadeAttnBlock")),
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "dropout": (0.0, 0.0, 0.1, 0.1),
    "timestep_conditioning_type": ("sca",),
}
_DANCE = {
    "extra_in_channels": 16,
    "time_embedding_dim": 16,
    "block_out_channels": (128, 128, 256, 256, *[512] * 9),
    "down_block_types": ("DownBlock1DNoSkip", *["DownBlock1D"] * 4, *["AttnDownBlock1D"] * 8),
    "up_block_types": (*["AttnUpBlock1D"] * 8, *["UpBlock1D"] * 4, "UpBlock1DNoSkip"),
}
_UP2 = "up_blocks.2.upsamplers.0.conv"

REAL: dict[str, Real] = {
    "sd15": Real(
        title="Stable Diffusion 1.5",
        tiny="sd15",
        build=_preset("sd15"),
        entry="down_blocks.0.attentions.1",
        exit=_UP2,
        same=True,
        slow=False,
    ),
    "sd21": Real(
        title="Stable Diffusion 2.1",
        tiny="sd21",
        build=_preset("sd21"),
        entry="down_blocks.0.attentions.1",
        exit=_UP2,
        same=True,
        slow=False,
    ),
    "sdxl": Real(
        title="Stable Diffusion XL",
        tiny="sdxl",
        build=_preset("sdxl"),
        entry="down_blocks.0.resnets.1",
        exit="up_blocks.1.upsamplers.0.conv",
        same=True,
        slow=False,
    ),
    "kandinsky22": Real(
        title="Kandinsky 2.2",
        tiny="kandinsky22",
        build=_preset("kandinsky22"),
        entry="down_blocks.0.resnets.2",
        exit="up_blocks.2.upsamplers.0",
        slow=False,
    ),
    "deepfloyd-if": Real(
        title="DeepFloyd IF-I-XL",
        tiny="deepfloyd_if",
        build=_preset("deepfloyd-if"),
        entry="down_blocks.0.resnets.2",
        exit="up_blocks.2.upsamplers.0",
        slow=False,
    ),
    "kandinsky3": Real(
        title="Kandinsky 3",
        tiny="kandinsky3",
        build=_diffusers("Kandinsky3UNet"),
        entry="down_blocks.0.resnets_out.2",
        exit="up_blocks.2.attentions.0",
    ),
    "cascade-b": Real(
        title="Stable Cascade, stage B",
        tiny="cascade_b",
        build=_diffusers("StableCascadeUNet", size=(256, 256), **_STAGE_B),
        entry="down_blocks.0.3",
        exit="up_upscalers.2.1",
    ),
    "dance-diffusion": Real(
        title="Dance Diffusion",
        tiny="unet1d",
        build=_diffusers("UNet1DModel", size=(65536,), **_DANCE),
        entry="down_blocks.0.resnets.2",
        exit="up_blocks.11.up",
    ),
    "unet3d": Real(
        title="Text to video (ModelScope)",
        tiny="unet3d",
        build=_diffusers("UNet3DConditionModel", size=(32, 32), frames=16),
        entry="down_blocks.0.temp_attentions.1",
        exit=_UP2,
    ),
    "svd": Real(
        title="Stable Video Diffusion",
        tiny="svd",
        build=_preset("svd"),
        entry="down_blocks.0.attentions.1",
        exit=_UP2,
    ),
    "motion": Real(
        title="AnimateDiff",
        tiny="motion",
        build=_diffusers("UNetMotionModel", size=(64, 64), frames=16, cross_attention_dim=768),
        entry="down_blocks.0.motion_modules.1",
        exit=_UP2,
        slow=False,
    ),
    "i2vgen-xl": Real(
        title="I2VGen-XL",
        tiny="i2vgen_xl",
        build=_diffusers("I2VGenXLUNet", size=(88, 160), frames=16),
        entry="down_blocks.0.temp_attentions.1",
        exit=_UP2,
    ),
    "ddpm-pytorch": Real(
        title="denoising-diffusion-pytorch, dim 128",
        tiny="ddpm_pytorch",
        build=_meta(_ddpm, (1, 3, 128, 128), (1,)),
        entry="",
        exit="ups.2.3.1",
        slow=False,
    ),
    "karras": Real(
        title="denoising-diffusion-pytorch, EDM2",
        tiny="karras",
        build=_meta(_karras, (1, 4, 64, 64), (1,)),
        entry="downs.3.res_mp_add",
        exit="ups.17.res_mp_add",
    ),
    "imagen": Real(
        title="imagen-pytorch, BaseUnet64",
        tiny="imagen",
        build=_meta(_imagen, (1, 3, 64, 64), (1,), text_embeds=(1, 256, 768)),
        entry="downs.0.3",
        exit="ups.2.3.net.2",
        slow=False,
    ),
    "monai3d": Real(
        title="MONAI, brain MRI latent diffusion",
        tiny="monai3d",
        build=_meta(_monai, (1, 7, 20, 28, 20), timesteps=(1,)),
        entry="down_blocks.0.resnets.1",
        exit="up_blocks.1.upsampler.postconv.conv",
        slow=False,
    ),
}

"""The unconditional image UNets of diffusers. Files and lines are those of diffusers 0.42.1, under models/unets/."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DModel

from tests.zoo.case import RefusedCase, ZooCase, case, children, refused


def up_block(index: int, resnets: int, *, attention: bool = True, conv: bool = True) -> dict[str, Any]:
    """The exit at the end of an up block, and what of that block lies inside the region."""
    path = f"up_blocks.{index}"
    inner = children(f"{path}.resnets", resnets) + (children(f"{path}.attentions", resnets) if attention else ())
    upsampler = f"{path}.upsamplers.0"
    return {"exit": (path, upsampler, *([f"{upsampler}.conv"] if conv else [])), "inner": inner}


def _unet2d(last: dict[str, Any], name: str, note: str, model: UNet2DModel, **kwargs: Any) -> ZooCase:
    return ZooCase(
        name=name,
        model=model,
        args=(torch.randn(2, 3, 16, 16), 7),
        kwargs=kwargs,
        entry=("down_blocks.0.resnets.1",),
        consumer="down_blocks.0.downsamplers.0",
        exit=last["exit"],
        resolution=(16, 16),
        source="diffusers UNet2DModel",
        note=note,
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | set(last["inner"])
        ),
        outside=frozenset(
            {"conv_in", "time_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )


def _model(**config: Any) -> UNet2DModel:
    return UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
            **config,
        }
    )


_NOTE = (
    "unet_2d_blocks.py:1355-1367: the last resnet's output is a skip and goes into the downsampler; unet_2d.py:328-337:"
    " up_blocks.2 takes the three top skips (conv_in and both resnets), so up_blocks.1's upsampler, which up_blocks.1 "
    "returns as it is, is the last thing before the first top-resolution cat."
)


@case
def unet2d() -> ZooCase:
    model = _model(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    plain = _unet2d(up_block(1, 3), "unet2d", _NOTE, model)
    return replace(plain, source="diffusers UNet2DModel, attention in the middle, as in DDPM")


@case
def unet2d_plain() -> ZooCase:
    """No attention outside the mid block; resnets with scale and shift, resampling by resnets, as in ADM."""
    model = _model(resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet")
    return _unet2d(up_block(1, 3, attention=False), "unet2d_plain", _NOTE, model)


@case
def unet2d_classes() -> ZooCase:
    labels = {"class_labels": torch.tensor([3, 1])}
    plain = _unet2d(up_block(1, 3, attention=False), "unet2d_classes", _NOTE, _model(num_class_embeds=5), **labels)
    return replace(
        plain,
        source="diffusers UNet2DModel with class labels",
        note="The region of unet2d. unet_2d.py:297-305: the embedding of the labels is added to that of the time, so "
        "`emb`, a side input of the region, comes from two inputs. The labels are (B,) like a time: only the timestep "
        "goes through the sine and cosine of `time_proj`.",
        outside=plain.outside | {"class_embedding"},
    )


@refused
def ncsnpp() -> RefusedCase:
    model = _model(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=None,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    return RefusedCase(
        name="ncsnpp",
        model=model,
        args=(torch.randn(2, 3, 16, 16), torch.tensor([0.5, 0.7])),
        source="diffusers UNet2DModel, blocks as in NCSN++",
        note="unet_2d.py:334: every up block returns features *and* an image, the sum of the images of the levels "
        "below. unet_2d_blocks.py:2979-2988: up_blocks.1 ends with `hidden_states = self.resnet_up(...)`, at full "
        "size, and its image still at half the size, which up_blocks.2.upsampler enlarges (:2975). Two tensors come up "
        "to the highest level, so no single one stands for what lies below.",
        says=("no single exit", "several exits lead back up: up_blocks.1.resnet_up, up_blocks.2.upsampler"),
    )

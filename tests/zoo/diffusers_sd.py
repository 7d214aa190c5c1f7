"""diffusers' Stable Diffusion UNets and their conditions. Files and lines: diffusers 0.42.1, under models/unets/."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.zoo.case import ZooCase, case, children
from tests.zoo.diffusers_image import up_block


def _like(channels: int, size: int) -> Tensor:
    return torch.randn(2, channels, size, size)


def _sd15(name: str = "sd15", channels: int = 4, **config: Any) -> ZooCase:
    model = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": channels,
            "block_out_channels": (16, 32, 48, 48),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            "cross_attention_dim": 24,
            **config,
        }
    )
    last = up_block(2, 3)
    return ZooCase(
        name=name,
        model=model,
        args=(torch.randn(2, channels, 16, 16), torch.tensor(981)),
        kwargs={"encoder_hidden_states": torch.randn(2, 7, 24)},
        entry=("down_blocks.0.attentions.1",),
        consumer="down_blocks.0.downsamplers.0",
        exit=last["exit"],
        resolution=(16, 16),
        source="diffusers UNet2DConditionModel, blocks as in Stable Diffusion 1.5",
        note="unet_2d_blocks.py:1269-1289: the last attention's output is a skip and goes into the downsampler (the "
        "attention returns it in a 1-tuple); :2415-2471: up_blocks.2 ends with its upsampler; up_blocks.3 takes the "
        "three top skips. The first downsampler's own output is a skip too, but into up_blocks.2, so inside.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"}
            | {"up_blocks.0", "up_blocks.1", *last["inner"]}
        ),
        outside=frozenset(
            {"conv_in", "time_embedding", "up_blocks.3", "conv_norm_out", "conv_act", "conv_out"}
            | {*children("down_blocks.0.resnets", 2), *children("down_blocks.0.attentions", 2)}
        ),
    )


@case
def sd15() -> ZooCase:
    return _sd15()


@case
def sd21() -> ZooCase:
    return replace(
        _sd15("sd21", attention_head_dim=(1, 2, 4, 4), use_linear_projection=True),
        source="diffusers UNet2DConditionModel, blocks as in Stable Diffusion 2.1",
        note="The region of sd15: other head counts, and linear layers in the place of 1x1 convolutions around the "
        "attention (transformer_2d.py: `use_linear_projection`), so tokens enter and leave it transposed.",
    )


@case
def sd_inpainting() -> ZooCase:
    return replace(
        _sd15("sd_inpainting", channels=9),
        source="diffusers UNet2DConditionModel for inpainting, 9 channels",
        note="The region of sd15: mask and masked image are channels of the sample, concatenated by the pipeline.",
    )


@case
def sd15_controlnet() -> ZooCase:
    plain = _sd15("sd15_controlnet")
    residuals = (
        *(_like(16, 16) for _ in range(3)),
        *(_like(channels, size) for channels, size in ((16, 8), (32, 8), (32, 8), (32, 4), (48, 4), (48, 4))),
        *(_like(48, 2) for _ in range(3)),
    )
    return replace(
        plain,
        kwargs={
            **plain.kwargs,
            "down_block_additional_residuals": residuals,
            "mid_block_additional_residual": _like(48, 2),
            "return_dict": False,
        },
        source="diffusers UNet2DConditionModel with ControlNet residuals",
        note="The region of sd15. unet_2d_condition.py:1162-1165 and :1193: the root's own forward adds the residuals; "
        "those of the three top skips outside the region, the other nine and the mid block's inside of it, as inputs "
        "that do not come from the sample.",
    )


@case
def sd15_t2i_adapter() -> ZooCase:
    plain = _sd15("sd15_t2i_adapter")
    residuals = [_like(16, 16), _like(32, 8), _like(48, 4), _like(48, 2)]
    return replace(
        plain,
        kwargs={**plain.kwargs, "down_intrablock_additional_residuals": residuals},
        entry=(),
        source="diffusers UNet2DConditionModel with T2I-Adapter residuals",
        note="unet_2d_blocks.py:1279-1281: down_blocks.0 itself adds the first residual to its last attention's "
        "output, so no module returns the entry; the sum is the skip, and goes into the downsampler. Those of the "
        "levels below are added inside the region, the last by the root (unet_2d_condition.py:1155, in place). The "
        "root empties the list it is given (:1141): each call needs a new one.",
    )


@case
def sd15_freeu() -> ZooCase:
    plain = _sd15("sd15_freeu")
    plain.model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return replace(
        plain,
        source="diffusers UNet2DConditionModel with FreeU",
        note="The region of sd15. unet_2d_blocks.py:2433-2442: FreeU scales half of the features and filters the "
        "skips by Fourier transform in the first two up blocks, both inside the region.",
    )


@case
def sd15_classes() -> ZooCase:
    plain = _sd15("sd15_classes", class_embed_type="timestep", projection_class_embeddings_input_dim=32)
    return replace(
        plain,
        kwargs={**plain.kwargs, "class_labels": torch.tensor([20.0, 30.0])},
        source="diffusers UNet2DConditionModel with class labels, as in the x4 upscaler",
        note="The region of sd15. unet_2d_condition.py:874-890: the labels, here noise levels, go through the sine and "
        "cosine of `time_proj` as the time does, and are added to its embedding: two inputs of the form (B,) that "
        "feed sines. The time is the one called so.",
        outside=plain.outside | {"class_embedding"},
    )


@case
def sd15_gligen() -> ZooCase:
    plain = _sd15("sd15_gligen", attention_type="gated")
    boxes = {
        "boxes": torch.rand(2, 3, 4),
        "positive_embeddings": torch.randn(2, 3, 24),
        "masks": torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    }
    return replace(
        plain,
        kwargs={**plain.kwargs, "cross_attention_kwargs": {"gligen": boxes}},
        source="diffusers UNet2DConditionModel with GLIGEN boxes",
        note="The region of sd15. unet_2d_condition.py:1111-1114: `position_net` makes tokens of the boxes, a side "
        "input that every `fuser` within the attentions takes (models/attention.py:1022).",
        outside=plain.outside | {"position_net"},
    )


@case
def sd15_checkpointing() -> ZooCase:
    plain = _sd15("sd15_checkpointing")
    plain.model.enable_gradient_checkpointing()
    return replace(
        plain,
        source="diffusers UNet2DConditionModel with gradient checkpointing",
        note="The region of sd15. unet_2d_blocks.py:1258-1266: with gradients the resnets run through "
        "`torch.utils.checkpoint`, and once more in the backward pass, outside of any call of the UNet.",
    )


@case
def sdxl() -> ZooCase:
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    last = up_block(1, 3)
    return ZooCase(
        name="sdxl",
        model=model,
        args=(torch.randn(2, 4, 16, 16), torch.tensor(500.0)),
        kwargs={
            "encoder_hidden_states": torch.randn(2, 7, 24),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(2, 16),
                "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(2, 1),
            },
        },
        entry=("down_blocks.0.resnets.1",),
        consumer="down_blocks.0.downsamplers.0",
        exit=last["exit"],
        resolution=(16, 16),
        source="diffusers UNet2DConditionModel, blocks and conditions as in SDXL",
        note="unet_2d_blocks.py:1355-1367: no attention at the top, so the second resnet feeds the downsampler and is "
        "the last top skip; :2467-2471: up_blocks.1 ends with its upsampler; up_blocks.2 takes the top skips.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | set(last["inner"])
        ),
        outside=frozenset(
            {"conv_in", "time_embedding", "add_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )

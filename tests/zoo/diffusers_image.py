"""The image UNets of diffusers. File and line numbers are those of diffusers 0.42.1, under models/unets/."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from tests.zoo.case import ZooCase, case, children


def _up_block(index: int, resnets: int, *, attention: bool = True, conv: bool = True) -> dict[str, Any]:
    """The exit at the end of an up block, and what of that block lies inside the region."""
    path = f"up_blocks.{index}"
    inner = children(f"{path}.resnets", resnets) + (children(f"{path}.attentions", resnets) if attention else ())
    upsampler = f"{path}.upsamplers.0"
    return {"exit": (path, upsampler, *([f"{upsampler}.conv"] if conv else [])), "inner": inner}


@case
def unet2d() -> ZooCase:
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    last = _up_block(1, 3)
    return ZooCase(
        name="unet2d",
        model=model,
        args=(torch.randn(2, 3, 16, 16), 7),
        entry=("down_blocks.0.resnets.1",),
        consumer="down_blocks.0.downsamplers.0",
        exit=last["exit"],
        resolution=(16, 16),
        source="diffusers UNet2DModel",
        note="unet_2d_blocks.py:1355-1367: the last resnet's output is a skip and goes into the downsampler; "
        "unet_2d.py: up_blocks.2 takes the three top skips (conv_in and both resnets), so up_blocks.1's upsampler, "
        "which up_blocks.1 returns as it is, is the last thing before the first top-resolution cat.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | set(last["inner"])
        ),
        kept=frozenset(
            {"conv_in", "time_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )


def _sd15() -> ZooCase:
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=24,
    )
    last = _up_block(2, 3)
    return ZooCase(
        name="sd15",
        model=model,
        args=(torch.randn(2, 4, 16, 16), torch.tensor(981)),
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
        kept=frozenset(
            {"conv_in", "time_embedding", "up_blocks.3", "conv_norm_out", "conv_act", "conv_out"}
            | {*children("down_blocks.0.resnets", 2), *children("down_blocks.0.attentions", 2)}
        ),
    )


@case
def sd15() -> ZooCase:
    return _sd15()


@case
def sd15_controlnet() -> ZooCase:
    def like(channels: int, size: int) -> Tensor:
        return torch.randn(2, channels, size, size)

    plain = _sd15()
    residuals = (
        *(like(16, 16) for _ in range(3)),
        *(like(channels, size) for channels, size in ((16, 8), (32, 8), (32, 8), (32, 4), (48, 4), (48, 4))),
        *(like(48, 2) for _ in range(3)),
    )
    return replace(
        plain,
        name="sd15_controlnet",
        kwargs={
            **plain.kwargs,
            "down_block_additional_residuals": residuals,
            "mid_block_additional_residual": like(48, 2),
            "return_dict": False,
        },
        source="diffusers UNet2DConditionModel with ControlNet residuals",
        note="The region of sd15. unet_2d_condition.py:1162-1165 and :1193: the root's own forward adds the residuals; "
        "those of the three top skips outside the region, the other nine and the mid block's inside of it, as inputs "
        "that do not come from the sample.",
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
    last = _up_block(1, 3)
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
        kept=frozenset(
            {"conv_in", "time_embedding", "add_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )


@case
def kandinsky22() -> ZooCase:
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        cross_attention_dim=16,
        addition_embed_type="image",
        encoder_hid_dim=20,
        encoder_hid_dim_type="image_proj",
    )
    last = _up_block(1, 3, conv=False)
    return ZooCase(
        name="kandinsky22",
        model=model,
        args=(torch.randn(2, 4, 16, 16), torch.tensor([300, 300])),
        kwargs={"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": torch.randn(2, 20)}},
        entry=("down_blocks.0.resnets.1",),
        consumer="down_blocks.0.downsamplers.0",
        exit=last["exit"],
        resolution=(16, 16),
        source="diffusers UNet2DConditionModel, blocks as in Kandinsky 2.2",
        note="unet_2d_blocks.py:1829-1841: the downsampler is a resnet, which uses the entry twice (models/resnet.py:"
        "325-338, norm1 and the pooled residual), so two entry edges from one tensor; :3241-3245: the upsampler of "
        "up_blocks.1 is a resnet too, its sum (models/resnet.py:375) is returned as it is.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | set(last["inner"])
        ),
        kept=frozenset(
            {"conv_in", "time_embedding", "add_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )

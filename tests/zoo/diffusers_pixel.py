"""diffusers' UNets of Kandinsky and DeepFloyd. Files and lines are those of diffusers 0.42.1, under models/unets/."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import Kandinsky3UNet, UNet2DConditionModel

from tests.zoo.case import ZooCase, case, children
from tests.zoo.diffusers_image import up_block


def _simple(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        **{"cross_attention_dim": 16, **config},
    )


def _kandinsky22(model: UNet2DConditionModel) -> ZooCase:
    last = up_block(1, 3, conv=False)
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
        outside=frozenset(
            {"conv_in", "time_embedding", "add_embedding", *children("down_blocks.0.resnets", 2), "up_blocks.2"}
            | {"conv_norm_out", "conv_act", "conv_out"}
        ),
    )


@case
def kandinsky22() -> ZooCase:
    embedding = {"addition_embed_type": "image", "encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"}
    return _kandinsky22(_simple(in_channels=4, out_channels=8, **embedding))


@case
def deepfloyd_if() -> ZooCase:
    model = _simple(
        in_channels=3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=20,
        cross_attention_norm="group_norm",  # of 32 groups
        cross_attention_dim=32,
        act_fn="gelu",
    )
    plain = _kandinsky22(model)
    return replace(
        plain,
        name="deepfloyd_if",
        args=(torch.randn(2, 3, 16, 16), torch.tensor(300)),
        kwargs={"encoder_hidden_states": torch.randn(2, 7, 20)},
        source="diffusers UNet2DConditionModel, blocks as in DeepFloyd IF",
        note="The blocks, and so the region, of kandinsky22; the text is pooled into the time embedding by "
        "`add_embedding` (unet_2d_condition.py:895) and goes into the attentions as `encoder_hid_proj` of it (:945).",
    )


@case
def kandinsky3() -> ZooCase:
    model = Kandinsky3UNet(
        time_embedding_dim=32,
        attention_head_dim=16,
        layers_per_block=2,
        block_out_channels=(64, 64, 64, 64),
        cross_attention_dim=24,
        encoder_hid_dim=20,
    )
    return ZooCase(
        name="kandinsky3",
        model=model,
        args=(torch.randn(2, 4, 16, 16), torch.tensor(300)),
        kwargs={"encoder_hidden_states": torch.randn(2, 7, 20), "encoder_attention_mask": torch.ones(2, 7)},
        entry=("down_blocks.0", "down_blocks.0.resnets_out.1"),
        consumer="down_blocks.1",
        exit=("up_blocks.2", "up_blocks.2.attentions.0"),
        resolution=(8, 8),
        source="diffusers Kandinsky3UNet",
        note="unet_kandinsky3.py:191-199: the skip is what a down block returns, so already halved, and up_blocks.3 "
        "takes it before its first resnet enlarges (:227): nothing goes round at full size, and the region is one "
        "level lower. :341-346: a down block returns its last resnet's sum; :276-278: up_blocks.2 ends with its "
        "self-attention.",
        skipped=frozenset({"down_blocks.1", "down_blocks.2", "down_blocks.3", "up_blocks.0", "up_blocks.1"}),
        outside=frozenset(
            {"conv_in", "time_embedding", "encoder_hid_proj", "add_time_condition", "down_blocks.0", "up_blocks.3"}
            | {"conv_norm_out", "conv_act_out", "conv_out"}
        ),
    )

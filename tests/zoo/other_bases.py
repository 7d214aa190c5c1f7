"""UNets of MONAI 1.6.1, a-unet 0.0.16 and x-unet 0.5.0."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.zoo.case import ZooCase, case, children


@case
def monai3d() -> ZooCase:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(1, 1, 1),
        channels=(8, 16, 16),
        attention_levels=(False, False, True),
        norm_num_groups=8,
        num_head_channels=8,
    )
    upsampler = "up_blocks.1.upsampler"
    return ZooCase(
        name="monai3d",
        model=model,
        args=(torch.randn(1, 1, 8, 12, 16),),
        kwargs={"timesteps": torch.tensor([250])},
        entry=("down_blocks.0.resnets.0",),
        consumer="down_blocks.0.downsampler",
        exit=("up_blocks.1", upsampler, f"{upsampler}.postconv", f"{upsampler}.postconv.conv"),
        resolution=(8, 12, 16),
        source="MONAI DiffusionModelUNet, 3D",
        note="diffusion_model_unet.py:522-533: the resnet's output is a skip and goes into the downsampler; "
        ":1030 ends UpBlock with `hidden_states = self.upsampler(hidden_states, temb)`, a Sequential of nn.Upsample "
        "and `postconv`, itself a Sequential of one convolution: four modules return the exit.",
        skipped=frozenset(
            {"down_blocks.0.downsampler", "down_blocks.1", "down_blocks.2", "middle_block", "up_blocks.0"}
            | {*children("up_blocks.1.resnets", 2), f"{upsampler}.upsample_non_trainable"}
        ),
        outside=frozenset({"conv_in", "time_embed", "down_blocks.0.resnets.0", "up_blocks.2", "out"}),
    )


@case
def monai2d() -> ZooCase:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=(1, 1, 1),
        channels=(8, 16, 16),
        attention_levels=(False, True, True),
        norm_num_groups=8,
        num_head_channels=8,
        with_conditioning=True,
        cross_attention_dim=12,
        resblock_updown=True,
    )
    return ZooCase(
        name="monai2d",
        model=model,
        args=(torch.randn(2, 3, 16, 16),),
        kwargs={"timesteps": torch.tensor([250, 250]), "context": torch.randn(2, 5, 12)},
        entry=("down_blocks.0.resnets.0",),
        consumer="down_blocks.0.downsampler",
        exit=("up_blocks.1", "up_blocks.1.upsampler"),
        resolution=(16, 16),
        source="MONAI DiffusionModelUNet, 2D with text",
        note="diffusion_model_unet.py:522-533: no attention at the top, so the resnet's output is a skip and goes into "
        "the downsampler, here a resnet (`resblock_updown`); up_blocks.1 (CrossAttnUpBlock) ends with its upsampler, "
        "a resnet too.",
        skipped=frozenset(
            {"down_blocks.0.downsampler", "down_blocks.1", "down_blocks.2", "middle_block", "up_blocks.0"}
            | {*children("up_blocks.1.resnets", 2), *children("up_blocks.1.attentions", 2)}
        ),
        outside=frozenset({"conv_in", "time_embed", "down_blocks.0.resnets.0", "up_blocks.2", "out"}),
    )


@case
def monai_unet() -> ZooCase:
    from monai.networks.nets import UNet

    below = "model.1.submodule"
    model = UNet(2, 3, 3, channels=(16, 32, 32), strides=(2, 2), num_res_units=1)
    last = f"{below}.2.1"
    return ZooCase(
        name="monai_unet",
        model=model,
        args=(torch.randn(2, 3, 16, 16),),
        entry=("model.0",),
        consumer="model.1",
        exit=(below, f"{below}.2", last),
        resolution=(8, 8),
        source="MONAI UNet",
        note="unet.py:196: `Sequential(down, SkipConnection(subblock), up)`, nested. The first unit has stride 2, so "
        "nothing goes round at full size; the SkipConnection at half the size concatenates its input with what its "
        "submodule makes of it (networks/layers/simplelayers.py), a Sequential that halves, nests and enlarges again. "
        "The sum of a residual unit is returned by it alone. There is no time input.",
        skipped=frozenset({f"{below}.0", f"{below}.1", f"{below}.2.0"}),
        outside=frozenset({"model.0", "model.2"}),
    )


def _a_unet(dim: int, blocks: list[Any], **options: Any) -> nn.Module:
    from a_unet import TimeConditioningPlugin
    from a_unet.apex import XUNet

    net: nn.Module = TimeConditioningPlugin(XUNet)(dim=dim, blocks=blocks, resnet_groups=8, **options)
    return net


@case
def a_unet1d() -> ZooCase:
    from a_unet.apex import ModulationItem, ResnetItem, SkipModulate, XBlock

    items = (ResnetItem, ModulationItem)
    sizes = ((16, 1), (32, 4), (32, 2))
    blocks = [XBlock(channels=channels, factor=factor, items=items) for channels, factor in sizes]
    top = "blocks.2.net.block.blocks"  # down, resnet, modulation, the inner block, resnet, modulation, up
    inner = f"{top}.3"
    last = f"{inner}.block.blocks.6"
    return ZooCase(
        name="a_unet1d",
        model=_a_unet(1, blocks, in_channels=2, skip_t=SkipModulate, modulation_features=32),
        args=(torch.randn(2, 2, 64),),
        kwargs={"time": torch.tensor([0.2, 0.9])},
        entry=(f"{top}.2", f"{inner}.skip_adapter", f"{inner}.skip_adapter.block"),
        consumer=f"{inner}.block",
        exit=(f"{inner}.block", last, f"{last}.block", f"{last}.block.1"),
        resolution=(64,),
        source="a-unet XUNet with time conditioning, 1D",
        note="a_unet/apex.py:381-383: `skip = self.skip_adapter(x)`, `x = self.block(x, ...)`, "
        "`x = self.skip(skip, x)`: blocks nest, and the top one (factor 1) has the inner one in its middle. The tensor "
        "that the top block's modulation returns goes into the inner block, whose skip adapter (an Identity here, so "
        "it returns the same tensor) carries it round the inner `block`, a Sequential from downsampling to upsampling. "
        "The merge with the skip is the inner block's last module and outside of the region.",
        skipped=frozenset(f"{inner}.block.blocks.{index}" for index in range(6)),
        outside=frozenset(
            {"blocks.0", "blocks.1", "blocks.2.net.skip_adapter", "blocks.2.net.skip", f"{inner}.skip_adapter"}
            | {f"{inner}.skip", *(f"{top}.{index}" for index in (0, 1, 2, 4, 5, 6))}
        ),
    )


@case
def a_unet2d() -> ZooCase:
    from a_unet.apex import CrossAttentionItem, ModulationItem, ResnetItem, SkipCat, XBlock

    items = (ResnetItem, ModulationItem)
    blocks = [
        XBlock(channels=16, factor=1, items=items),
        XBlock(channels=16, factor=2, items=(*items, CrossAttentionItem)),
        XBlock(channels=32, factor=2, items=(*items, CrossAttentionItem)),
    ]
    attention = {"attention_features": 8, "attention_heads": 2, "embedding_features": 12}
    model = _a_unet(2, blocks, in_channels=3, skip_t=SkipCat, modulation_features=16, **attention)
    plain = a_unet1d()
    inner = "blocks.2.net.block.blocks.3"
    last = f"{inner}.block.blocks.8"  # down, three items, the block below, three items, up
    return replace(
        plain,
        name="a_unet2d",
        model=model,
        args=(torch.randn(2, 3, 16, 16),),
        kwargs={"time": torch.tensor([0.2, 0.9]), "embedding": torch.randn(2, 5, 12)},
        exit=(f"{inner}.block", last, f"{last}.block", f"{last}.block.1"),
        resolution=(16, 16),
        source="a-unet XUNet with time conditioning, 2D with text",
        note="The region of a_unet1d; apex.py:182-205: cross-attention packs the pixels into tokens. Its plugins for "
        "text bring a T5; the text embedding is an argument of the UNet itself.",
        skipped=frozenset(f"{inner}.block.blocks.{index}" for index in range(8)),
    )


def _x_unet(**options: Any) -> nn.Module:
    from x_unet.x_unet import XUnet

    small = {"dim": 8, "dim_mults": (1, 2, 2), "num_blocks_per_stage": (1, 1, 1), "num_self_attn_per_stage": (0, 0, 1)}
    heads = {"attn_heads": 2, "attn_dim_head": 8}
    net: nn.Module = XUnet(**small, **heads, nested_unet_depths=(2, 1, 0), nested_unet_dim=8, channels=3, **options)
    return net


@case
def x_unet() -> ZooCase:
    return ZooCase(
        name="x_unet",
        model=_x_unet(),
        args=(torch.randn(2, 3, 16, 16),),
        entry=("init_conv", "downs.0.0.res_conv"),
        consumer="downs.0.0",
        exit=("consolidator",),
        resolution=(1, 16, 16),
        source="x-unet XUnet, feature maps of all levels consolidated",
        note="x_unet.py:711-773: the up levels are one fewer than the down levels, so the skip of the highest is never "
        "taken; all up levels' feature maps are enlarged and concatenated (`consolidator`), and what goes round is the "
        "first convolution's output, `r`, alone. So the region takes in the blocks at full size as well. These have "
        "nested UNets of their own, small ones beside the main path. Images become videos of one frame.",
        skipped=frozenset(
            {"downs.0.0", "downs.0.3", "downs.1.0", "downs.1.3", "downs.2.0", "downs.2.2.0", "downs.2.3", "mid"}
            | {"mid_attn", "mid_after", "mid_upsample", "ups.0.0", "ups.0.3", "ups.1.0", "ups.1.3"}
            | {f"consolidator.fmap_convs.{level}" for level in range(3)}
        ),
        outside=frozenset({"init_conv", "final_conv"}),
    )


@case
def x_unet_plain() -> ZooCase:
    consolidated = x_unet()
    return replace(
        consolidated,
        name="x_unet_plain",
        model=_x_unet(consolidate_upsample_fmaps=False),
        exit=("consolidator", "ups.1.3"),
        source="x-unet XUnet",
        note="As x_unet, but `consolidator` returns what it is given, so ups.1.3, the last upsampling, is the exit. "
        "The interpolations of the other feature maps still run (:299-300), for nothing.",
        skipped=frozenset(path for path in consolidated.skipped if not path.startswith(("consolidator", "ups.1.3"))),
    )

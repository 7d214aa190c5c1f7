"""UNets of other code bases, at the versions that requirements-zoo.txt pins."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from tests.zoo.case import ZooCase, case, children


@contextlib.contextmanager
def torchvision_or_stand_in() -> Iterator[None]:
    """Let a package import that names torchvision for its trainer and never needs it for its model.

    Only while that import runs: diffusers, transformers and MONAI ask later whether torchvision is there.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stand_in = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")}
    for name, module in stand_in.items():
        module.__spec__ = ModuleSpec(name, None)
        if "." in name:
            setattr(stand_in["torchvision"], name.partition(".")[2], module)
    sys.modules.update(stand_in)
    try:
        yield
    finally:
        for name in stand_in:
            del sys.modules[name]


@case
def ddpm_pytorch() -> ZooCase:
    with torchvision_or_stand_in():
        from denoising_diffusion_pytorch import Unet

    model = Unet(dim=16, dim_mults=(1, 2, 4), channels=3, attn_heads=2, attn_dim_head=8)
    return ZooCase(
        name="ddpm_pytorch",
        model=model,
        args=(torch.randn(2, 3, 16, 16), torch.tensor([5, 800])),
        entry=(),
        consumer="downs.0.3",
        exit=("ups.1.3", "ups.1.3.1"),
        resolution=(16, 16),
        source="denoising-diffusion-pytorch Unet",
        note="denoising_diffusion_pytorch.py:411-414 (2.3.4): `x = attn(x) + x; h.append(x); x = downsample(x)`: the "
        "entry is a sum that the root computes, no module returns it. The downsampler is pixel-unshuffle and a 1x1 "
        "convolution. ups.1 is the middle of three: `x = upsample(x)` (nn.Upsample and a convolution) gives the top "
        "resolution, the next statement is ups.2's `torch.cat((x, h.pop()))`. The last down and up have a plain "
        "convolution in the place of the resampling.",
        skipped=frozenset(
            {"downs.0.3", *(path for index in (1, 2) for path in children(f"downs.{index}", 4))}
            | {"mid_block1", "mid_attn", "mid_block2", *children("ups.0", 4), *children("ups.1", 3)}
        ),
        kept=frozenset(
            {"init_conv", "time_mlp", *children("downs.0", 3), *children("ups.2", 4), "final_res_block", "final_conv"}
        ),
    )


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
        note="diffusion_model_unet.py:522-533 (1.6.1): the resnet's output is a skip and goes into the downsampler; "
        ":1030 ends UpBlock with `hidden_states = self.upsampler(hidden_states, temb)`, a Sequential of nn.Upsample "
        "and `postconv`, itself a Sequential of one convolution: four modules return the exit.",
        skipped=frozenset(
            {"down_blocks.0.downsampler", "down_blocks.1", "down_blocks.2", "middle_block", "up_blocks.0"}
            | {*children("up_blocks.1.resnets", 2), f"{upsampler}.upsample_non_trainable"}
        ),
        kept=frozenset({"conv_in", "time_embed", "down_blocks.0.resnets.0", "up_blocks.2", "out"}),
    )


@case
def a_unet1d() -> ZooCase:
    from a_unet import TimeConditioningPlugin
    from a_unet.apex import ModulationItem, ResnetItem, SkipModulate, XBlock, XUNet

    items = (ResnetItem, ModulationItem)
    model = TimeConditioningPlugin(XUNet)(
        dim=1,
        in_channels=2,
        blocks=[
            XBlock(channels=16, factor=1, items=items),
            XBlock(channels=32, factor=4, items=items),
            XBlock(channels=32, factor=2, items=items),
        ],
        skip_t=SkipModulate,
        resnet_groups=8,
        modulation_features=32,
    )
    top = "blocks.2.net.block.blocks"  # down, resnet, modulation, the inner block, resnet, modulation, up
    inner = f"{top}.3"
    last = f"{inner}.block.blocks.6"
    return ZooCase(
        name="a_unet1d",
        model=model,
        args=(torch.randn(2, 2, 64),),
        kwargs={"time": torch.tensor([0.2, 0.9])},
        entry=(f"{top}.2", f"{inner}.skip_adapter", f"{inner}.skip_adapter.block"),
        consumer=f"{inner}.block",
        exit=(f"{inner}.block", last, f"{last}.block", f"{last}.block.1"),
        resolution=(64,),
        source="a-unet XUNet with time conditioning, 1D",
        note="a_unet/apex.py:381-383 (0.0.16): `skip = self.skip_adapter(x)`, `x = self.block(x, ...)`, "
        "`x = self.skip(skip, x)`: blocks nest, and the top one (factor 1) has the inner one in its middle. The tensor "
        "that the top block's modulation returns goes into the inner block, whose skip adapter (an Identity here, so "
        "it returns the same tensor) carries it round the inner `block`, a Sequential from downsampling to upsampling. "
        "The merge with the skip is the inner block's last module and outside of the region.",
        skipped=frozenset(f"{inner}.block.blocks.{index}" for index in range(6)),
        kept=frozenset(
            {"blocks.0", "blocks.1", "blocks.2.net.skip_adapter", "blocks.2.net.skip", f"{inner}.skip_adapter"}
            | {f"{inner}.skip", *(f"{top}.{index}" for index in (0, 1, 2, 4, 5, 6))}
        ),
    )

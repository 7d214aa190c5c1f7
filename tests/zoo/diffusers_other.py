"""diffusers' 1D UNets, Stable Cascade and UViT. Files and lines are those of diffusers 0.42.1, under models/unets/."""

from typing import Any

import torch
from diffusers import StableCascadeUNet, UNet1DModel, UVit2DModel

from tests.zoo.case import RefusedCase, ZooCase, case, children, refused


@case
def unet1d() -> ZooCase:
    model = UNet1DModel(
        sample_size=64,
        in_channels=2,
        out_channels=2,
        time_embedding_dim=16,
        extra_in_channels=16,
        time_embedding_type="fourier",
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return ZooCase(
        name="unet1d",
        model=model,
        args=(torch.randn(2, 2, 64), torch.tensor([0.3, 0.7])),
        entry=("down_blocks.0.resnets.2",),
        consumer="down_blocks.1.down",
        exit=("up_blocks.1", "up_blocks.1.up"),
        resolution=(64,),
        source="diffusers UNet1DModel, blocks as in Dance Diffusion",
        note="unet_1d_blocks.py:501-519: the first block keeps the resolution and returns its third resnet's output "
        "twice, as hidden state and as skip; :490-498: the next block begins with its downsampling; :575-588: "
        "up_blocks.1 ends with its upsampling (a functional transposed convolution inside the module `up`); "
        ":606-616: up_blocks.2 begins with the cat of the top skip.",
        skipped=frozenset(
            {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", *children("up_blocks.1.resnets", 3)}
        ),
        outside=frozenset({"time_proj", "down_blocks.0", "up_blocks.2"}),
    )


def _policy(**config: Any) -> UNet1DModel:
    return UNet1DModel(
        **{
            "in_channels": 6,
            "out_channels": 6,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "block_out_channels": (16, 32, 64),
            "down_block_types": ("DownResnetBlock1D",) * 3,
            "up_block_types": ("UpResnetBlock1D",) * 2,
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "act_fn": "mish",
            **config,
        }
    )


@case
def unet1d_policy() -> ZooCase:
    return ZooCase(
        name="unet1d_policy",
        model=_policy(),
        args=(torch.randn(2, 6, 32), torch.tensor([5, 5])),
        entry=("down_blocks.1.resnets.1",),
        consumer="down_blocks.1.downsample",
        exit=("up_blocks.0", "up_blocks.0.upsample", "up_blocks.0.upsample.conv"),
        resolution=(16,),
        source="diffusers UNet1DModel, blocks as in Diffuser's planning policy",
        note="unet_1d.py:252-256: each of the two up blocks takes the last skip left, so those of down_blocks.2 and "
        ".1; the one of down_blocks.0, at full size, is never used, and the region is one level lower. "
        "unet_1d_blocks.py:68-84: the skip is the last resnet's output, which goes into the downsampler; :125-148: "
        "up_blocks.0 takes down_blocks.2's skip and ends with its upsampler; up_blocks.1 begins with the cat.",
        skipped=frozenset(
            {"down_blocks.1.downsample", "down_blocks.2", "mid_block", *children("up_blocks.0.resnets", 2)}
        ),
        outside=frozenset(
            {"time_proj", "time_mlp", "down_blocks.0", *children("down_blocks.1.resnets", 2), "up_blocks.1"}
            | {"out_block"}
        ),
    )


@refused
def unet1d_value() -> RefusedCase:
    model = _policy(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownResnetBlock1D",) * 4,
        up_block_types=(),
        mid_block_type="ValueFunctionMidBlock1D",
        out_block_type="ValueFunction",
        downsample_each_block=True,
    )
    return RefusedCase(
        name="unet1d_value",
        model=model,
        args=(torch.randn(2, 6, 64), torch.tensor([5, 5])),
        source="diffusers UNet1DModel, blocks as in Diffuser's value function",
        note="unet_1d_blocks.py:242-262: the output is one number a sample; there are down blocks and no up block.",
        says=("nothing leads back up to 64",),
    )


@case
def cascade_b() -> ZooCase:
    layers = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    model = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        patch_size=2,
        conditioning_dim=24,
        block_out_channels=(16, 32, 32, 32),
        num_attention_heads=(-1, -1, 4, 4),
        down_num_layers_per_block=(1, 1, 2, 1),
        up_num_layers_per_block=(1, 2, 1, 1),
        down_blocks_repeat_mappers=(1, 1, 1, 1),
        up_blocks_repeat_mappers=(2, 2, 1, 1),
        block_types_per_layer=(layers, layers, (*layers, "SDCascadeAttnBlock"), (*layers, "SDCascadeAttnBlock")),
        clip_text_pooled_in_channels=20,
        clip_seq=2,
        effnet_in_channels=6,
        pixel_mapper_in_channels=3,
        dropout=(0.1, 0.1, 0.1, 0.1),
        timestep_conditioning_type=("sca",),
    )
    return ZooCase(
        name="cascade_b",
        model=model,
        args=(torch.randn(2, 4, 32, 32), torch.tensor([0.3, 0.3]), torch.randn(2, 1, 20)),
        kwargs={"effnet": torch.randn(2, 6, 4, 4)},
        entry=("down_blocks.0.1",),
        consumer="down_downscalers.1",
        exit=("up_upscalers.2", "up_upscalers.2.1"),
        resolution=(16, 16),
        source="diffusers StableCascadeUNet, as in stage B",
        note="unet_stable_cascade.py:594-603: `embedding` folds 2x2 pixels into channels, so the highest level is half "
        "of the sample's; conditions are added to it before any skip. :471-485: what the blocks of a level give is its "
        "skip, and goes into the next level's downscaler. :515-535: a level's blocks run once more after each repeat "
        "mapper, so the same modules are called twice; `x = upscaler(x)` ends a level, and up_blocks.3.0 takes the "
        "top skip.",
        skipped=frozenset(
            {f"down_downscalers.{level}" for level in (1, 2, 3)}
            | {*children("down_blocks.1", 2), *children("down_blocks.2", 6), *children("down_blocks.3", 3)}
            | {*children("up_blocks.0", 3), *children("up_blocks.1", 6), *children("up_blocks.2", 2)}
            | {"up_repeat_mappers.0.0", "up_repeat_mappers.1.0", *children("up_upscalers", 2), "up_upscalers.2.0"}
        ),
        outside=frozenset(
            {"embedding", "effnet_mapper", "pixels_mapper", *children("down_blocks.0", 2)}
            | {*children("up_blocks.3", 2), "clf"}
        ),
    )


@refused
def cascade_c() -> RefusedCase:
    model = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=24,
        block_out_channels=(32, 32),
        num_attention_heads=(4, 4),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_in_channels=20,
        clip_text_pooled_in_channels=20,
        clip_image_in_channels=12,
        clip_seq=2,
        switch_level=(False,),
    )
    return RefusedCase(
        name="cascade_c",
        model=model,
        args=(torch.randn(2, 4, 12, 12), torch.tensor([0.3, 0.3]), torch.randn(2, 1, 20)),
        kwargs={"clip_text": torch.randn(2, 7, 20), "clip_img": torch.randn(2, 1, 12)},
        source="diffusers StableCascadeUNet, as in stage C",
        note="unet_stable_cascade.py:112-128: with `switch_level=(False,)` both resamplings are an Identity and a 1x1 "
        "convolution: a UNet with skips, all at one resolution.",
        says=("no resolution change: every layer works at 12×12", "entry='blocks.4', exit='blocks.20'"),
    )


def _uvit(resample: bool) -> dict[str, Any]:
    model = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=12,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=20,
        vocab_size=40,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=resample,
        upsample=resample,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    conditions = {"pooled_text_emb": torch.randn(2, 12), "micro_conds": torch.randn(2, 5)}
    return {
        "model": model,
        "args": (torch.randint(0, 32, (2, 16, 16)),),
        "kwargs": {"encoder_hidden_states": torch.randn(2, 7, 20), **conditions},
    }


@refused
def uvit256() -> RefusedCase:
    return RefusedCase(
        name="uvit256",
        **_uvit(resample=False),
        source="diffusers UVit2DModel, as in aMUSEd 256",
        note="uvit_2d.py:86-98: without `downsample` and `upsample` the blocks and the transformer layers between them "
        "work on as many tokens as the image has.",
        says=("no resolution change: every layer works at 16×16",),
    )


@refused
def uvit512() -> RefusedCase:
    return RefusedCase(
        name="uvit512",
        **_uvit(resample=True),
        source="diffusers UVit2DModel, as in aMUSEd 512",
        note="uvit_2d.py:184-227: down_block halves, the transformer and up_block follow, no skip goes round them: "
        "up_block's output decides the whole output.",
        says=("nothing of 16×16 goes round the low resolutions: all passes up_block",),
    )

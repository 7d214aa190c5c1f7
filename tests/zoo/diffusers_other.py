"""The 1D and video UNets of diffusers. File and line numbers are those of diffusers 0.42.1, under models/unets/."""

import torch
from diffusers import UNet1DModel, UNet3DConditionModel, UNetSpatioTemporalConditionModel

from tests.zoo.case import ZooCase, case, children


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
        kept=frozenset({"time_proj", "down_blocks.0", "up_blocks.2"}),
    )


@case
def unet3d() -> ZooCase:
    model = UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    lists = ("resnets", "temp_convs", "attentions", "temp_attentions")
    return ZooCase(
        name="unet3d",
        model=model,
        args=(torch.randn(1, 4, 3, 16, 16), 40),
        kwargs={"encoder_hidden_states": torch.randn(1, 7, 24)},
        entry=("down_blocks.0.temp_attentions.0",),
        consumer="down_blocks.0.downsamplers.0",
        exit=("up_blocks.1", "up_blocks.1.upsamplers.0", "up_blocks.1.upsamplers.0.conv"),
        resolution=(16, 16),
        source="diffusers UNet3DConditionModel (text to video)",
        note="unet_3d_blocks.py:513-537: a layer is resnet, temporal convolution, attention, temporal attention; the "
        "last one's output (in a 1-tuple) is a skip and goes into the downsampler; :781-785: up_blocks.1 ends with "
        "its upsampler. Frames are folded into the batch (unet_3d_condition.py:575), so they are no resolution.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | {path for name in lists for path in children(f"up_blocks.1.{name}", 2)}
        ),
        kept=frozenset(
            {"conv_in", "transformer_in", "time_embedding", "up_blocks.2", "conv_norm_out", "conv_act", "conv_out"}
            | {f"down_blocks.0.{name}.0" for name in lists}
        ),
    )


@case
def svd() -> ZooCase:
    model = UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        down_block_types=(
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        cross_attention_dim=24,
        num_attention_heads=(2, 2, 2),
    )
    return ZooCase(
        name="svd",
        model=model,
        args=(torch.randn(1, 3, 8, 16, 16), torch.tensor(1.2)),
        kwargs={"encoder_hidden_states": torch.randn(1, 1, 24), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]])},
        entry=("down_blocks.0.attentions.0",),
        consumer="down_blocks.0.downsamplers.0",
        exit=("up_blocks.1", "up_blocks.1.upsamplers.0", "up_blocks.1.upsamplers.0.conv"),
        resolution=(16, 16),
        source="diffusers UNetSpatioTemporalConditionModel, as in Stable Video Diffusion",
        note="unet_3d_blocks.py:1240-1254: the last attention's output (in a 1-tuple) is a skip and goes into the "
        "downsampler; :1415-1419: up_blocks.1 ends with its upsampler; up_blocks.2 takes the top skips. The sample is "
        "(batch, frames, channels, height, width); frames are folded into the batch.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | {*children("up_blocks.1.resnets", 2), *children("up_blocks.1.attentions", 2)}
        ),
        kept=frozenset(
            {"conv_in", "time_embedding", "add_embedding", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"}
            | {"up_blocks.2", "conv_norm_out", "conv_act", "conv_out"}
        ),
    )

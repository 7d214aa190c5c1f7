"""The video UNets of diffusers. Files and lines are those of diffusers 0.42.1, under models/unets/."""

import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel

from tests.zoo.case import ZooCase, case, children


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
        outside=frozenset(
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
        outside=frozenset(
            {"conv_in", "time_embedding", "add_embedding", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"}
            | {"up_blocks.2", "conv_norm_out", "conv_act", "conv_out"}
        ),
    )


@case
def motion() -> ZooCase:
    model = UNetMotionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=24,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=True,
    )
    lists = ("resnets", "attentions", "motion_modules")
    return ZooCase(
        name="motion",
        model=model,
        args=(torch.randn(1, 4, 3, 16, 16), torch.tensor(40)),
        kwargs={"encoder_hidden_states": torch.randn(3, 7, 24)},
        entry=("down_blocks.0.motion_modules.0",),
        consumer="down_blocks.0.downsamplers.0",
        exit=("up_blocks.1", "up_blocks.1.upsamplers.0", "up_blocks.1.upsamplers.0.conv"),
        resolution=(16, 16),
        source="diffusers UNetMotionModel, as in AnimateDiff",
        note="unet_motion_model.py:494-522: a layer is resnet, attention, motion module; the last one's output is a "
        "skip and goes into the downsampler; :712-714: up_blocks.1 ends with its upsampler. Frames are folded into the "
        "batch (:2012), the text is repeated for each.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | {path for name in lists for path in children(f"up_blocks.1.{name}", 2)}
        ),
        outside=frozenset(
            {"conv_in", "time_embedding", "up_blocks.2", "conv_norm_out", "conv_act", "conv_out"}
            | {f"down_blocks.0.{name}.0" for name in lists}
        ),
    )


@case
def i2vgen_xl() -> ZooCase:
    model = I2VGenXLUNet(
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
        name="i2vgen_xl",
        model=model,
        args=(torch.randn(1, 4, 3, 16, 16), torch.tensor(40)),
        kwargs={
            "fps": torch.tensor([8]),
            "image_latents": torch.randn(1, 4, 3, 16, 16),
            "image_embeddings": torch.randn(1, 24),
            "encoder_hidden_states": torch.randn(1, 7, 24),
        },
        entry=("down_blocks.0.temp_attentions.0",),
        consumer="down_blocks.0.downsamplers.0",
        exit=("up_blocks.1", "up_blocks.1.upsamplers.0", "up_blocks.1.upsamplers.0.conv"),
        resolution=(16, 16),
        source="diffusers I2VGenXLUNet",
        note="The blocks of unet3d. unet_i2vgen_xl.py:522-523: the frame rate goes through the sine and cosine of the "
        "time; :529-574: the image, first among the conditions, is encoded at full size and concatenated with the "
        "sample before `conv_in`: levels of its own that are not the sample's.",
        skipped=frozenset(
            {"down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
            | {path for name in lists for path in children(f"up_blocks.1.{name}", 2)}
        ),
        outside=frozenset(
            {"conv_in", "transformer_in", "time_embedding", "fps_embedding", "image_latents_proj_in"}
            | {"image_latents_temporal_encoder", "image_latents_context_embedding", "context_embedding"}
            | {f"down_blocks.0.{name}.0" for name in lists}
            | {"up_blocks.2", "conv_norm_out", "conv_act", "conv_out"}
        ),
    )

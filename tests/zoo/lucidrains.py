"""The UNets of denoising-diffusion-pytorch. Files and lines are those of 2.3.4."""

from dataclasses import replace
from typing import Any

import torch

from tests.zoo.case import RefusedCase, ZooCase, case, children, refused
from tests.zoo.third_party import trainers

with trainers():
    from denoising_diffusion_pytorch import KarrasUnet, Unet, Unet1D
    from denoising_diffusion_pytorch.classifier_free_guidance import Unet as GuidedUnet
    from denoising_diffusion_pytorch.karras_unet_3d import KarrasUnet3D
    from denoising_diffusion_pytorch.simple_diffusion import UViT

_SMALL: dict[str, Any] = {"dim": 16, "dim_mults": (1, 2, 4), "channels": 3, "attn_heads": 2, "attn_dim_head": 8}
_TIME = (5, 800)


def _ddpm(**config: Any) -> ZooCase:
    return ZooCase(
        name="ddpm_pytorch",
        model=Unet(**_SMALL, **config),
        args=(torch.randn(2, 3, 16, 16), torch.tensor(_TIME)),
        entry=(),
        consumer="downs.0.3",
        exit=("ups.1.3", "ups.1.3.1"),
        resolution=(16, 16),
        source="denoising-diffusion-pytorch Unet",
        note="denoising_diffusion_pytorch.py:411-414: `x = attn(x) + x; h.append(x); x = downsample(x)`: the "
        "entry is a sum that the root computes, no module returns it. The downsampler is pixel-unshuffle and a 1x1 "
        "convolution. ups.1 is the middle of three: `x = upsample(x)` (nn.Upsample and a convolution) gives the top "
        "resolution, the next statement is ups.2's `torch.cat((x, h.pop()))`. The last down and up have a plain "
        "convolution in the place of the resampling.",
        skipped=frozenset(
            {"downs.0.3", *(path for index in (1, 2) for path in children(f"downs.{index}", 4))}
            | {"mid_block1", "mid_attn", "mid_block2", *children("ups.0", 4), *children("ups.1", 3)}
        ),
        outside=frozenset(
            {"init_conv", "time_mlp", *children("downs.0", 3), *children("ups.2", 4), "final_res_block", "final_conv"}
        ),
    )


@case
def ddpm_pytorch() -> ZooCase:
    return _ddpm()


@case
def ddpm_self_conditioned() -> ZooCase:
    return replace(
        _ddpm(self_condition=True),
        name="ddpm_self_conditioned",
        kwargs={"x_self_cond": torch.randn(2, 3, 16, 16)},
        source="denoising-diffusion-pytorch Unet, self-conditioned",
        note="The region of ddpm_pytorch. denoising_diffusion_pytorch.py:395-397: the last estimate is concatenated "
        "*before* the sample: two maps of the sample's shape, of which `x` is the first argument.",
    )


@case
def ddpm_1d() -> ZooCase:
    return replace(
        _ddpm(),
        name="ddpm_1d",
        model=Unet1D(**_SMALL),
        args=(torch.randn(2, 3, 32), torch.tensor(_TIME)),
        entry=("downs.0.2",),
        resolution=(32,),
        source="denoising-diffusion-pytorch Unet1D",
        note="denoising_diffusion_pytorch_1d.py:361-371: here the attention adds its input itself (`Residual`), so "
        "downs.0.2 returns the entry; the resamplings are strided and nn.Upsample.",
    )


@case
def ddpm_guided() -> ZooCase:
    return replace(
        _ddpm(),
        name="ddpm_guided",
        model=GuidedUnet(**_SMALL, num_classes=5, cond_drop_prob=0.0),
        args=(torch.randn(2, 3, 16, 16), torch.tensor(_TIME), torch.tensor([1, 4])),
        entry=("downs.0.2",),
        source="denoising-diffusion-pytorch Unet with classifier-free guidance",
        note="classifier_free_guidance.py:445-456: as ddpm_1d. Time and classes are both (B,) integers, the class "
        "embedding is one more side input of every block; the time is the one that feeds a sine.",
        outside=_ddpm().outside | {"classes_emb", "classes_mlp"},
    )


def _uvit(mults: tuple[int, ...]) -> UViT:
    return UViT(dim=16, dim_mults=mults, channels=3, vit_depth=2, attn_dim_head=8, attn_heads=2)


@case
def simple_diffusion() -> ZooCase:
    return ZooCase(
        name="simple_diffusion",
        model=_uvit((2, 4)),
        args=(torch.randn(2, 3, 16, 16), torch.tensor([5.0, 800.0])),
        entry=("downs.0.2",),
        consumer="downs.0.3",
        exit=("ups.1.0", "ups.1.0.net", "ups.1.0.net.2"),
        resolution=(16, 16),
        source="denoising-diffusion-pytorch UViT, as in Simple Diffusion",
        note="simple_diffusion.py:445-452: the attention returns the sum with its input (:197), which is a skip and "
        "goes into the pixel-unshuffling downsampler; :462-465: an up level *begins* with its pixel-shuffle, and the "
        "cat comes next. The transformer in the middle works on tokens (:454-460).",
        skipped=frozenset(
            {"downs.0.3", *children("downs.1", 4), "vit", *children("ups.0", 4), *children("ups.1.0.net", 2)}
        ),
        outside=frozenset(
            {"init_conv", "time_mlp", *children("downs.0", 3), "ups.1.1", "ups.1.2", "ups.1.3"}
            | {"final_res_block", "final_conv"}
        ),
    )


@refused
def simple_diffusion_shallow() -> RefusedCase:
    return RefusedCase(
        name="simple_diffusion_shallow",
        model=_uvit((1, 2)),
        args=(torch.randn(2, 3, 16, 16), torch.tensor([5.0, 800.0])),
        source="denoising-diffusion-pytorch UViT, narrow below",
        note="The region of simple_diffusion, but with as few channels below as above: less than 20% of the MACs. Two "
        "wider ones skip blocks at full size too; taking one of these is the user's choice.",
        says=(
            "what lies below 16×16 is too small a part",
            "rejected 0: downs.0.2 → ups.1.0.net.2, 16×16 down to 4×4, 19.8% of MACs",
            "region 0: downs.0.0.res_conv → ups.1.3, 16×16 down to 4×4, 88.2% of MACs",
            "region 1: downs.0.1.res_conv → ups.1.1, 16×16 down to 4×4, 54.0% of MACs",
        ),
    )


def _karras(name: str, model: Any, sample: tuple[int, ...], source: str, note: str, **kwargs: Any) -> ZooCase:
    return ZooCase(
        name=name,
        model=model,
        args=(torch.randn(*sample), torch.tensor([0.3, 0.4])[: sample[0]]),
        kwargs=kwargs,
        entry=("downs.0", "downs.0.res_mp_add"),
        consumer="downs.1",
        exit=("ups.5", "ups.5.res_mp_add"),
        resolution=sample[2:],
        source=source,
        note=note,
        skipped=frozenset({*(f"downs.{k}" for k in range(1, 5)), *children("mids", 2), *children("ups", 5)}),
        outside=frozenset({"input_block", "to_time_emb", "downs.0", "ups.6", "ups.7", "output_block"}),
    )


@case
def karras() -> ZooCase:
    model = KarrasUnet(
        image_size=16,
        dim=16,
        dim_max=32,
        num_classes=5,
        channels=3,
        num_downsamples=2,
        num_blocks_per_stage=1,
        attn_res=(8, 4),
        attn_dim_head=16,
    )
    plain = _karras(
        "karras",
        model,
        (2, 3, 16, 16),
        "denoising-diffusion-pytorch KarrasUnet, as in EDM2",
        "karras_unet.py:611-613: every encoder's output is a skip, and downs.1 begins with the downsampling (:262); "
        ":622-628: the decoders that upsample take no skip, and begin with it (:344). Prepended in turn (:507-538), "
        "the decoders are ups.0-2 at 4x4, ups.2 going up to 8x8, ups.3-4 at 8x8, ups.5 going up to 16x16 with its "
        "block there, and ups.6-7 with the two top skips. One `skip_mp_cat` serves all levels: its first four calls lie"
        " inside, the last two outside.",
        class_labels=torch.tensor([1, 4]),
    )
    return replace(plain, outside=plain.outside | {"to_class_emb"})


@case
def karras_3d() -> ZooCase:
    model = KarrasUnet3D(
        image_size=8,
        frames=4,
        dim=8,
        dim_max=16,
        channels=3,
        num_downsamples=2,
        num_blocks_per_stage=1,
        attn_res=(4, 2),
        attn_dim_head=8,
        downsample_types=("image", "all"),
        factorize_space_time_attn=True,
    )
    return _karras(
        "karras_3d",
        model,
        (1, 3, 4, 8, 8),
        "denoising-diffusion-pytorch KarrasUnet3D",
        "karras_unet_3d.py:743-760: as karras, with frames as an axis of the 3D convolutions: the first downsampling "
        "halves the image, the second the frames too (:621-629), all by trilinear interpolation.",
    )

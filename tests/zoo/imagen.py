"""The UNets of imagen-pytorch. Files and lines are those of 2.1.0."""

import importlib.util
from dataclasses import replace
from typing import Any

import torch

from tests.zoo.case import RefusedCase, ZooCase, case, children, refused
from tests.zoo.third_party import stand_ins, trainers

_spec = importlib.util.find_spec("imagen_pytorch")
assert _spec is not None
_text_encoder = {"t5_encode_text": None, "get_encoded_dim": lambda name: 12, "DEFAULT_T5_NAME": ""}
# The package's own __init__ brings its trainer, and its t5 asks the network how wide a text encoder is.
_package = {
    "imagen_pytorch": {"__path__": _spec.submodule_search_locations},
    "imagen_pytorch.t5": _text_encoder,
}
with trainers(), stand_ins(_package):
    from imagen_pytorch.imagen_pytorch import Unet
    from imagen_pytorch.imagen_video import Unet3D

_SMALL: dict[str, Any] = {
    "dim": 16,
    "text_embed_dim": 12,
    "cond_dim": 16,
    "dim_mults": (1, 2, 2),
    "attn_heads": 2,
    "attn_dim_head": 8,
    "layer_attns": (False, True, True),
    "layer_cross_attns": (False, True, True),
    "attn_pool_num_latents": 4,
    "max_text_len": 8,
}


def _imagen(**config: Any) -> ZooCase:
    return ZooCase(
        name="imagen",
        model=Unet(**_SMALL, **config),
        args=(torch.randn(2, 3, 16, 16), torch.tensor([5.0, 800.0])),
        kwargs={"text_embeds": torch.randn(2, 7, 12), "text_mask": torch.ones(2, 7, dtype=torch.bool)},
        entry=("downs.0.3", "downs.0.2.0"),
        consumer="downs.0.4",
        exit=("ups.1.3", "ups.1.3.net", "ups.1.3.net.2"),
        resolution=(16, 16),
        source="imagen-pytorch Unet, as its BaseUnet64",
        note="imagen_pytorch.py:1710-1718: without attention at the top `attn_block` is an Identity, so the last "
        "resnet's output is a skip twice and goes into the downsampler (pixel-unshuffle and a 1x1 convolution); "
        ":1731-1741: ups.1 ends with its pixel-shuffle, and ups.2 begins with the cat of a scaled skip. Text goes "
        "round as tokens and, pooled, with the time. The gates of `GlobalContext` (:969) are one pixel wide at every "
        "level, and no lower resolution.",
        skipped=frozenset(
            {"downs.0.4", "downs.1.1", "downs.1.2.0", "downs.1.3", "downs.1.4", "downs.2.1", "downs.2.2.0", "downs.2.3"}
            | {"downs.2.4", "mid_block1", "mid_attn", "mid_block2", "ups.0.0", "ups.0.1.0", "ups.0.2", "ups.0.3"}
            | {"ups.1.0", "ups.1.1.0", "ups.1.2", *children("ups.1.3.net", 2)}
        ),
        outside=frozenset(
            {"init_conv", "to_time_hiddens", "to_time_cond", "text_to_cond", "attn_pool"}
            | {"downs.0.1", "downs.0.2.0", "ups.2.0", "ups.2.1.0", "final_res_block", "final_conv"}
        ),
    )


@case
def imagen() -> ZooCase:
    return _imagen()


@case
def imagen_memory_efficient() -> ZooCase:
    plain = _imagen(memory_efficient=True)
    return replace(
        plain,
        name="imagen_memory_efficient",
        consumer="downs.1.0",
        resolution=(8, 8),
        source="imagen-pytorch Unet, memory-efficient, as its SRUnet256",
        note="imagen_pytorch.py:1704-1718: every level begins with its downsampling, so the highest skip is half the "
        "size of the sample and nothing goes round at full size: the region of imagen, one level lower. ups.2 ends "
        "with an upsampling too (:1393).",
        skipped=(plain.skipped - {"downs.0.4", "downs.1.4", "downs.2.4"}) | {"downs.1.0", "downs.2.0"},
        outside=plain.outside | {"init_resnet_block", "downs.0.0", "ups.2.3"},
    )


@case
def imagen_3d() -> ZooCase:
    plain = _imagen()
    inside = {*(f"{path}.{k}" for path in ("downs.1", "downs.2") for k in (4, 5)), "ups.0.3", "ups.0.4"}
    return replace(
        plain,
        name="imagen_3d",
        model=Unet3D(**{**_SMALL, "layer_attns": (False, False, True)}),
        args=(torch.randn(1, 3, 3, 16, 16), torch.tensor([5.0])),
        kwargs={"text_embeds": torch.randn(1, 7, 12)},
        entry=("downs.0.5",),
        consumer="downs.0.7",
        exit=("ups.1.6",),
        source="imagen-pytorch Unet3D, as in Imagen Video",
        note="imagen_video.py:1887-1905: a level is resnets, attention, a depthwise convolution and an attention along "
        "the frames; the last one's output is a skip and goes into the downsampler, which halves the image only; "
        ":655-660: ups.1's pixel-shuffle folds frames into the batch and back, so only the module around it returns "
        "the exit. Its 3D convolutions are 2D ones on folded frames (:419-475).",
        skipped=frozenset(
            {"downs.0.7", "downs.1.1", "downs.1.2.0", "downs.1.7", "downs.2.1", "downs.2.2.0", "downs.2.3", "downs.2.7"}
            | {"mid_block1", "mid_attn", "mid_temporal_peg", "mid_temporal_attn", "mid_block2", *inside}
            | {
                "ups.0.0",
                "ups.0.1.0",
                "ups.0.2",
                "ups.0.6",
                "ups.1.0",
                "ups.1.1.0",
                "ups.1.3",
                "ups.1.4",
                "ups.1.6.net",
            }
        ),
        outside=(plain.outside - {"downs.0.3"})
        | {"init_temporal_peg", "init_temporal_attn", "downs.0.4", "ups.2.3", "ups.2.4"},
    )


@refused
def imagen_combined() -> RefusedCase:
    plain = _imagen(combine_upsample_fmaps=True)
    return RefusedCase(
        name="imagen_combined",
        model=plain.model,
        args=plain.args,
        kwargs=plain.kwargs,
        source="imagen-pytorch Unet, feature maps of all levels combined",
        note="imagen_pytorch.py:1740-1745: what each up level gives is enlarged to full size and concatenated at the "
        "end (:1128-1133), so besides ups.1's pixel-shuffle two functional interpolations lead back up. Without "
        "`init_conv_to_final_conv_residual` nothing goes round the place where all are together.",
        says=("several exits lead back up: ups.1.3, upsample_nearest2d in upsample_combiner (2×)",),
    )

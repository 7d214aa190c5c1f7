"""Example inputs for diffusers UNets, made up from their class and configuration: shapes are all that counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from clockwork_hooks.errors import ModelNotFoundError

__all__ = ["CLASSES", "example_inputs"]

TOKENS = 77
FRAMES = 16
Inputs = dict[str, Any]
Get = Callable[[str], Any]


class _Maker:
    """Tensors of one batch on one device, in the sizes a configuration asks for."""

    def __init__(
        self, config: Mapping[str, Any], *, batch: int, size: tuple[int, ...], frames: int, device: str
    ) -> None:
        self.config = config
        self.batch, self.size, self.frames, self.device = batch, size, frames, device

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self.batch, *shape, device=self.device)

    def integers(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self.batch, *shape, dtype=torch.int64, device=self.device)

    def time(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64, device=self.device)

    def text(self, width: Any, tokens: int = TOKENS) -> torch.Tensor:
        return self.floats(tokens, width[0] if isinstance(width, (tuple, list)) else width)

    def labels(self) -> Inputs:
        """Class labels in the form of the configuration's class embedding."""
        get: Get = self.config.get
        kind, width = get("class_embed_type"), get("projection_class_embeddings_input_dim")
        if kind is None:
            return {"class_labels": self.integers()} if get("num_class_embeds") else {}
        if kind == "timestep":
            return {"class_labels": self.floats()}
        if kind == "identity":
            width = get("time_embedding_dim") or get("block_out_channels")[0] * 4
        return {"class_labels": self.floats(width)}

    def added(self) -> Inputs:
        """`added_cond_kwargs` in the form of the configuration's additional embedding."""
        get: Get = self.config.get
        kind, added = get("addition_embed_type"), Inputs()
        if kind == "text_time":
            rest = get("projection_class_embeddings_input_dim") - 6 * get("addition_time_embed_dim")
            added = {"text_embeds": self.floats(rest), "time_ids": self.floats(6)}
        elif kind == "text_image":
            added = {name: self.floats(get("cross_attention_dim")) for name in ("text_embeds", "image_embeds")}
        elif kind in ("image", "image_hint"):
            added = {"image_embeds": self.floats(get("encoder_hid_dim"))}
            if kind == "image_hint":
                added["hint"] = self.floats(3, *(8 * edge for edge in self.size))
        if get("encoder_hid_dim_type") == "text_image_proj":
            added.setdefault("image_embeds", self.floats(get("cross_attention_dim")))
        return {"added_cond_kwargs": added} if added else {}


def _unet2d(make: _Maker) -> Inputs:
    return {"sample": make.floats(make.config["in_channels"], *make.size), "timestep": make.time(), **make.labels()}


def _unet1d(make: _Maker) -> Inputs:
    return {"sample": make.floats(make.config["in_channels"], make.size[-1]), "timestep": make.time()}


def _condition(make: _Maker) -> Inputs:
    get: Get = make.config.get
    by_image = get("encoder_hid_dim_type") == "image_proj"
    width = get("encoder_hid_dim") or get("cross_attention_dim")
    hinted = 4 if get("addition_embed_type") == "image_hint" else 0  # the UNet appends the hint's channels itself
    inputs = {
        "sample": make.floats(make.config["in_channels"] - hinted, *make.size),
        "timestep": make.time(),
        "encoder_hidden_states": None if by_image else make.text(width),
        **make.labels(),
        **make.added(),
    }
    if get("time_cond_proj_dim"):
        inputs["timestep_cond"] = make.floats(get("time_cond_proj_dim"))
    return inputs


def _video(make: _Maker, rows: int = 1) -> Inputs:
    get: Get = make.config.get
    text = make.text(get("encoder_hid_dim") or get("cross_attention_dim"))
    inputs = {
        "sample": make.floats(make.config["in_channels"], make.frames, *make.size),
        "timestep": make.time(),
        "encoder_hidden_states": text.repeat_interleave(rows, 0),
        **make.added(),
    }
    if get("time_cond_proj_dim"):
        inputs["timestep_cond"] = make.floats(get("time_cond_proj_dim"))
    return inputs


def _motion(make: _Maker) -> Inputs:
    return _video(make, rows=make.frames)  # the pipeline repeats the text for every frame


def _image_to_video(make: _Maker) -> Inputs:
    sample = make.floats(make.config["in_channels"], make.frames, *make.size)
    width = make.config["cross_attention_dim"]
    return {
        "sample": sample,
        "timestep": make.time(),
        "fps": make.integers(),
        "image_latents": torch.zeros_like(sample),
        "image_embeddings": make.floats(width),
        "encoder_hidden_states": make.text(width),
    }


def _spatio_temporal(make: _Maker) -> Inputs:
    config = make.config
    ids = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    return {
        "sample": make.floats(make.frames, config["in_channels"], *make.size),
        "timestep": make.time(),
        "encoder_hidden_states": make.text(config["cross_attention_dim"], tokens=1),
        "added_time_ids": make.floats(ids),
    }


def _kandinsky3(make: _Maker) -> Inputs:
    return {
        "sample": make.floats(make.config["in_channels"], *make.size),
        "timestep": make.time(),
        "encoder_hidden_states": make.text(make.config["encoder_hid_dim"]),
        "encoder_attention_mask": make.floats(TOKENS),
    }


def _cascade(make: _Maker) -> Inputs:
    get: Get = make.config.get
    inputs = {
        "sample": make.floats(make.config["in_channels"], *make.size),
        "timestep_ratio": make.floats(),
        "clip_text_pooled": make.floats(1, get("clip_text_pooled_in_channels")),
    }
    if get("clip_text_in_channels"):
        inputs["clip_text"] = make.text(get("clip_text_in_channels"))
    if get("clip_image_in_channels"):
        inputs["clip_img"] = make.floats(1, get("clip_image_in_channels"))
    if get("effnet_in_channels"):
        inputs["effnet"] = make.floats(get("effnet_in_channels"), 16, 16)
    return inputs


def _uvit(make: _Maker) -> Inputs:
    config = make.config
    return {
        "input_ids": make.integers(*make.size),
        "encoder_hidden_states": make.text(config["encoder_hidden_size"]),
        "pooled_text_emb": make.floats(config["cond_embed_dim"]),
        "micro_conds": make.floats(config["micro_cond_embed_dim"] // config["micro_cond_encode_dim"]),
    }


# diffusers class → how its inputs are made, its usual spatial shape where the configuration names none
CLASSES: Mapping[str, tuple[Callable[[_Maker], Inputs], tuple[int, ...]]] = {
    "UNet1DModel": (_unet1d, (65536,)),
    "UNet2DModel": (_unet2d, (64, 64)),
    "UNet2DConditionModel": (_condition, (64, 64)),
    "UNet3DConditionModel": (_video, (32, 32)),
    "UNetMotionModel": (_motion, (64, 64)),
    "UNetSpatioTemporalConditionModel": (_spatio_temporal, (72, 128)),
    "I2VGenXLUNet": (_image_to_video, (32, 32)),
    "Kandinsky3UNet": (_kandinsky3, (128, 128)),
    "StableCascadeUNet": (_cascade, (24, 24)),
    "UVit2DModel": (_uvit, (32, 32)),
}


def example_inputs(
    kind: str,
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    frames: int = 0,
    device: str = "meta",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one call of a diffusers UNet: zeros of the right shapes.

    Args:
        kind: class name, one of `CLASSES`.
        config: its full configuration, defaults included (`unet.config`).
        batch: number of samples.
        size: spatial shape of the sample; None takes the configuration's `sample_size`.
        frames: frames of a video; 0 takes the configuration's, else 16.
        device: where the tensors live; "meta" holds no data.

    Returns:
        (sample, time) as positional arguments, all others by name.

    Raises:
        ModelNotFoundError: the class is none of `CLASSES`.

    Example:
        >>> args, kwargs = example_inputs("UNet2DModel", {"in_channels": 3, "sample_size": 32})
        >>> tuple(args[0].shape)
        (1, 3, 32, 32)
    """
    if kind not in CLASSES:
        raise ModelNotFoundError(
            "example inputs are known for these diffusers classes: " + ", ".join(CLASSES),
            seen={"class": kind},
            do="name a factory that returns (model, args, kwargs): package.module:factory",
        )
    build, usual = CLASSES[kind]
    native = config.get("sample_size") or usual
    if isinstance(native, int):
        native = (native,) * len(usual)
    frames = frames or config.get("num_frames") or FRAMES
    inputs = build(_Maker(config, batch=batch, size=tuple(size or native), frames=frames, device=device))
    names = list(inputs)[:2] if kind != "UVit2DModel" else list(inputs)[:1]
    args = tuple(inputs.pop(name) for name in names)
    return args, inputs

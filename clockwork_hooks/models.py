"""A model and its inputs from a name: a preset, a folder with a diffusers `config.json`, or `package.module:factory`.

A preset is a name for a diffusers configuration and a native size: shapes only, no weights. Example inputs are made
from the class and the configuration; only their shapes count. Nothing is counted by name: `flops` and `regions` treat a
preset as they treat any other model.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from clockwork_hooks._tree import map_leaves
from clockwork_hooks.errors import ArgumentError, ModelNotFoundError, need

__all__ = ["CLASSES", "PRESETS", "LoadedModel", "Preset", "example_inputs", "find_factory", "load_model", "tiny_preset"]

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


@dataclass(frozen=True, slots=True)
class Preset:
    """One architecture.

    Attributes:
        title: what people call it.
        config: diffusers configuration, with the class as "_class_name"; what is left out is the class's default.
        size: native spatial shape of the sample (of the latent, where there is one).
        frames: frames of a video sample; 0 for images.
    """

    title: str
    config: Mapping[str, Any] = field(repr=False)
    size: tuple[int, ...]
    frames: int = 0


_SD = {"_class_name": "UNet2DConditionModel", "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
_SIMPLE = {
    "_class_name": "UNet2DConditionModel",
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "sd15": Preset(
            "Stable Diffusion 1.5, 512×512",
            {**_SD, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            (64, 64),
        ),
        "sd21": Preset(
            "Stable Diffusion 2.1, 768×768",
            {
                **_SD,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            (96, 96),
        ),
        "sdxl": Preset(
            "Stable Diffusion XL, 1024×1024",
            {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            (128, 128),
        ),
        "svd": Preset(
            "Stable Video Diffusion, 14 frames of 1024×576",
            {"_class_name": "UNetSpatioTemporalConditionModel", "sample_size": 96, "num_frames": 14},
            (72, 128),
            frames=14,
        ),
        "kandinsky22": Preset(
            "Kandinsky 2.2 decoder, 512×512",
            {
                **_SIMPLE,
                "in_channels": 4,
                "out_channels": 8,
                "block_out_channels": (384, 768, 1152, 1536),
                "cross_attention_dim": 768,
                "encoder_hid_dim": 1280,
                "encoder_hid_dim_type": "image_proj",
                "addition_embed_type": "image",
            },
            (64, 64),
        ),
        "deepfloyd-if": Preset(
            "DeepFloyd IF-I-XL, pixels, 64×64",
            {
                **_SIMPLE,
                "in_channels": 3,
                "out_channels": 6,
                "block_out_channels": (704, 1408, 2112, 2816),
                "cross_attention_dim": 2816,
                "cross_attention_norm": "group_norm",
                "encoder_hid_dim": 4096,
                "addition_embed_type": "text",
                "act_fn": "gelu",
            },
            (64, 64),
        ),
        "ddpm-cifar10": Preset(
            "DDPM on CIFAR-10, pixels, 32×32",
            {
                "_class_name": "UNet2DModel",
                "sample_size": 32,
                "block_out_channels": (128, 256, 256, 256),
                "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": None,
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
            },
            (32, 32),
        ),
    }
)


def tiny_preset(preset: Preset) -> Preset:
    """The same architecture at a tenth of its width and a quarter of its size: what a CPU runs in a moment.

    Args:
        preset: one of `PRESETS`.

    Returns:
        Another preset. No width is below 32 channels, no edge below 16.

    Example:
        >>> tiny_preset(PRESETS["sd15"]).config["block_out_channels"], tiny_preset(PRESETS["sd15"]).size
        ((32, 64, 128, 128), (16, 16))
    """
    config = dict(preset.config)
    video = config["_class_name"] == "UNetSpatioTemporalConditionModel"
    wide = config.get("block_out_channels", (320, 640, 1280, 1280))
    config["block_out_channels"] = tuple(max(32, channels // 320 * 32) for channels in wide)
    heads = "num_attention_heads" if video else "attention_head_dim"
    if video or config.get(heads) is not None:
        config[heads] = 8
    return Preset(f"{preset.title}, at a tenth of its width", config, tuple(max(16, n // 32 * 8) for n in preset.size),
                  frames=min(preset.frames, 2))  # fmt: skip


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NATIVE = {"size": None, "batch": 1, "frames": 0}  # what says nothing about the inputs
_RETURN = "`return unet, (torch.randn(1, 3, 64, 64), torch.tensor([0.5])), {}`"


class LoadedModel(NamedTuple):
    """A UNet and one call of it: `unet(*args, **kwargs)`.

    Attributes:
        unet: in `eval()`; on meta, unless another device was asked for.
        args: the sample and the time, and what else it takes by position.
        kwargs: what it takes by name.
    """

    unet: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_model(
    name: str,
    *,
    size: tuple[int, ...] | None = None,
    batch: int = 1,
    frames: int = 0,
    device: str = "meta",
    dtype: torch.dtype | None = None,
    tiny: bool = False,
) -> LoadedModel:
    """The model that `name` means, with example inputs, by default on the meta device: no weights in memory.

    Args:
        name: a preset ("sd15"), a folder with a diffusers `config.json` (of a UNet, or of a pipeline with a `unet`
            folder), the path of such a file, or "package.module:factory". A factory is called without arguments and
            returns the model, (model, args) or (model, args, kwargs); a diffusers UNet needs no inputs.
        size: spatial shape of the sample, e.g. (64, 64); None is the native one. A factory makes its own.
        batch: number of samples, likewise.
        frames: frames of a video sample, likewise.
        device: where the model is built.
        dtype: of the weights and inputs, where it is not to be the model's own.
        tiny: a preset at a tenth of its width.

    Returns:
        (unet, args, kwargs), the UNet in evaluation mode.

    Raises:
        ModelNotFoundError: the name means nothing; lists what would.
        ArgumentError: size, batch or frames for a factory that returns inputs of its own.

    Example:
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> sum(parameter.numel() for parameter in unet.parameters())
        35746307
    """
    loaded = _load(name, size=size, batch=batch, frames=frames, device=device, small=tiny)
    if dtype is None:
        return loaded

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return LoadedModel(
        nn.Module.to(loaded.unet, dtype=dtype), map_leaves(cast, loaded.args), map_leaves(cast, loaded.kwargs)
    )


def _load(name: str, *, size: tuple[int, ...] | None, batch: int, frames: int, device: str, small: bool) -> LoadedModel:
    if name in PRESETS:
        preset = tiny_preset(PRESETS[name]) if small else PRESETS[name]
        frames = frames or preset.frames
        return _from_config(preset.config, size=size or preset.size, batch=batch, frames=frames, device=device)
    path = _config_file(Path(name))
    if path is not None:
        return _from_config(_read(path), size=size, batch=batch, frames=frames, device=device)
    module, colon, factory = name.partition(":")
    if colon and module and factory and not Path(name).exists():
        return _from_factory(module, factory, size=size, batch=batch, frames=frames, device=device)
    raise ModelNotFoundError(
        "a model is a preset, a folder with a diffusers config.json, or package.module:factory",
        seen={"model": name, "presets": ", ".join(PRESETS)},
        do="name one of these; for a model of your own write a function that returns (model, args, kwargs), as in "
        + _RETURN,
    )


def _config_file(path: Path) -> Path | None:
    candidates = (path, path / "config.json", path / "unet" / "config.json")
    return next((file for file in candidates if file.is_file() and file.suffix == ".json"), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            "a diffusers config.json is a JSON object", seen={"file": path, "error": error}, do="check the file"
        ) from error
    if not isinstance(config, dict) or config.get("_class_name") not in CLASSES:
        raise ModelNotFoundError(
            "a config.json names one of these classes as _class_name: " + ", ".join(CLASSES),
            seen={"file": path, "_class_name": config.get("_class_name") if isinstance(config, dict) else "none"},
            do="point to the folder of the UNet itself, or name a factory: package.module:factory",
        )
    return config


def _from_config(
    config: Mapping[str, Any], *, size: tuple[int, ...] | None, batch: int, frames: int, device: str
) -> LoadedModel:
    what = "presets and config.json folders are built by diffusers"
    need(what, "diffusers", install="clockwork-hooks[diffusers]", error=ModelNotFoundError)
    diffusers, kind = importlib.import_module("diffusers"), config["_class_name"]
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet: nn.Module = getattr(diffusers, kind).from_config(dict(config))
    args, kwargs = example_inputs(kind, _config_of(unet), batch=batch, size=size, frames=frames, device=device)
    return LoadedModel(_placed(unet, device), args, kwargs)


def _placed(unet: nn.Module, device: str) -> nn.Module:
    """In evaluation mode and wholly on the device: `torch.Tensor([x])` in a constructor ignores `torch.device`."""
    return unet.eval().to(device)


def _config_of(unet: nn.Module) -> Mapping[str, Any]:
    config = getattr(unet, "config", None)
    return config if isinstance(config, Mapping) else {}


def _from_factory(module: str, factory: str, **options: Any) -> LoadedModel:
    build = find_factory(module, factory)
    with torch.device(options["device"]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op.*")  # weights loaded into a meta model
        returned = build()
    unet, *inputs = returned if isinstance(returned, tuple) else (returned,)
    if not isinstance(unet, nn.Module) or len(inputs) > 2:
        raise ModelNotFoundError(
            "a factory must return a model, (model, args) or (model, args, kwargs)",
            seen={"factory": f"{module}:{factory}", "returned": type(returned).__name__},
            do="return the UNet itself first",
        )
    if inputs and callable(inputs[0]) and not isinstance(inputs[0], torch.Tensor):
        raise ModelNotFoundError(
            "a factory of a model must return it with the arguments of one call: (model, args, kwargs)",
            seen={"factory": f"{module}:{factory}", "returned": ", ".join(type(part).__name__ for part in returned)},
            do="name another one: what this one returns, (unet, generate, conditions), is for drift, perturb, plan and "
            "tune",
        )
    if not inputs:
        if type(unet).__name__ not in CLASSES:
            raise ModelNotFoundError(
                "a model that is no diffusers UNet comes with the inputs of one call",
                seen={"factory": f"{module}:{factory}", "model": type(unet).__name__},
                do=f"return (model, args, kwargs) from the factory, as in {_RETURN}",
            )
        inputs = list(example_inputs(type(unet).__name__, _config_of(unet), **options))
    elif unused := {name: options[name] for name, none in _NATIVE.items() if options[name] != none}:
        raise ArgumentError(
            "size, batch and frames are for inputs that are made here; this factory returns its own",
            seen={"factory": f"{module}:{factory}", **unused},
            do="leave them out, and return inputs of that shape from the factory",
        )
    args, kwargs = inputs[0], dict(inputs[1]) if len(inputs) > 1 else {}
    return LoadedModel(
        _placed(unet, options["device"]), tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs
    )


def find_factory(module: str, factory: str, *, bare: bool = True) -> Any:
    """The function or class that `module:factory` names, the current directory included.

    Args:
        module, factory: the two parts of the name.
        bare: it is to be called without arguments.

    Returns:
        What the name stands for; it has not been called.

    Raises:
        ModelNotFoundError: there is none, or it needs arguments.

    Example:
        >>> find_factory("torch.nn", "Identity")
        <class 'torch.nn.modules.linear.Identity'>
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        target: Any = importlib.import_module(module)
        for part in factory.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ModelNotFoundError(
            "package.module:factory names a function that Python can import from here",
            seen={"module": module, "factory": factory, "error": f"{type(error).__name__}: {error}"},
            do=f"name the module without .py: {module[:-3]}:{factory}"
            if module.endswith(".py")
            else "check the spelling and the current directory",
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(target):
        raise ModelNotFoundError(
            "a factory must be callable", seen={"factory": f"{module}:{factory}"}, do="name a function or a class"
        )
    needed = _needed(target) if bare else []
    if needed:
        raise ModelNotFoundError(
            "a factory must be callable without arguments",
            seen={"factory": f"{module}:{factory}", "arguments without a default": ", ".join(needed)},
            do="give them defaults, or name a function of your own that calls it",
        )
    return target


def _needed(function: Callable[..., Any]) -> list[str]:
    """Parameters that a call has to name; none where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in parameters if one.default is one.empty and one.kind not in _ANY_NUMBER]

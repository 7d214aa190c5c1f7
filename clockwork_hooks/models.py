"""A model from its name: a preset, a folder with a diffusers `config.json`, or `package.module:factory`."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clockwork_hooks.errors import ArgumentError, ModelNotFoundError
from clockwork_hooks.examples import CLASSES, example_inputs
from clockwork_hooks.needed import need
from clockwork_hooks.presets import PRESETS
from clockwork_hooks.presets import tiny as tiny_preset
from clockwork_hooks.tree import map_leaves

__all__ = ["LoadedModel", "find_factory", "load_model"]

_NATIVE = {"size": None, "batch": 1, "frames": 0}  # what says nothing about the inputs
_RETURN = "`return unet, (torch.randn(1, 3, 64, 64), torch.tensor([0.5])), {}`"


class LoadedModel(NamedTuple):
    """A UNet and one call of it: `unet(*args, **kwargs)`."""

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
    made = _load(name, size=size, batch=batch, frames=frames, device=device, small=tiny)
    if dtype is None:
        return made

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return LoadedModel(nn.Module.to(made.unet, dtype=dtype), map_leaves(cast, made.args), map_leaves(cast, made.kwargs))


def _load(name: str, *, size: tuple[int, ...] | None, batch: int, frames: int, device: str, small: bool) -> LoadedModel:
    if name in PRESETS:
        preset = tiny_preset(PRESETS[name]) if small else PRESETS[name]
        frames = frames or preset.frames
        return _from_config(preset.config, size=size or preset.size, batch=batch, frames=frames, device=device)
    path = _config_file(Path(name))
    if path is not None:
        config = _read(path)
        return _from_config(config, size=size, batch=batch, frames=frames, device=device)
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
    found = find_factory(module, factory)
    with torch.device(options["device"]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op.*")  # weights loaded into a meta model
        made = found()
    unet, *inputs = made if isinstance(made, tuple) else (made,)
    if not isinstance(unet, nn.Module) or len(inputs) > 2:
        raise ModelNotFoundError(
            "a factory returns a model, (model, args) or (model, args, kwargs)",
            seen={"factory": f"{module}:{factory}", "returned": type(made).__name__},
            do="return the UNet itself first",
        )
    if not inputs:
        if type(unet).__name__ not in CLASSES:
            raise ModelNotFoundError(
                "a model that is no diffusers UNet comes with the inputs of one call",
                seen={"factory": f"{module}:{factory}", "model": type(unet).__name__},
                do=f"return (model, args, kwargs) from the factory, as in {_RETURN}",
            )
        inputs = list(example_inputs(type(unet).__name__, _config_of(unet), **options))
    elif given := {name: options[name] for name, none in _NATIVE.items() if options[name] != none}:
        raise ArgumentError(
            "size, batch and frames are for inputs that are made here; this factory returns its own",
            seen={"factory": f"{module}:{factory}", **given},
            do="leave them out, and return inputs of that shape from the factory",
        )
    args, kwargs = inputs[0], dict(inputs[1]) if len(inputs) > 1 else {}
    return LoadedModel(
        _placed(unet, options["device"]), tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs
    )


def find_factory(module: str, factory: str) -> Any:
    """The function or class that `module:factory` names, the current directory included."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in factory.split("."):
            found = getattr(found, part)
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
    if not callable(found):
        raise ModelNotFoundError(
            "a factory can be called", seen={"factory": f"{module}:{factory}"}, do="name a function or a class"
        )
    return found

"""A module that is saved as safetensors and JSON, and comes back as it was or not at all.

The two files of a saved adaptor: `config.json` and `model.safetensors`. Nothing is ever unpickled.

Every way in which they can be damaged has an error that says so; tensors are compared with the configuration before
any memory is taken for them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from clockwork_hooks._version import __version__
from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.reports.tables import shape

__all__ = ["CONFIG", "WEIGHTS", "SavedAdaptor", "fetch", "read_config", "read_weights", "write"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_UNTRAINED = ("resnet", "scaled-resnet", "unet")  # kinds that `distill` trains; no saved adaptor has such a name
_WHAT = f"a saved adaptor is a folder with {CONFIG} and {WEIGHTS}"


def fetch(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder itself, or the local copy of a repository on the Hugging Face Hub.

    Args:
        name: folder, or id of a repository: "user/name".
        **hub: options of `huggingface_hub.snapshot_download`.

    Raises:
        AdaptorError: it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        pickled = path.suffix in _PICKLES
        raise AdaptorError(
            f"{_WHAT}; nothing is unpickled" if pickled else _WHAT,
            seen={"got": f"a file, {path}"},
            do="save the adaptor with save_pretrained(folder)" if pickled else "pass the folder around it",
        )
    try:
        if str(name).count("/") != 1:
            raise ValueError("a repository's id is user/name")
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **hub))
    except (HFValidationError, OSError, ValueError) as error:  # not found, no network, offline: all of them OSErrors
        raise AdaptorError(
            f"{_WHAT}, or the id of such a repository on the Hugging Face Hub",
            seen={"no folder": path.absolute(), "from the hub": f"{type(error).__name__}: {_line(error)}"},
            do=f"train one: distill(unet, {str(name)!r}, generate, prompts=..., folder='mine'), then wrap(unet, 'mine')"
            if str(name) in _UNTRAINED
            else "check the spelling, and for a repository the network and the token",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration.

    Raises:
        AdaptorError: there is none, or it is not one that `write` made.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refused(folder, "missing", CONFIG) from None
    except (OSError, ValueError) as error:
        raise _refused(folder, "error", f"{CONFIG}: {_line(error)}") from error
    parts = {"kind": str, "arguments": dict, "region": (dict, type(None)), "facts": dict}
    if not isinstance(config, dict):
        raise _refused(folder, CONFIG, f"holds a {type(config).__name__}, no object")
    wrong = [name for name, kind in parts.items() if not isinstance(config.get(name), kind)]  # type: ignore[arg-type]
    if wrong or not all(isinstance(name, str) for name in config["arguments"]):
        raise _refused(folder, f"missing or wrong in {CONFIG}", ", ".join(wrong))
    return config


def read_weights(folder: Path, expected: Mapping[str, torch.Tensor], digest: str | None) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU.

    Args:
        folder: where they are.
        expected: name → a tensor of the shape it must have, on any device.
        digest: SHA-256 of the file, from the configuration; None where that has none.

    Raises:
        AdaptorError: the file is missing, pickled, truncated, altered, or holds other tensors.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickled:
            raise _refused(folder, "pickled, so not read", ", ".join(pickled))
        raise _refused(folder, "missing", WEIGHTS)
    try:
        with safe_open(file, framework="pt") as opened:
            there = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if _pickled(file):
            raise _refused(folder, "a renamed pickle, so not read", WEIGHTS) from error
        raise _refused(folder, f"{WEIGHTS} is truncated or corrupted", _line(error)) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if there != wanted:
        seen = {
            **dict.fromkeys(wanted.keys() - there.keys(), "missing"),
            **dict.fromkeys(there.keys() - wanted.keys(), "unknown"),
            **{
                n: f"{shape(there[n])}, not {shape(wanted[n])}"
                for n in wanted.keys() & there.keys()
                if there[n] != wanted[n]
            },
        }
        raise AdaptorError(
            f"{WEIGHTS} holds the tensors of {CONFIG}'s adaptor",
            seen={"folder": folder, **dict(sorted(seen.items())[:5])},
            do="take both files from the same save_pretrained",
        )
    if digest is not None and _digest(file) != digest:
        raise _refused(folder, WEIGHTS, f"was altered after it was saved: its SHA-256 is not {CONFIG}'s")
    return load_file(file)


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Write both files; each appears whole or not at all.

    Raises:
        AdaptorError: the configuration holds what JSON cannot.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta:
        raise AdaptorError(
            "an adaptor that is saved has weights", seen={"on the meta device": ", ".join(meta[:5])}, do="load it first"
        )
    weights, told = folder / f".{WEIGHTS}.part", folder / f".{CONFIG}.part"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        try:
            text = json.dumps({**config, "weights_sha256": _digest(weights)}, indent=2, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise AdaptorError(
                "the facts saved with an adaptor are what JSON holds: numbers, strings, lists, dicts",
                seen={"error": _line(error), "facts": config.get("facts")},
                do="convert them, e.g. float(tensor)",
            ) from error
        told.write_text(text + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS)
        os.replace(told, folder / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        told.unlink(missing_ok=True)


def _pickled(file: Path) -> bool:
    """Does it begin as `torch.save`'s zip archive, or a bare pickle, does? Asked of what is no safetensors file."""
    with file.open("rb") as stream:
        start = stream.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _refused(folder: Path, what: str, seen: str) -> AdaptorError:
    return AdaptorError(
        _WHAT, seen={"folder": folder, what: seen}, do="save the adaptor again with save_pretrained(folder)"
    )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


Self = TypeVar("Self", bound="SavedAdaptor")

BUILT_IN = {"ResNetAdaptor": "resnet", "ScaledResNetAdaptor": "resnet", "UNetAdaptor": "unet"}
CARD = """---
{{ card_data }}
---

# {{ kind }} for {{ model }}

A [Clockwork Diffusion](https://arxiv.org/abs/2312.08128) adaptor, made with `clockwork_hooks`. It stands in for the
low-resolution part of {{ model }} at the steps at which that does not run.

    import clockwork_hooks as ch
    cw = ch.wrap(unet, "{{ where }}")

| | |
|---|---|
{{ rows }}

An adaptor is tied to the sampler and the number of steps that it was trained with.
"""


class SavedAdaptor(
    nn.Module,
    ModelHubMixin,
    library_name="clockwork_hooks",
    tags=["clockwork-diffusion", "diffusion", "feature-caching"],
    paper_url="https://arxiv.org/abs/2312.08128",
    model_card_template=CARD,
):
    """An adaptor with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Attributes:
        region: the region that the adaptor was made for, as `config.json` holds it; None where it knows of none.
        facts: what else should be saved: the sampler, the number of steps, the clock it was trained for. JSON only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.region: dict[str, Any] | None = None
        self.facts: dict[str, Any] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make an adaptor of the same shape, as JSON can hold them."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {
            "kind": type(self).__name__,
            "clockwork_hooks": __version__,
            "arguments": self.arguments,
            "region": self.region,
            "facts": self.facts,
        }
        write(save_directory, config, self.state_dict())

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> Self:
        """Load an adaptor that `save_pretrained` or `push_to_hub` saved; on the CPU, in evaluation mode.

        Only JSON and safetensors are read, nothing is unpickled.

        Args:
            pretrained_model_name_or_path: a folder, or "user/name" on the Hugging Face Hub.
            **hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            AdaptorError: there is no such adaptor, it is of another class, or a file is damaged.
        """
        folder = fetch(pretrained_model_name_or_path, **hub)
        config = read_config(folder)
        kind = _kind(config["kind"])
        if kind is None or not issubclass(kind, cls):
            raise AdaptorError(
                f"{cls.__name__}.from_pretrained loads a {cls.__name__}",
                seen={"folder": folder, "saved there": config["kind"]},
                do="import the module that defines the class, and call that class's from_pretrained",
            )
        try:
            with torch.device("meta"):  # no memory before the file is seen to hold these very tensors
                made = kind(**config["arguments"])
        except Exception as error:
            raise AdaptorError(
                f"the arguments in {CONFIG} make an adaptor",
                seen={"folder": folder, "class": kind.__name__, "error": f"{type(error).__name__}: {error}"},
                do="save the adaptor again with save_pretrained(folder)",
            ) from error
        weights = read_weights(folder, made.state_dict(), config.get("weights_sha256"))
        if any(buffer.is_meta for name, buffer in made.named_buffers() if name not in weights):
            made = kind(**config["arguments"])  # of those that are not saved, only the constructor knows the values
        made.load_state_dict(weights, assign=True)
        made.region, made.facts = config["region"], config["facts"]
        return made.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of the folder or repository: what it is for, and the facts."""
        region = self.region or {}
        told = {
            "level, cut": f"{region.get('level')}, {region.get('cut')}",
            "entry": (region.get("entry") or {}).get("path"),
            "exit": (region.get("exit") or {}).get("path"),
            "fingerprint": region.get("fingerprint"),
            "parameters": f"{sum(parameter.numel() for parameter in self.parameters()):,}",
            **self.facts,
        }
        card = {
            "kind": type(self).__name__,
            "model": region.get("model", "a UNet"),
            "where": "this folder",
            "rows": "\n".join(f"| {name} | {value} |" for name, value in told.items()),
        }
        return super().generate_model_card(*args, **{**card, **kwargs})


def _kind(name: str) -> type[SavedAdaptor] | None:
    """The class of that name, among ours and those that the user has imported."""
    if name in BUILT_IN:
        found: type[SavedAdaptor] = getattr(importlib.import_module(f"clockwork_hooks.adaptors.{BUILT_IN[name]}"), name)
        return found
    kinds = SavedAdaptor.__subclasses__()
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == name), None)

"""The two files of a saved adaptor: `config.json` and `model.safetensors`. Nothing is ever unpickled.

Every way in which they can be damaged has an error that says so; tensors are compared with the configuration before
any memory is taken for them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.report import shape

__all__ = ["CONFIG", "WEIGHTS", "fetch", "read_config", "read_weights", "write"]

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

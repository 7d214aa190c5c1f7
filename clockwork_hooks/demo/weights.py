"""Reading and writing weights: safetensors and JSON, nothing that runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks.errors import DemoError

WEIGHTS = Path(__file__).parent / "weights"


class WeightsError(DemoError):
    """Shipped weights that are missing, corrupted, or of another architecture."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        WeightsError: the file is missing, or is no whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise _error("is missing", path, "there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise _error("cannot be read", path, error) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all (through a temporary name)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _error("is missing", path, "there is no such file") from None
    except (OSError, ValueError) as error:
        raise _error("cannot be read", path, error) from error
    if not isinstance(values, dict):
        raise _error("cannot be read", path, f"a JSON object was expected, this is a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's weights in fp16."""
    write_tensors(path, {name: tensor.to(torch.float16) for name, tensor in module.state_dict().items()})


def load_module(module: nn.Module, path: Path) -> None:
    """Load a file's weights into a module, in the module's own precision.

    Args:
        module: takes the weights.
        path: a safetensors file with exactly the module's names and shapes.

    Raises:
        WeightsError: the file is missing, corrupted, or of another architecture.
    """
    tensors = read_tensors(path)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != shapes:
        wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise _error("do not fit", path, f"{len(wrong)} tensors differ from the model's, the first is {wrong[0]!r}")
    module.load_state_dict(tensors)


def _error(what: str, path: Path, seen: object) -> WeightsError:
    return WeightsError(
        f"the demo runs on the weights it ships with, and a file of them {what}",
        seen={"file": path, "found": seen},
        do="reinstall clockwork-hooks, or retrain: python -m clockwork_hooks.demo.train --help",
    )

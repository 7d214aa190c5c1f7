"""An adaptor on disk or on the Hugging Face Hub: a folder with `config.json` and `model.safetensors`.

It comes back as it was saved, or not at all. Nothing is ever unpickled, and no memory is taken for tensors before
they are seen to be those of the configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from clockwork_hooks import adaptors
from clockwork_hooks._numbers import percent, shape
from clockwork_hooks._version import __version__
from clockwork_hooks.errors import AdaptorError, ClockworkError, first_line
from clockwork_hooks.regions.saved import misdescribed
from clockwork_hooks.reports.tables import table

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """---
{{ card_data }}
---

# {{ kind }} for {{ model }}

A [Clockwork Diffusion](https://arxiv.org/abs/2312.08128) adaptor, made with `clockwork_hooks`. It stands in for the
low-resolution part of {{ model }} at the steps at which that does not run.

    import clockwork_hooks as ch
    cw = ch.wrap(unet, "{{ where }}")

{{ tables }}

An adaptor is for the sampler and the number of steps that it was calibrated or trained with.
"""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WHAT = f"a saved adaptor is a folder with {CONFIG} and {WEIGHTS}"
_PARTS = {"kind": str, "arguments": dict, "region": (dict, NoneType), "facts": dict}  # of the configuration

Self = TypeVar("Self", bound="SavedAdaptor")


class SavedAdaptor(
    nn.Module,
    ModelHubMixin,  # PyTorchModelHubMixin unpickles where there are no safetensors, and saves `self.module` alone
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
        """Write the weights; the mixin writes the configuration after them."""
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        meta = [name for name, tensor in weights.items() if tensor.is_meta]
        if meta:
            raise AdaptorError(
                "an adaptor can be saved only with its weights",
                seen={"on the meta device": ", ".join(meta[:5])},
                do="load it first",
            )
        check_facts(self.facts)
        save_file(weights, save_directory / WEIGHTS, metadata={"format": "pt"})
        self._hub_mixin_config = {
            "kind": type(self).__name__,
            "clockwork_hooks": __version__,
            "arguments": self.arguments,
            "region": self.region,
            "facts": self.facts,
            "weights_sha256": _digest(save_directory / WEIGHTS),
        }

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
        folder = _folder(pretrained_model_name_or_path, **hub)
        config = _config(folder)
        kind = _kind(config["kind"])
        if kind is None or not issubclass(kind, cls):
            raise AdaptorError(
                f"{cls.__name__}.from_pretrained loads a {cls.__name__}",
                seen={"folder": folder, "saved there": config["kind"]},
                do="import the module that defines the class, and call that class's from_pretrained",
            )
        try:
            with torch.device("meta"):  # no memory before the file is seen to hold these very tensors
                adaptor = kind(**config["arguments"])
        except Exception as error:
            raise AdaptorError(
                f"the arguments in {CONFIG} make an adaptor",
                seen={"folder": folder, "class": kind.__name__, "error": f"{type(error).__name__}: {error}"},
                do="save the adaptor again with save_pretrained(folder)",
            ) from error
        weights = _weights(folder, adaptor.state_dict(), config.get("weights_sha256"))
        if any(buffer.is_meta for name, buffer in adaptor.named_buffers() if name not in weights):
            adaptor = kind(**config["arguments"])  # the values of buffers that are not saved come from the constructor
        adaptor.load_state_dict(weights, assign=True)
        adaptor.region, adaptor.facts = config["region"], config["facts"]
        return adaptor.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of the folder or repository: what it is for, and the facts."""
        region = self.region or {}
        rows = {
            "level, cut": f"{region.get('level')}, {region.get('cut')}",
            "entry": (region.get("entry") or {}).get("path"),
            "exit": (region.get("exit") or {}).get("path"),
            "fingerprint": region.get("fingerprint"),
            "parameters": f"{sum(parameter.numel() for parameter in self.parameters()):,}",
            **{name: value for name, value in self.facts.items() if not isinstance(value, dict)},
        }
        by_step = {name: value for name, value in self.facts.items() if isinstance(value, dict)}
        steps = list(dict.fromkeys(step for values in by_step.values() for step in values))
        tables = [table("Facts", ("fact", "value"), rows.items())]
        if steps:
            cells = [(step, *(_cell(values.get(step)) for values in by_step.values())) for step in steps]
            tables.append(table("By step", ("step", *(f">{name}" for name in by_step)), cells))
        card = {
            "kind": type(self).__name__,
            "model": region.get("model", "a UNet"),
            "where": "this folder",
            "tables": "\n\n".join(part.to_markdown() for part in tables),
        }
        return super().generate_model_card(*args, **{**card, **kwargs})


def check_facts(facts: Mapping[str, Any], error: type[ClockworkError] = AdaptorError) -> None:
    """Raise `error` if JSON cannot hold what is saved with an adaptor."""
    try:
        json.dumps(dict(facts))
    except (TypeError, ValueError) as wrong:
        raise error(
            "the facts saved with an adaptor are what JSON holds: numbers, strings, lists, dicts",
            seen={"facts": repr(facts)[:80], "error": first_line(wrong)},
            do="convert them, e.g. float(tensor)",
        ) from wrong


def _cell(value: Any) -> Any:
    """A relative error of the card, in percent."""
    return percent(value) if isinstance(value, float) else value


def _kind(name: str) -> type[SavedAdaptor] | None:
    """The class of that name, among ours and those that the user has imported."""
    if name in adaptors.HOMES:
        return getattr(adaptors, name)  # type: ignore[no-any-return]
    kinds = SavedAdaptor.__subclasses__()
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == name), None)


def _folder(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder itself, or the local copy of a repository on the Hub; `hub` are options of `snapshot_download`."""
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
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **hub))
    except (HFValidationError, OSError, ValueError) as error:  # not found, no network, offline: all of them OSErrors
        raise AdaptorError(
            f"{_WHAT}, or the id of such a repository on the Hugging Face Hub",
            seen={"no folder": path.absolute(), "from the hub": f"{type(error).__name__}: {first_line(error)}"},
            do=f"train one: distill(unet, {str(name)!r}, generate, prompts=..., folder='mine'), then wrap(unet, 'mine')"
            if str(name) in adaptors.KINDS
            else "check the spelling, and for a repository the network and the token",
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a JSON object is expected, not {str(config)[:40]}")
        wrong = [name for name, kind in _PARTS.items() if not isinstance(config[name], kind)]  # type: ignore[arg-type]
        wrong += [] if wrong or not config["region"] else [f"region.{name}" for name in misdescribed(config["region"])]
    except FileNotFoundError:
        raise _refused(folder, "missing", CONFIG) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(folder, CONFIG, f"{type(error).__name__}: {first_line(error)}") from error
    if wrong:
        raise _refused(folder, f"wrong in {CONFIG}", ", ".join(wrong))
    return config


def _weights(folder: Path, expected: Mapping[str, torch.Tensor], digest: str | None) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU: of the names and shapes that are expected, and as they were saved."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES))
        raise _refused(folder, "pickled, so not read" if pickles else "missing", pickles or WEIGHTS)
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as stream:  # as torch.save's archive or a bare pickle begins
            pickled = stream.read(2).startswith((b"PK", b"\x80"))
        what = "a renamed pickle, so not read" if pickled else f"{WEIGHTS} is truncated or corrupted"
        raise _refused(folder, what, WEIGHTS if pickled else first_line(error)) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shapes != wanted:
        seen = dict.fromkeys(wanted.keys() - shapes.keys(), "missing")
        seen |= dict.fromkeys(shapes.keys() - wanted.keys(), "unknown")
        both = [name for name in wanted.keys() & shapes.keys() if shapes[name] != wanted[name]]
        seen |= {name: f"{shape(shapes[name])}, not {shape(wanted[name])}" for name in both}
        raise AdaptorError(
            f"{WEIGHTS} holds the tensors of {CONFIG}'s adaptor",
            seen={"folder": folder, **dict(sorted(seen.items())[:5])},
            do="take both files from the same save_pretrained",
        )
    if digest is not None and _digest(file) != digest:
        raise _refused(folder, WEIGHTS, f"was altered after it was saved: its SHA-256 is not {CONFIG}'s")
    return load_file(file)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _refused(folder: Path, what: str, seen: str) -> AdaptorError:
    return AdaptorError(
        _WHAT, seen={"folder": folder, what: seen}, do="save the adaptor again with save_pretrained(folder)"
    )

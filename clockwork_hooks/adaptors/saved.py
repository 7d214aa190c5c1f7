"""A module that is saved as safetensors and JSON, and comes back as it was or not at all."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.repocard import ModelCard
from torch import nn

from clockwork_hooks._version import __version__
from clockwork_hooks.adaptors import files
from clockwork_hooks.errors import AdaptorError

__all__ = ["SavedAdaptor"]

Self = TypeVar("Self", bound="SavedAdaptor")

BUILT_IN = {"ResNetAdaptor": "resnet", "ScaledResNetAdaptor": "scaled", "UNetAdaptor": "unet"}
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
        files.write(save_directory, config, self.state_dict())

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
        folder = files.fetch(pretrained_model_name_or_path, **hub)
        config = files.read_config(folder)
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
                f"the arguments in {files.CONFIG} make an adaptor",
                seen={"folder": folder, "class": kind.__name__, "error": f"{type(error).__name__}: {error}"},
                do="save the adaptor again with save_pretrained(folder)",
            ) from error
        weights = files.read_weights(folder, made.state_dict(), config.get("weights_sha256"))
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

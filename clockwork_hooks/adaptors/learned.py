"""What the learned adaptors share: their inputs, the identity they start as, and how they are saved and loaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.repocard import ModelCard
from torch import nn

from clockwork_hooks._version import __version__
from clockwork_hooks.adaptors import files, origin
from clockwork_hooks.adaptors.layers import fit, vector, vector_width
from clockwork_hooks.adaptors.layout import Layout
from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import AdaptorError, ArgumentError
from clockwork_hooks.report import shape

__all__ = ["LearnedAdaptor"]

Self = TypeVar("Self", bound="LearnedAdaptor")

INPUTS = ("entry", "exit", "text")
BUILT_IN = {"ResNetAdaptor": "resnet"}
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


class LearnedAdaptor(
    nn.Module,
    ModelHubMixin,
    library_name="clockwork_hooks",
    tags=["clockwork-diffusion", "diffusion", "feature-caching"],
    paper_url="https://arxiv.org/abs/2312.08128",
    model_card_template=CARD,
):
    """Predicts the exit as the exit of the step before plus a learned difference, which starts at zero.

    Subclasses take the keyword arguments below and those of their own (values that JSON holds), pass all of them on
    to `super().__init__`, and define `difference`, of which the last layer starts at zero. A fresh adaptor then is
    the identity, bit for bit.

    Args:
        exit: layout of the exit.
        entry: layout of the entry; None to do without it.
        time: width of the time embedding; None to do without it.
        text: width of the text embedding; None to do without it.
        sees_exit: the features given to `difference` include the exit of the step before. Where they do not, nothing
            is added to that exit either: the whole exit is predicted.
        **own: the arguments of the subclass, for the configuration.

    Attributes:
        region: the region that the adaptor was made for, as `config.json` holds it; None where it knows of none.
        facts: what else should be saved: the sampler, the number of steps, the clock it was trained for. JSON only.

    Source: arXiv 2312.08128, Sec. 4.2.
    """

    def __init__(
        self,
        *,
        exit: Layout | Mapping[str, Any],
        entry: Layout | Mapping[str, Any] | None = None,
        time: int | None = None,
        text: int | None = None,
        sees_exit: bool = True,
        **own: Any,
    ) -> None:
        super().__init__()
        self.exit, self.entry = Layout.of(exit), None if entry is None else Layout.of(entry)
        self.time_width, self.text_width, self.sees_exit = time, text, sees_exit
        self.region: dict[str, Any] | None = None
        self.facts: dict[str, Any] = {}
        self._own = own
        if self.entry is None and not sees_exit:
            raise ArgumentError(
                "an adaptor reads the entry, the exit of the step before, or both",
                seen={"entry": None, "sees_exit": sees_exit},
                do='pass inputs=("entry", "exit", "text")',
            )
        if self.entry is not None and self.entry.rank != self.exit.rank:
            raise AdaptorError(
                "entry and exit have the same number of spatial axes",
                seen={"entry": shape(self.entry.space), "exit": shape(self.exit.space)},
                do='do without the entry: for_region(region, inputs=("exit", "text"))',
            )

    @classmethod
    def for_region(cls: type[Self], region: Region, *, inputs: Collection[str] = INPUTS, **own: Any) -> Self:
        """An adaptor that fits the region, sized by it.

        What cannot be picked up at the region's edge (`region.inputs` lists what can) is left out.

        Args:
            region: from `find_region`.
            inputs: which of "entry", "exit" and "text" the adaptor reads (the paper's Tab. 5); the time embedding is
                read wherever there is one.
            **own: options of the kind of adaptor; what is None or left out follows from the region.

        Raises:
            ArgumentError: `inputs` names something else, or nothing that the region has.
            AdaptorError: the region's edge is laid out in a way that no adaptor of this kind reads.
        """
        unknown = [name for name in inputs if name not in INPUTS]
        if unknown or isinstance(inputs, str):
            raise ArgumentError(
                f"inputs are some of {', '.join(INPUTS)}", seen={"inputs": inputs}, do='pass inputs=("entry", "exit")'
            )
        given = region.inputs
        if "exit" not in inputs and not ("entry" in inputs and "entry" in given):
            raise ArgumentError(
                "an adaptor reads the entry, the exit of the step before, or both",
                seen={"inputs": tuple(inputs), "the region's entry": "none" if "entry" not in given else "there"},
                do='pass inputs=("exit", "text")',
            )
        made = cls(
            exit=Layout.of_boundary(region.exit),
            entry=Layout.of_boundary(region.entry) if "entry" in inputs and "entry" in given else None,
            time=vector_width(given.get("time", ())),
            text=vector_width(given.get("text", ())) if "text" in inputs else None,
            sees_exit="exit" in inputs,
            **own,
        )
        made.region = origin.describe(region)
        return made

    @property
    def channels(self) -> int:
        """Channels of the features that `difference` is given."""
        return (self.entry.channels if self.entry else 0) + (self.exit.channels if self.sees_exit else 0)

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """What is added to the exit of the step before.

        Args:
            x: (B, channels, *space), the entry and the exit of the step before.
            time: (1 or B, D) or None.
            text: likewise.

        Returns:
            (B, channels of the exit, *space).
        """
        raise NotImplementedError

    def forward(
        self,
        entry: torch.Tensor | None,
        exit_cached: torch.Tensor,
        *,
        time: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the exit; see `Adaptor`."""
        before = self.exit.to_map(exit_cached)
        dtype, rows = next(self.parameters()).dtype, before.shape[0]
        read = [before] if self.sees_exit else []
        if self.entry is not None:
            if entry is None:
                raise AdaptorError(
                    "this adaptor reads the region's entry",
                    seen={"entry": None},
                    do='make one without it: for_region(region, inputs=("exit", "text"))',
                )
            read.insert(0, fit(self.entry.to_map(entry), tuple(before.shape[2:])))
        x = torch.cat(read, 1).to(dtype)
        given = [
            vector(value, width, rows, name)
            for value, width, name in ((time, self.time_width, "time"), (text, self.text_width, "text"))
        ]
        made = self.difference(x, *(None if value is None else value.to(dtype) for value in given))
        made = made.to(before.dtype)
        return self.exit.from_map(before + made if self.sees_exit else made)

    # -- the region --------------------------------------------------------------------------------------------------

    @property
    def region_options(self) -> dict[str, Any]:
        """The options of `find_region` that find the region it was made for; `wrap` uses them."""
        return origin.options(self.region)

    def check_region(self, region: Region) -> None:
        """See that this is the region that the adaptor was made for; `wrap` asks, once the region is known.

        Raises:
            AdaptorError: it is not; names what differs.
        """
        found = origin.differences(self.region, region) if self.region else {}
        given = region.inputs
        for name, mine, boundary in (("exit", self.exit, region.exit), ("entry", self.entry, region.entry)):
            if mine is None:
                continue
            if name == "entry" and "entry" not in given:
                found["entry"] = f"{mine.channels} channels → cannot be picked up"
                continue
            here = Layout.of_boundary(boundary)
            for part in ("order", "rank", "channels"):
                was, now = getattr(mine, part), getattr(here, part)
                if was != now:
                    found[f"{name} {part}"] = f"{was} → {now}"
        for name, width in (("time", self.time_width), ("text", self.text_width)):
            wide = vector_width(given.get(name, ()))
            if width is not None and wide != width:
                found[f"{name} width"] = f"{width} → {wide or 'none'}"
        if found:
            raise AdaptorError(
                "an adaptor serves the region that it was made for",
                seen={"adaptor": type(self).__name__, "region": region.line, **found},
                do="pass the region it was made for (region=ch.find_region(unet, …)), or train one for this region",
            )

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make an adaptor of the same shape, as JSON can hold them."""
        layouts = {"exit": self.exit, "entry": self.entry}
        plain = {
            name: None if one is None else {"channels": one.channels, "space": list(one.space), "order": one.order}
            for name, one in layouts.items()
        }
        return {**plain, "time": self.time_width, "text": self.text_width, "sees_exit": self.sees_exit, **self._own}

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


def _kind(name: str) -> type[LearnedAdaptor] | None:
    """The class of that name, among ours and those that the user has imported."""
    if name in BUILT_IN:
        found: type[LearnedAdaptor] = getattr(
            importlib.import_module(f"clockwork_hooks.adaptors.{BUILT_IN[name]}"), name
        )
        return found
    kinds = LearnedAdaptor.__subclasses__()
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == name), None)

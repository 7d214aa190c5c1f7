"""What the learned adaptors share: their inputs, their size, the identity that they start as, and their layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from clockwork_hooks._numbers import shape
from clockwork_hooks.adaptors.saved import SavedAdaptor
from clockwork_hooks.errors import AdaptorError, ArgumentError
from clockwork_hooks.regions.region import Layout, Region
from clockwork_hooks.regions.saved import described_region, name_advice, region_differences, saved_options

__all__ = [
    "LearnedAdaptor",
    "ResBlock",
    "conv",
    "cropped",
    "down",
    "fit",
    "norm",
    "padded",
    "up",
    "vector",
    "vector_width",
    "zero",
]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class ResBlock(nn.Module):
    """Two convolutions with normalisation in front, the time added between them, and a skip.

    Args:
        rank: spatial axes.
        inner: channels in.
        outer: channels out.
        time: width of the time embedding; None for none.
    """

    def __init__(self, rank: int, inner: int, outer: int, time: int | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inner), conv(rank, inner, outer, 3)
        self.time = None if time is None else nn.Linear(time, outer)
        self.norm2, self.conv2 = norm(outer), conv(rank, outer, outer, 3)
        self.skip = nn.Identity() if inner == outer else conv(rank, inner, outer, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """(B, inner, *space), (B, time) → (B, outer, *space)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            h = h + spread(self.time(functional.silu(time)), h)
        return self.skip(x) + self.conv2(functional.silu(self.norm2(h)))  # type: ignore[no-any-return]


def conv(rank: int, inner: int, outer: int, kernel: int) -> nn.Module:
    """A convolution that keeps the size; an odd kernel."""
    layer: nn.Module = _CONV[rank](inner, outer, kernel, padding=kernel // 2)
    return layer


def down(rank: int, inner: int, outer: int) -> nn.Module:
    """Half the size: kernel 4, stride 2."""
    layer: nn.Module = _CONV[rank](inner, outer, 4, 2, 1)
    return layer


def up(rank: int, inner: int, outer: int) -> nn.Module:
    """Twice the size: transposed, kernel 4, stride 2."""
    layer: nn.Module = _UP[rank](inner, outer, 4, 2, 1)
    return layer


def norm(channels: int) -> nn.Module:
    """Group normalisation with the usual 32 groups; fewer where they do not divide, or would hold under 4 channels.

    A group of one channel would normalise the last position of a deep level to nothing.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a layer that adds nothing yet."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """The map with its last rows repeated until every spatial size is a multiple."""
    missing = [-size % multiple for size in x.shape[2:]]
    if not any(missing):
        return x
    return functional.pad(x, [amount for m in reversed(missing) for amount in (0, m)], mode="replicate")


def cropped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The map without what `padded` added: as large as `like`."""
    for axis, size in enumerate(like.shape[2:], 2):
        x = x.narrow(axis, 0, size)
    return x


def fit(x: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    """The map at another size: averaged where it shrinks, repeated where it grows."""
    return x if tuple(x.shape[2:]) == space else functional.interpolate(x, size=space, mode="area")


def spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, C) over the positions of a map: (B, C, 1, …)."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - 2))


def vector_width(sizes: tuple[int, ...]) -> int | None:
    """Width of what `vector` makes of a tensor of this shape; None where it makes nothing of it."""
    if len(sizes) > 2 and math.prod(sizes[2:]) == 1:
        sizes = sizes[:2]
    return sizes[-1] if len(sizes) in (2, 3) and sizes[-1] > 1 else None


def vector(x: torch.Tensor | None, width: int | None, rows: int, name: str) -> torch.Tensor | None:
    """One vector a row from an embedding (B, D) or (B, D, 1, …), or from tokens (B, L, D), which are averaged.

    Args:
        x: the embedding.
        width: D; None leaves the embedding out.
        rows: B of the features. A clip's embedding serves all its frames, where these are folded into the batch.
        name: "time" or "text", for the error.

    Raises:
        AdaptorError: it is missing, or of another width, or its rows do not go into those of the features.
    """
    if width is None:
        return None
    if x is None or vector_width(tuple(x.shape)) != width or rows % x.shape[0]:
        raise AdaptorError(
            f"the {name} embedding is as in the region that the adaptor was made for",
            seen={
                "adaptor": f"{name} of width {width}, {rows} rows or a part of them",
                "got": "none" if x is None else shape(x.shape),
            },
            do="call the UNet with the same conditions, or make an adaptor for this call: for_region(region)",
        )
    if x.ndim > 2:
        x = x.flatten(1) if math.prod(x.shape[2:]) == 1 else x.mean(1)
    return x if x.shape[0] in (1, rows) else x.repeat_interleave(rows // x.shape[0], 0)


Self = TypeVar("Self", bound="LearnedAdaptor")

INPUTS = ("entry", "exit", "text")


class LearnedAdaptor(SavedAdaptor):
    """Predicts the exit as the exit of the step before plus a learned difference, which starts at zero.

    Subclasses take the keyword arguments below and those of their own (values that JSON holds), pass these on as
    `own`, and define `difference`, of which the last layer starts at zero. A fresh adaptor then is the identity, bit
    for bit.

    Args:
        exit: layout of the exit.
        entry: layout of the entry; None to do without it.
        time: width of the time embedding; None to do without it.
        text: width of the text embedding; None to do without it.
        sees_exit: the features given to `difference` include the exit of the step before. Where they do not, nothing
            is added to that exit either: the whole exit is predicted.
        own: the subclass's own arguments by name, for the configuration.

    Source: arXiv 2312.08128, Sec. 4.2.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        exit: Layout | Mapping[str, Any],
        entry: Layout | Mapping[str, Any] | None = None,
        time: int | None = None,
        text: int | None = None,
        sees_exit: bool = True,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.exit, self.entry = Layout.of(exit), None if entry is None else Layout.of(entry)
        self.time_width, self.text_width, self.sees_exit = time, text, sees_exit
        self._own = dict(own or {})
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
            ArgumentError: `inputs` names something else, or nothing that the region has; or the kind of adaptor has no
                such option.
            AdaptorError: the region's edge is laid out in a way that no adaptor of this kind reads.
        """
        unknown = [name for name in inputs if name not in INPUTS]
        if unknown or isinstance(inputs, str):
            raise ArgumentError(
                f"inputs are some of {', '.join(INPUTS)}", seen={"inputs": inputs}, do='pass inputs=("entry", "exit")'
            )
        options = inspect.signature(cls.sized).parameters
        strange = [name for name in own if name not in options]
        if strange and all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in options.values()):
            raise ArgumentError(
                f"{cls.__name__} has options of its own",
                seen={"unknown": ", ".join(strange)},
                do=f"pass some of inputs, {', '.join(name for name in options if name != 'channels')}",
            )
        present = region.inputs
        if "exit" not in inputs and not ("entry" in inputs and "entry" in present):
            raise ArgumentError(
                "an adaptor reads the entry, the exit of the step before, or both",
                seen={"inputs": tuple(inputs), "the region's entry": "none" if "entry" not in present else "there"},
                do='pass inputs=("exit", "text")',
            )
        exit = Layout.of_boundary(region.exit)
        try:
            channels = Layout.of_boundary(region.entry).channels
        except AdaptorError:  # then nothing but the size is lost: an entry that is read raises below
            channels = exit.channels
        adaptor = cls(
            exit=exit,
            entry=Layout.of_boundary(region.entry) if "entry" in inputs and "entry" in present else None,
            time=vector_width(present.get("time", ())),
            text=vector_width(present.get("text", ())) if "text" in inputs else None,
            sees_exit="exit" in inputs,
            **cls.sized(channels, **own),
        )
        adaptor.region = described_region(region)
        return adaptor

    @classmethod
    def sized(cls, channels: int, **own: Any) -> dict[str, Any]:
        """The options of this kind, with those left out or None filled in.

        Args:
            channels: of the region's entry.
            **own: as given to `for_region`.
        """
        return own

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
            if entry.shape[0] != rows:
                raise AdaptorError(
                    "entry and exit have the same rows",
                    seen={"entry": shape(entry.shape), "exit": shape(exit_cached.shape)},
                    do='do without the entry: for_region(region, inputs=("exit", "text"))',
                )
        x = torch.cat(read, 1).to(dtype)
        vectors = [
            vector(value, width, rows, name)
            for value, width, name in ((time, self.time_width, "time"), (text, self.text_width, "text"))
        ]
        difference = self.difference(x, *(None if value is None else value.to(x) for value in vectors))
        difference = difference.to(before.dtype)
        return self.exit.from_map(before + difference if self.sees_exit else difference)

    # -- the region --------------------------------------------------------------------------------------------------

    @property
    def region_options(self) -> dict[str, Any]:
        """The options of `Choice` that find the region it was made for; `wrap` and `distill` use them."""
        return saved_options(self.region)

    def check_region(self, region: Region) -> None:
        """See that this is the region that the adaptor was made for; `wrap` asks, once the region is known.

        Raises:
            AdaptorError: it is not; names what differs.
        """
        differences = region_differences(self.region, region) if self.region else {}
        present = region.inputs
        for name, mine, boundary in (("exit", self.exit, region.exit), ("entry", self.entry, region.entry)):
            if mine is None:
                continue
            if name == "entry" and "entry" not in present:
                differences["entry"] = f"{mine.channels} channels → cannot be picked up"
                continue
            here = Layout.of_boundary(boundary)
            for part in ("order", "rank", "channels"):
                was, now = getattr(mine, part), getattr(here, part)
                if was != now:
                    differences[f"{name} {part}"] = f"{was} → {now}"
        for name, width in (("time", self.time_width), ("text", self.text_width)):
            wide = vector_width(present.get(name, ()))
            if width is not None and wide != width:
                differences[f"{name} width"] = f"{width} → {wide or 'none'}"
        if differences:
            raise AdaptorError(
                "an adaptor serves the region that it was made for",
                seen={"adaptor": type(self).__name__, "region": region.line, **differences},
                do="pass the region it was made for (region=ch.find_region(unet, …)), or train one for this region"
                + name_advice(self.region),
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make an adaptor of the same shape, as JSON can hold them."""
        layouts = {"exit": self.exit, "entry": self.entry}
        plain = {
            name: None if one is None else {"channels": one.channels, "space": list(one.space), "order": one.order}
            for name, one in layouts.items()
        }
        return {**plain, "time": self.time_width, "text": self.text_width, "sees_exit": self.sees_exit, **self._own}

"""The adaptors that are trained to stand in: the paper's two, and ours for exits that shrink.

What they share is in `LearnedAdaptor`: their inputs, their size, and the identity that they start as.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from clockwork_hooks._numbers import shape
from clockwork_hooks.adaptors.saved import SavedAdaptor
from clockwork_hooks.errors import AdaptorError, ArgumentError, whole
from clockwork_hooks.regions.region import Layout, Region
from clockwork_hooks.regions.saved import described_region, name_advice, region_differences, saved_options

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
            f"the {name} embedding must have the width and rows that the adaptor was made for",
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
                f"{cls.__name__} takes only its own options",
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
                    "entry and exit must have the same number of rows",
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


class ResNetAdaptor(LearnedAdaptor):
    """A strided convolution, the text, two residual blocks with the time, a transposed convolution, and a residual.

    No attention; on SD v1.5 with the paper's cut 13.6M parameters and 7.3 GFLOPs a sample. The residual from input to
    output is the identity on the exit of the step before plus a 1×1 convolution; that and the transposed convolution
    start at zero, so a fresh adaptor returns the exit of the step before, bit for bit.

    Args:
        width: channels inside; `for_region` takes the entry's.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> import clockwork_hooks as ch
        >>> unet, args, kwargs = load_model("sd15")
        >>> region = ch.find_region(unet, *args, cut="paper", **kwargs)
        >>> with torch.device("meta"):
        ...     adaptor = ResNetAdaptor.for_region(region)
        >>> adaptor.width, sum(parameter.numel() for parameter in adaptor.parameters())
        (320, 13564160)

    Source: arXiv 2312.08128, Sec. 4.2 and Fig. 3.
    """

    def __init__(self, *, width: int, **inputs: Any) -> None:
        whole("width", width, least=1)
        super().__init__(own={"width": width}, **inputs)
        rank, outer = self.exit.rank, self.exit.channels
        self.width = width
        self.down = down(rank, self.channels, width)
        self.text = None if self.text_width is None else nn.Linear(self.text_width, width)
        self.block1 = ResBlock(rank, width, width, self.time_width)
        self.block2 = ResBlock(rank, width, width, self.time_width)
        self.up = zero(up(rank, width, outer))
        self.residual = conv(rank, self.channels, outer, 1)
        if self.sees_exit:
            zero(self.residual)

    @classmethod
    def sized(cls, channels: int, *, width: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """As wide as the entry."""
        return {"width": channels if width is None else width}

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        h = self.down(padded(x, 2))
        if self.text is not None and text is not None:
            h = h + spread(self.text(text), h)
        h = self.up(self.block2(self.block1(h, time), time))
        return cropped(h, x) + self.residual(x)  # type: ignore[no-any-return]


class ScaledResNetAdaptor(ResNetAdaptor):
    """`ResNetAdaptor` on the cached exit divided by its own size, with a gain for each channel that the time sets.

    What a region emits can shrink a hundredfold along a trajectory: in the demo model from a standard deviation of 156
    at the first of eight steps to 1.8 at the last. So the exit of the step before is not only old but also too large,
    and by a factor that depends on the step. The paper's residual, a 1×1 convolution, is the same at every step; here
    the time embedding sets a gain for each channel of the cached exit and for each channel of what is added, and the
    convolutions see numbers of order one. Our own addition; the MACs are those of `ResNetAdaptor`. A fresh adaptor
    returns the exit of the step before, bit for bit.

    Args:
        width: channels inside; `for_region` takes the entry's.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> adaptor = ScaledResNetAdaptor(width=8, exit={"channels": 4, "space": (8, 8)}, time=6)
        >>> cached = 1000 * torch.randn(2, 4, 8, 8)
        >>> torch.equal(adaptor(None, cached, time=torch.randn(2, 6)), cached)
        True

    Source: after arXiv 2312.08128, Sec. 4.2; the scaling is not in the paper.
    """

    def __init__(self, *, width: int, **inputs: Any) -> None:
        super().__init__(width=width, **inputs)
        self.gain = None if self.time_width is None else zero(nn.Linear(self.time_width, 2 * self.exit.channels))

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        before, size = None, None
        if self.sees_exit:
            before = x[:, -self.exit.channels :]
            axes = tuple(range(1, x.ndim))
            size = before.float().square().mean(axes, keepdim=True).sqrt().clamp_min(1e-6).to(x.dtype)
            x = torch.cat([x[:, : -self.exit.channels], before / size], 1)
        difference = super().difference(x, time, text)
        if size is not None:
            difference = difference * size
        if self.gain is None or time is None:
            return difference
        gain, scale = (spread(part, x) for part in self.gain(functional.silu(time)).chunk(2, 1))
        difference = difference * (1 + scale)
        return difference if before is None else difference + gain * before


LEVELS = 2


class UNetAdaptor(LearnedAdaptor):
    """A strided convolution, the text, two down modules, a middle, two up modules, a transposed convolution.

    No attention. The paper gives the width, the blocks in the middle and the totals, 152M parameters and 18.5 GFLOPs a
    sample (light: 3M, 1); our reading of the rest comes to 155M and 17.6 GFLOPs (light: 4.5M, 1.4) on SD v1.5 with
    the paper's cut. The last layer starts at zero, so a fresh adaptor returns the exit of the step before.

    Args:
        width: channels; `for_region` takes twice the entry's (640 on SD v1.5), light 0.3 of them (96).
        middle: residual blocks in the middle.
        blocks: residual blocks of each down and each up module.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> import clockwork_hooks as ch
        >>> unet, args, kwargs = load_model("sd15")
        >>> region = ch.find_region(unet, *args, cut="paper", **kwargs)
        >>> with torch.device("meta"):
        ...     adaptor, light = UNetAdaptor.for_region(region), UNetAdaptor.for_region(region, light=True)
        >>> (adaptor.width, adaptor.middle), (light.width, light.middle)
        ((640, 4), (96, 2))

    Source: arXiv 2312.08128, Tab. 3 and App. B.
    """

    def __init__(self, *, width: int, middle: int = 4, blocks: int = 2, **inputs: Any) -> None:
        if not all(type(count) is int and 1 <= count <= 64 for count in (middle, blocks)):
            raise ArgumentError(
                "an adaptor has 1 to 64 blocks in the middle and in each module",
                seen={"middle": middle, "blocks": blocks},
                do="pass middle=4, blocks=2",
            )
        whole("width", width, least=1)
        super().__init__(own={"width": width, "middle": middle, "blocks": blocks}, **inputs)
        self.width, self.middle, self.blocks = width, middle, blocks
        rank = self.exit.rank
        timed = None if self.time_width is None else width

        def several(count: int, inner: int) -> list[nn.Module]:
            return [ResBlock(rank, inner, width, timed) for _ in range(count)]

        self.stem = down(rank, self.channels, width)
        self.text = None if self.text_width is None else nn.Linear(self.text_width, width)
        self.time = None if self.time_width is None else nn.Linear(self.time_width, width)
        descent = ([down(rank, width, width), *several(blocks, width)] for _ in range(LEVELS))
        ascent = ([*several(blocks, 2 * width), up(rank, width, width)] for _ in range(LEVELS))
        self.downs = nn.ModuleList(chain.from_iterable(descent))
        self.body = nn.ModuleList(several(middle, width))
        self.ups = nn.ModuleList(chain.from_iterable(ascent))
        self.last = zero(up(rank, width, self.exit.channels))

    @classmethod
    def sized(  # type: ignore[override]
        cls,
        channels: int,
        *,
        width: int | None = None,
        middle: int | None = None,
        blocks: int | None = None,
        light: bool = False,
    ) -> dict[str, Any]:
        """The paper's sizes, in proportion to the entry's channels."""
        usual = (max(8, round(0.3 * channels / 8) * 8), 2, 1) if light else (2 * channels, 4, 2)
        own = {"width": width, "middle": middle, "blocks": blocks}
        return {name: one if own[name] is None else own[name] for name, one in zip(own, usual, strict=True)}

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        h = self.stem(padded(x, 2 ** (LEVELS + 1)))
        if self.text is not None and text is not None:
            h = h + spread(self.text(text), h)
        if self.time is not None and time is not None:
            time = self.time(time)
        skips: list[torch.Tensor] = []
        for layer in self.downs:
            if isinstance(layer, ResBlock):
                h = layer(h, time)
                skips.append(h)
            else:
                h = layer(h)
        for block in self.body:
            h = block(h, time)
        for layer in self.ups:
            h = layer(torch.cat([h, skips.pop()], 1), time) if isinstance(layer, ResBlock) else layer(h)
        return cropped(self.last(h), x)

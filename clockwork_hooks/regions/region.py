"""A region: what it skips, what crosses its edge and how that is laid out, what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from clockwork_hooks._numbers import macs, quantity, shape
from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.regions.cut import CutPlan, SkippedCall
from clockwork_hooks.regions.fingerprint import digest
from clockwork_hooks.reports.report import Report, plain

if TYPE_CHECKING:
    from clockwork_hooks.reports.tables import Table
    from clockwork_hooks.reports.u_drawing import Diagram


@dataclass(frozen=True, slots=True)
class Boundary:
    """A tensor that flows into or out of a region (the paper's r_in and r_out).

    Attributes:
        path: dotted path of the module that returns it (the innermost); of the module around it where none does.
        call: which of that module's calls, from 0.
        paths: every module that returns this very tensor, innermost first; empty where a parent computes it.
        shape: as traced, with the batch.
        dtype: as traced.
        resolution: spatial shape, e.g. (64, 64).
        node: its operator's place in the trace.

    Example:
        >>> import clockwork_hooks as ch
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> region = ch.find_region(unet, *args, **kwargs)
        >>> region.exit.path, region.exit.shape, region.exit.resolution
        ('up_blocks.2.upsamplers.0.conv', (1, 256, 32, 32), (32, 32))
    """

    path: str
    call: int
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    resolution: tuple[int, ...]
    node: int = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Side:
    """A tensor that feeds the region and does not depend on the sample.

    Attributes:
        kind: "time" if it comes from the time input, "context" if from another input, "constant" otherwise.
        inputs: paths of the inputs it comes from.
        path: module it comes out of; "" for an input itself.
        shape: as traced.
        dtype: as traced.
        node: its operator's place in the trace.

    Example:
        >>> import clockwork_hooks as ch
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> region = ch.find_region(unet, *args, **kwargs)
        >>> [(side.kind, side.inputs, side.path, side.shape) for side in region.sides]
        [('time', ('timestep',), 'time_embedding.linear_2', (1, 512))]
    """

    kind: Literal["time", "context", "constant"]
    inputs: tuple[str, ...]
    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    node: int = field(repr=False, compare=False)


def seal(structure: str, data: Mapping[str, Any]) -> str:
    """The digest of a UNet's structure and of all that a file says of a region of it."""
    facts = {name: value for name, value in data.items() if name not in ("schema", "passes")}
    passes = {name: value for name, value in data["passes"].items() if name != "seal"}
    return digest(structure, plain(facts), plain(passes))


def _texts(signature: tuple[Any, ...]) -> tuple[str, ...]:
    """An input signature as JSON can hold it: shapes, dtypes, devices, the names of types."""
    return tuple(_text(part) for part in signature)


def _text(part: Any) -> str:
    if isinstance(part, type):
        return f"type {part.__module__}.{part.__qualname__}"
    return f"({', '.join(map(_text, part))})" if isinstance(part, tuple) else f"{type(part).__name__} {part}"


@dataclass(frozen=True, slots=True)
class Region(Report):
    """The low-resolution subgraph that adaptor passes skip.

    Attributes:
        model: class name of the UNet.
        entry: the tensor an adaptor reads: of several, the latest of full size.
        exit: the tensor an adaptor predicts.
        entries: all tensors that flow in and depend on the sample.
        sides: tensors that flow in and do not: time embedding, text, masks.
        level: 1 below the highest resolution, 2 below the next; 0 for a region named by hand.
        cut: "outer", "paper" or "hand".
        resolution: spatial shape at the edge.
        bottleneck: smallest spatial shape inside.
        skipped: the module calls that adaptor passes do not run.
        leftover: operators of parent modules inside the region that still run, on placeholders, with their counts.
        sample: path of the input it depends on.
        times: paths of the inputs that may be the time, best first.
        residuals: paths of the inputs that are only added to feature maps, as a ControlNet's outputs are: like the
            sample, they change in every step and tell no branch.
        unread: paths of the tensor inputs that no operator of the traced call has read.
        scratch: dotted paths of the buffers that the traced call overwrites before it reads them: what is skipped may
            be written there, as it comes into no later call.
        uncounted: operators of the traced call that are in no count of MACs, which then are lower bounds.
        full_macs: multiply-accumulates of a full pass, attention products counted, at the traced batch.
        macs: those of the skipped calls.
        macs_share: their share of a full pass.
        parameters: number of parameters of the skipped modules.
        parameter_share: their share of the UNet's.
        by_level: (spatial shape, MACs on the way down, MACs on the way up) inside, widest first.
        inner: the same region without the downsampler into it and the upsampler out of it (the paper's cut).
        fingerprint: equal for the same region of the same architecture at any batch, size, dtype and device.
        structure: the digest of the UNet that it was found in (`regions/fingerprint.py`); "" where it holds for none.
        cut_plan: what a pass looks up at every call (`regions/cut.py`).
        signature: shapes, dtypes and devices of the traced call's arguments.
    """

    SCHEMA = "region/1"

    model: str
    entry: Boundary
    exit: Boundary
    entries: tuple[Boundary, ...]
    sides: tuple[Side, ...]
    level: int
    cut: str
    resolution: tuple[int, ...]
    bottleneck: tuple[int, ...]
    leftover: tuple[tuple[str, int], ...]
    sample: str
    times: tuple[str, ...]
    full_macs: int
    macs: int
    macs_share: float
    parameters: int
    parameter_share: float
    by_level: tuple[tuple[tuple[int, ...], int, int], ...]
    fingerprint: str
    cut_plan: CutPlan = field(repr=False)
    signature: tuple[Any, ...] = field(repr=False, compare=False)
    residuals: tuple[str, ...] = field(default=(), repr=False, compare=False)
    unread: tuple[str, ...] = field(default=(), repr=False, compare=False)
    scratch: tuple[str, ...] = field(default=(), repr=False, compare=False)
    uncounted: tuple[str, ...] = field(default=(), repr=False, compare=False)
    inner: Region | None = field(default=None, repr=False, compare=False)
    structure: str = field(default="", repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def skipped(self) -> tuple[SkippedCall, ...]:
        """The module calls that adaptor passes do not run."""
        return self.cut_plan.skipped

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what an adaptor is given beside the exit, as traced: "entry", "time", "text"; what there is."""
        shapes = {name: port.shape for name, port in self.cut_plan.ports.items()}
        if shapes.pop("mask", None):  # the tokens are averaged where they are picked up
            shapes["text"] = (shapes["text"][0], shapes["text"][2])
        return shapes

    @property
    def line(self) -> str:
        """One line: where it is and what it saves."""
        return (
            f"{self.entry.path} → {self.exit.path}, {shape(self.resolution)} down to {shape(self.bottleneck)}, "
            f"{self.macs_share:.1%} of MACs, level {self.level}"
        )

    @property
    def not_skipped(self) -> str:
        """Which calls of the module that returns the exit still run, where one forward calls it more than once.

        So it is with guidance inside `forward`, which calls the same network twice: one of its passes is skipped.
        "" where all its calls are skipped.
        """
        path = next((call.path for call in self.skipped if call.exit[1] is not None), None)
        full, seen = (0, 0) if path is None else self.cut_plan.counts[path]
        runs = seen - sum(call.path == path for call in self.skipped)
        return f"{runs} of {full} calls of {path} in one forward" if runs else ""

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) in the order of printing."""
        sides = ", ".join(f"{side.kind} {shape(side.shape) or 'scalar'}" for side in self.sides) or "none"
        others = ", ".join(f"{e.path} {shape(e.shape)}" for e in self.entries if e.node != self.entry.node) or "none"
        return [
            ("entry", f"{self.entry.path} (call {self.entry.call}) {shape(self.entry.shape)}"),
            ("exit", f"{self.exit.path} (call {self.exit.call}) {shape(self.exit.shape)}"),
            ("other entries", others),
            ("resolution", f"{shape(self.resolution)} at the edge, {shape(self.bottleneck)} at the bottleneck"),
            ("level, cut", f"{self.level}, {self.cut}"),
            ("skipped calls", ", ".join(call.path for call in self.skipped)),
            *([("not skipped", self.not_skipped)] if self.not_skipped else []),
            ("side inputs", sides),
            ("leftover operators", ", ".join(f"{count} {name}" for name, count in self.leftover) or "none"),
            ("MACs", f"{quantity(self.macs, 'MACs')} ({self.macs_share:.1%} of a pass, attention products counted)"),
            ("parameters", f"{self.parameters / 1e6:.2f} M ({self.parameter_share:.1%})"),
            *([("lower bound", f"not counted: {', '.join(self.uncounted)}")] if self.uncounted else []),
            ("fingerprint", self.fingerprint),
        ]

    def __str__(self) -> str:
        return "\n".join([f"Region of {self.model}", *(f"  {name:<19}{value}" for name, value in self.rows())])

    def table(self) -> Table:
        """What it is, in two columns."""
        from clockwork_hooks.reports.tables import table

        return table(f"Region of {self.model}", ("", "value"), self.rows())

    def tables(self) -> tuple[Table, ...]:
        """What it is, and its MACs by level."""
        from clockwork_hooks.reports.tables import table

        rows = [(shape(space) or "no level", macs(down), macs(up)) for space, down, up in self.by_level]
        notes = ("Of the skipped calls, at the traced batch, attention products counted.",)
        return self.table(), table("By level", ("level", ">on the way down", ">on the way up"), rows, notes=notes)

    def figures(self) -> tuple[Diagram, ...]:
        """The region's levels as a U, below what runs on every pass; `ch.diagram` draws the whole UNet."""
        from clockwork_hooks.reports.u_drawing import Block, Diagram

        def block(arm: Literal["down", "up"], level: int, space: tuple[int, ...], own: int) -> Block:
            return Block(f"{arm}, {shape(space) or 'no level'}", level, arm, own, True, 1, 0, 0)

        rest = Block("all that runs on every pass", 0, "down", self.full_macs - self.macs, False, 1, 0, 0)
        rows = list(enumerate(self.by_level, 1))
        arms = [block("down", k, space, own) for k, (space, own, _) in rows if own or k == len(rows)]
        arms += [block("up", k, space, own) for k, (space, _, own) in reversed(rows) if own]
        levels = (self.resolution, *(space for space, _, _ in self.by_level))
        return (Diagram(self.model, levels, (rest, *arms), (), self),)

    def data(self) -> dict[str, Any]:
        """All fields; counts in units."""

        def edge(one: Boundary) -> dict[str, Any]:
            return {"path": one.path, "call": one.call, "shape": one.shape, "dtype": one.dtype}

        names = (
            "model level cut resolution bottleneck full_macs macs macs_share parameters parameter_share fingerprint "
            "sample times residuals"
        )
        return {
            **{name: getattr(self, name) for name in names.split()},
            "entry": edge(self.entry),
            "exit": edge(self.exit),
            "entries": [edge(one) for one in self.entries],
            "sides": [
                {name: getattr(one, name) for name in ("kind", "inputs", "path", "shape", "dtype")}
                for one in self.sides
            ],
            "skipped": [{"path": call.path, "ordinal": call.ordinal} for call in self.skipped],
            "leftover": [{"operator": name, "calls": calls} for name, calls in self.leftover],
            "by_level": [{"resolution": space, "down_macs": down, "up_macs": up} for space, down, up in self.by_level],
        }

    def to_dict(self) -> dict[str, Any]:
        """The report, and under "passes" what passes need: with it, `wrap(unet, region=file)` analyses nothing."""
        return {**Report.to_dict(self), "passes": self._passes()}

    def _passes(self) -> dict[str, Any] | None:
        """What passes need of the region; None where JSON cannot hold it, or it holds for no UNet as it stands."""
        plan = self.cut_plan.data()
        if plan is None or not self.structure:
            return None
        edges = (self.entry, self.exit, *self.entries)
        passes = {
            **plan,
            "signature": _texts(self.signature),
            "edges": [{"paths": edge.paths, "resolution": edge.resolution, "node": edge.node} for edge in edges],
            "sides": [side.node for side in self.sides],
            "unread": self.unread,
            "scratch": self.scratch,
            "uncounted": self.uncounted,
        }
        sealed: dict[str, Any] = plain({**passes, "seal": seal(self.structure, {**self.data(), "passes": passes})})
        return sealed

    def is_for(self, signature: tuple[Any, ...]) -> bool:
        """Was it found for calls of this input signature?"""
        return self.signature in (signature, _texts(signature))

    def draw(self) -> str:
        """The region as a text "U": a line a level, the bars as long as the MACs of its two arms.

        Example:
            >>> print(region.draw())  # doctest: +SKIP
            64×64  ┄┄ entry down_blocks.0.attentions.1 ┄┄ exit up_blocks.2.upsamplers.0.conv ┄┄
            32×32              ▇▇▇▇▇▇▇▇▇▇▇▇  34.03 GMACs │ 83.18 GMACs  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
        """
        width = 28
        largest = max((max(down, up) for _, down, up in self.by_level), default=1) or 1
        label = max(len(shape(space)) for space in (self.resolution, *(row[0] for row in self.by_level)))
        lines = [f"{shape(self.resolution):>{label}}  ┄┄ entry {self.entry.path} ┄┄ exit {self.exit.path} ┄┄"]
        for depth, (space, down, up) in enumerate(self.by_level):
            left, right = ("▇" * math.ceil(width * arm / largest) for arm in (down, up))
            arms = f"{left:>{width}} {quantity(down, 'MACs'):>12} │ {quantity(up, 'MACs'):<12} {right}"
            lines.append(f"{shape(space):>{label}}  {' ' * depth}{arms.rstrip()}")
        return "\n".join(lines)


Order = Literal["channels first", "channels last", "tokens", "tokens last"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of a boundary tensor.

    Attributes:
        channels: number of channels.
        space: spatial shape as traced, frames among it where they have an axis of their own.
        order: "channels first" (B, C, *space), "channels last" (B, *space, C), "tokens" (B, positions, C) or
            "tokens last" (B, C, positions).

    Example:
        >>> tokens = Layout(8, (4, 6), "tokens")
        >>> tokens.to_map(torch.zeros(2, 24, 8)).shape
        torch.Size([2, 8, 4, 6])
    """

    channels: int
    space: tuple[int, ...]
    order: Order = "channels first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", tuple(self.space))
        if self.order not in ("channels first", "channels last", "tokens", "tokens last"):
            raise AdaptorError(
                "a layout has one of four orders", seen={"order": self.order}, do='e.g. "channels first"'
            )

    @classmethod
    def of(cls, value: Layout | Mapping[str, Any]) -> Layout:
        """A layout, or the mapping that a configuration holds in its place."""
        return value if isinstance(value, Layout) else cls(**value)

    @classmethod
    def of_boundary(cls, boundary: Boundary) -> Layout:
        """Find the axes of a boundary tensor from its resolution.

        Raises:
            AdaptorError: no axis order fits.
        """
        sizes, space = boundary.shape, boundary.resolution
        first, last, count = sizes[2:], sizes[1:-1], math.prod(space)
        if space and len(sizes) >= 3:
            if first[-len(space) :] == space:
                return cls(sizes[1], first)
            if last[-len(space) :] == space:
                return cls(sizes[-1], last, "channels last")
            if len(sizes) == 3 and sizes[1] == count:
                return cls(sizes[2], space, "tokens")
            if len(sizes) == 3 and sizes[2] == count:
                return cls(sizes[1], space, "tokens last")
        raise AdaptorError(
            "a boundary is (B, C, *space), (B, *space, C), (B, positions, C) or (B, C, positions)",
            seen={"boundary": boundary.path, "shape": shape(sizes), "resolution": shape(space)},
            do="choose another region, or write an adaptor for this one",
        )

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.space)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as (B, C, *space).

        Raises:
            AdaptorError: it has other channels or another number of axes, or its tokens form no such grid.
        """
        axis = 1 if self.order in ("channels first", "tokens last") else -1
        flat = self.order.startswith("tokens")
        if x.ndim != (3 if flat else self.rank + 2) or x.shape[axis] != self.channels:
            raise AdaptorError(
                "a boundary tensor must have the layout that the adaptor was made for",
                seen={"adaptor": f"{self.channels} channels, {self.order}", "got": shape(x.shape)},
                do="make an adaptor for this region: for_region(region)",
            )
        x = x.movedim(axis, 1)
        return x.unflatten(2, self._grid(x.shape[2])) if flat else x

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_map`."""
        x = x.flatten(2) if self.order.startswith("tokens") else x
        return x if self.order in ("channels first", "tokens last") else x.movedim(1, -1)

    def _grid(self, count: int) -> tuple[int, ...]:
        """The grid of that many tokens: the traced one, or one of the same proportions."""
        scale = (count / math.prod(self.space)) ** (1 / self.rank)
        grid = tuple(round(size * scale) for size in self.space)
        if math.prod(grid) != count:
            raise AdaptorError(
                "tokens must form a grid with the proportions of the traced one",
                seen={"traced": shape(self.space), "tokens": count},
                do="make an adaptor for a region that was found at this size",
            )
        return grid

"""`flops_report`: what passes and trajectories cost, counted on the recorded graph per operator, module and level.

MACs are those of convolutions and matrix products, FLOPs are twice the MACs. Whether attention products are among them
is an option that every rendering names: the paper leaves them out (338.61 GMACs for SD v1.5), a GPU does not
(401.64 GMACs). A model on the meta device is counted without running anything; no number depends on a model's name.
`counting` counts calls as they really run, whoever changed the model: a peer's cache, a patched block, another sampler.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from clockwork_hooks._numbers import count, flops, macs, percent, shape
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.adaptors.stand_in import (
    AdaptorLike,
    as_module,
    check_region,
    is_identity,
    needs_of,
    region_options,
    resolve_adaptor,
)
from clockwork_hooks.errors import AdaptorError, ClockworkError, named, whole
from clockwork_hooks.graph.arguments import Binder
from clockwork_hooks.graph.operators import Handle, OperatorKind, kind, node_macs, operator_name
from clockwork_hooks.graph.operators import handles as counted_by
from clockwork_hooks.graph.recorder import Recorder
from clockwork_hooks.graph.tracing import Trace, module_paths, record
from clockwork_hooks.regions.blocks import diagram_of
from clockwork_hooks.regions.find import Choice, found_or_why, region_or_choice, skipped_nodes, split_options
from clockwork_hooks.regions.flow import Levels
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.reports.u_drawing import Diagram
from clockwork_hooks.schedule import Schedule


@dataclass(frozen=True, slots=True)
class OperatorMacs:
    """One operator of a full pass that multiplies and accumulates.

    Attributes:
        operator: "conv2d", "linear", "scaled_dot_product_attention", ...
        kind: what it is to the count.
        module: dotted path of the module it ran in; "" for the UNet itself.
        resolution: spatial shape of the level it works at; () before the first spatial operator (time embedding).
        macs: its MACs, all samples of the traced batch together.
        skipped: an adaptor pass does not run it.
    """

    operator: str
    kind: OperatorKind
    module: str
    resolution: tuple[int, ...]
    macs: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class Uncounted:
    """An operator that may multiply and accumulate, and that nothing here can count.

    Attributes:
        operator: its name.
        calls: how often it ran.
        modules: paths of the modules it ran in.
    """

    operator: str
    calls: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MacsRow:
    """One row of a view: a module, an operator or a level.

    Attributes:
        name: what the row sums up.
        full_macs: MACs in a full pass.
        adaptor_pass_macs: those that an adaptor pass runs too, without the adaptor's own; None without a region.
        operators: how many counted operators it sums up.
    """

    name: str
    full_macs: int
    adaptor_pass_macs: int | None
    operators: int


@dataclass(frozen=True, slots=True)
class FlopsReport(Report):
    """The cost of a UNet's passes and of a whole trajectory, with several views of one count.

    All MACs are for the batch that was traced; only the trajectory knows of guidance, which doubles the batch.

    Attributes:
        model: class name of the UNet.
        sample: shape of the traced sample, batch first.
        parameters: number of parameters of the UNet.
        attention: are attention products counted?
        norms: "fvcore" if its estimate for normalisations is added, else None.
        full_macs: one full pass.
        adaptor_macs: one call of the adaptor alone; 0 for the identity; None without a region.
        region: what adaptor passes skip; None if there is none.
        no_region: why there is none; "" otherwise.
        schedule: which steps are full.
        steps: denoising steps of a trajectory.
        guidance: classifier-free guidance: two samples a step for each one traced.
        operators: the operators that count, in the order they ran.
        uncounted: operators that may multiply and accumulate and are not counted.
        diagram: the UNet as a U, for pictures; its MACs always count attention products.
        depth: names of a module path that the view by module keeps.
    """

    SCHEMA = "flops/1"

    model: str
    sample: tuple[int, ...]
    parameters: int
    attention: bool
    norms: str | None
    full_macs: int
    adaptor_macs: int | None
    region: Region | None = field(repr=False)
    no_region: str
    schedule: Schedule
    steps: int
    guidance: bool
    operators: tuple[OperatorMacs, ...] = field(repr=False)
    uncounted: tuple[Uncounted, ...]
    diagram: Diagram | None = field(default=None, repr=False, compare=False)
    depth: int = field(default=2, repr=False, compare=False)

    @property
    def full_flops(self) -> int:
        """FLOPs of one full pass."""
        return 2 * self.full_macs

    @property
    def adaptor_pass_macs(self) -> int | None:
        """MACs of one adaptor pass, the adaptor included; None without a region."""
        if self.adaptor_macs is None:
            return None
        return self.adaptor_macs + sum(operator.macs for operator in self.operators if not operator.skipped)

    @property
    def adaptor_pass_flops(self) -> int | None:
        """FLOPs of one adaptor pass, the adaptor included; None without a region."""
        return None if self.adaptor_pass_macs is None else 2 * self.adaptor_pass_macs

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps, from 1, that run the whole UNet; of an adaptive schedule, those that do so for certain."""
        return tuple(step for step in range(1, self.steps + 1) if self.schedule.is_full(step))

    @property
    def full_trajectory_macs(self) -> int:
        """MACs of a trajectory without Clockwork: every step a full pass."""
        return self.steps * self.full_macs * (2 if self.guidance else 1)

    @property
    def full_trajectory_flops(self) -> int:
        """FLOPs of a trajectory without Clockwork."""
        return 2 * self.full_trajectory_macs

    @property
    def trajectory_macs(self) -> int | None:
        """MACs of a trajectory: full and adaptor passes as the schedule says; None without a region.

        Of an adaptive schedule the most there can be: it may find every step to be full.
        """
        return self._trajectory(self.schedule.bounds(self.steps)[1])

    @property
    def least_trajectory_macs(self) -> int | None:
        """The same, but of an adaptive schedule the least: its longest runs of adaptor steps throughout."""
        return self._trajectory(self.schedule.bounds(self.steps)[0])

    def _trajectory(self, full: int) -> int | None:
        if self.adaptor_pass_macs is None:
            return None
        each = full * self.full_macs + (self.steps - full) * self.adaptor_pass_macs
        return each * (2 if self.guidance else 1)

    @property
    def trajectory_flops(self) -> int | None:
        """FLOPs of a trajectory; None without a region."""
        return None if self.trajectory_macs is None else 2 * self.trajectory_macs

    @property
    def saved_share(self) -> float | None:
        """Share of a trajectory's MACs that Clockwork saves, 0 to 1, as `trajectory_macs`; None without a region."""
        return self._saved(self.trajectory_macs)

    def _saved(self, run: int | None) -> float | None:
        return None if run is None or not self.full_trajectory_macs else 1 - run / self.full_trajectory_macs

    @property
    def convention(self) -> str:
        """What the numbers count, in a sentence; part of every rendering."""
        products = "counted" if self.attention else "left out, as in the paper"
        norms = "fvcore's estimate for normalisations added" if self.norms else "normalisations not counted"
        return (
            f"MACs of convolutions and matrix products, attention products {products}; {norms}; 1 MAC = 2 FLOPs. "
            f"Batch as traced: {self.sample[0]}.{self._missing}"
        )

    @property
    def _missing(self) -> str:
        names = ", ".join(f"{item.operator} ({item.calls}×)" for item in self.uncounted)
        return f" Lower bound; not counted: {names}." if names else ""

    def by_module(self, depth: int | None = None) -> tuple[MacsRow, ...]:
        """MACs per module, in the order of first use; paths are cut off after `depth` names, the report's own."""
        depth = depth or self.depth
        return self._rows(lambda operator: ".".join(operator.module.split(".")[:depth]) or "(the UNet itself)")

    def by_operator(self) -> tuple[MacsRow, ...]:
        """MACs per operator, dearest first."""
        return tuple(sorted(self._rows(lambda operator: operator.operator), key=lambda row: -row.full_macs))

    def by_level(self) -> tuple[MacsRow, ...]:
        """MACs per resolution level, highest first; "no level" is what runs before the first spatial operator."""
        area = {shape(o.resolution): math.prod(o.resolution) for o in self.operators if o.resolution}
        rows = self._rows(lambda operator: shape(operator.resolution) or "no level")
        return tuple(sorted(rows, key=lambda row: -area.get(row.name, 0)))

    def _rows(self, name: Callable[[OperatorMacs], str]) -> tuple[MacsRow, ...]:
        by_name: dict[str, list[int]] = {}
        for operator in self.operators:
            sums = by_name.setdefault(name(operator), [0, 0, 0])
            sums[0] += operator.macs
            sums[1] += 0 if operator.skipped else operator.macs
            sums[2] += 1
        with_region = self.region is not None
        return tuple(MacsRow(key, full, rest if with_region else None, n) for key, (full, rest, n) in by_name.items())

    # -- renderings ---------------------------------------------------------------------------------------------------

    def tables(self) -> tuple[Table, ...]:
        """Passes, levels, operators, modules, and what was not counted."""
        views = (
            ("By resolution level", "level", self.by_level()),
            ("By operator", "operator", self.by_operator()),
            ("By module", "module", self.by_module()),
        )
        tables = [self.table(), *(self._view(*view) for view in views)]
        if self.uncounted:
            rows = [(item.operator, item.calls, ", ".join(item.modules[:3])) for item in self.uncounted]
            columns = ("operator", ">calls", "first modules")
            note = "These may multiply and accumulate; nothing here can count them, so all sums are lower bounds."
            tables.append(table("Not counted", columns, rows, notes=(note,)))
        return tuple(tables)

    def table(self) -> Table:
        """A full pass, an adaptor pass and the trajectory."""
        rows: list[tuple[object, ...]] = [("full pass", macs(self.full_macs), flops(self.full_flops), None)]
        if self.adaptor_pass_macs is not None and self.adaptor_macs is not None:
            share = 1 - self.adaptor_pass_macs / (self.full_macs or 1)
            rows += [
                ("adaptor pass", macs(self.adaptor_pass_macs), flops(self.adaptor_pass_flops), percent(share)),
                ("of which the adaptor", macs(self.adaptor_macs), flops(2 * self.adaptor_macs), None),
            ]
        each = count(self.steps, "step") + (" with guidance" if self.guidance else "")
        rows.append((f"{each}, all full", macs(self.full_trajectory_macs), flops(self.full_trajectory_flops), None))
        if self.trajectory_macs is not None:
            for full in dict.fromkeys(self.schedule.bounds(self.steps)):
                run, name = self._trajectory(full) or 0, f"{each}, {full} of them full"
                rows.append((name, macs(run), flops(2 * run), percent(self._saved(run))))
        title = f"{self.model}, sample {shape(self.sample)}, {self.parameters / 1e6:.2f} M parameters"
        return table(title, ("", ">MACs", ">FLOPs", ">saved"), rows, notes=self._notes())

    def _notes(self) -> list[str]:
        notes = [self.convention]
        if self.guidance:
            notes.append("Guidance doubles the batch: two samples a step for each one traced.")
        if self.region is None:
            return [*notes, f"No adaptor pass: {self.no_region}"]
        letters = "F full pass, " + ("A adaptor pass" if self.schedule.threshold is None else "? decided at run time")
        preview = f": {self.schedule.preview(self.steps)} ({letters})" if self.steps <= 16 else ""
        region = self.region
        edge = f"{shape(region.resolution)} down to {shape(region.bottleneck)}, level {region.level}, cut {region.cut}"
        return [
            *notes,
            f"Schedule {self.schedule}{preview}",
            f"Region {region.entry.path} → {region.exit.path}, {edge}",
        ]

    def _view(self, title: str, head: str, rows: tuple[MacsRow, ...]) -> Table:
        total = self.full_macs or 1
        columns = (head, ">operators", ">full pass", ">share", ">adaptor pass")
        cells = [
            (row.name, row.operators, macs(row.full_macs), percent(row.full_macs / total), macs(row.adaptor_pass_macs))
            for row in rows
        ]
        notes = ("The adaptor's own MACs are not among these.",) if self.adaptor_macs else ()
        return table(title, columns, cells, notes=notes)

    def figures(self) -> tuple[Diagram, ...]:
        """The U."""
        return () if self.diagram is None else (self.diagram,)

    @property
    def heading(self) -> str:
        """Title of the page."""
        return f"{self.model}: what passes cost, and what Clockwork saves"

    def data(self) -> dict[str, Any]:
        """The report as plain data; every key that holds a count names its unit."""
        names = (
            "model parameters attention norms full_macs full_flops adaptor_macs adaptor_pass_macs adaptor_pass_flops "
            "steps guidance full_trajectory_macs full_trajectory_flops trajectory_macs trajectory_flops saved_share "
            "least_trajectory_macs"
        )
        region = self.region
        return {
            "convention": self.convention,
            **{name: getattr(self, name) for name in names.split()},
            "sample": self.sample,
            "schedule": str(self.schedule),
            "full_steps": self.full_steps,
            "region": region
            and {"entry": region.entry.path, "exit": region.exit.path, "cut": region.cut, "level": region.level},
            "no_region": self.no_region,
            "by_level": [asdict(row) for row in self.by_level()],
            "by_operator": [asdict(row) for row in self.by_operator()],
            "by_module": [asdict(row) for row in self.by_module()],
            "uncounted": [asdict(item) for item in self.uncounted],
        }

    def __str__(self) -> str:
        return self.table().to_markdown()


def flops_report(
    unet: nn.Module,
    /,
    *args: Any,
    clock: int | Schedule = 2,
    steps: int = 8,
    guidance: bool = False,
    adaptor: AdaptorLike = None,
    region: Region | Choice | None = None,
    attention: bool = True,
    norms: Literal["fvcore"] | None = None,
    handles: Mapping[str, Handle] | None = None,
    depth: int = 2,
    **kwargs: Any,
) -> FlopsReport:
    """Count a full pass, an adaptor pass and a whole trajectory of any UNet.

    The UNet is traced once, on whatever device it is; on the meta device that needs no weights and runs nothing.

    Args:
        unet: any UNet.
        *args: the arguments of one call, as in a sampling loop; MACs are for their batch.
        clock: one full pass every so many steps, or a `Schedule`.
        steps: denoising steps of the trajectory.
        guidance: classifier-free guidance: twice the traced batch at every step.
        adaptor: stands in for the region, as in `wrap`; the identity has no MACs.
        region: what to skip, a `Region` or a `Choice`; None for the one that the adaptor was made for, or else the one
            below the highest level. The options of `Choice` may be passed one by one instead: `share=0.9`.
        attention: count attention products; False is the paper's convention.
        norms: "fvcore" adds fvcore's estimate for normalisations.
        handles: how operators are counted that the library does not know: name → function of the arguments, with shapes
            for tensors, and the output's shape (`ch.graph.handle`).
        depth: names of a module path that the view by module keeps.
        **kwargs: arguments of the call by name, and options of `Choice`.

    Returns:
        The report: totals in MACs and FLOPs, views by level, operator and module, the list of what is not counted.
        Without a region it still has the full pass, and says why there is no adaptor pass.

    Raises:
        ArgumentError: `steps`, `clock`, `norms` or a choice of the region is outside its rule.
        AdaptorError: the adaptor cannot be called or loaded, or does not fit the region.
        RegionNotFoundError: the options ask for a region that the UNet does not have.
        CountError: an operator multiplies, but its shapes were not recorded.
        TraceError: the call could not be recorded.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")
        >>> report = flops_report(unet, *args, guidance=True, cut="paper", attention=False, **kwargs)
        >>> f"{report.full_macs / 1e9:.2f}"
        '338.61'
        >>> f"{report.full_trajectory_flops / 1e12:.2f} → {report.trajectory_flops / 1e12:.2f} TFLOPs"
        '10.84 → 7.24 TFLOPs'

    Source: arXiv 2312.08128, Appendix A and Tab. 1.
    """
    whole("steps", steps, least=1, example=8)
    whole("depth", depth, least=1, example=2)
    schedule = clock if isinstance(clock, Schedule) else Schedule.every(clock)
    options, kwargs = split_options(unet, kwargs, named(flops_report))
    wanted = region_or_choice(region, options)
    used = resolve_adaptor(adaptor)
    if wanted == Choice():
        wanted = Choice(**region_options(used))
    with counted_by(handles):
        trace = record(unet, args, kwargs)
        region, no_region = found_or_why(wanted, trace, unet)
        operators, uncounted = _count(trace, region, attention=attention, norms=norms)
        own = None if region is None else _adaptor_macs(used, region, attention=attention, norms=norms)
        return FlopsReport(
            model=trace.model,
            sample=trace.inputs[trace.sample].meta["shape"],
            parameters=sum(parameter.numel() for parameter in unet.parameters()),
            attention=attention,
            norms=norms,
            full_macs=sum(operator.macs for operator in operators),
            adaptor_macs=own,
            region=region,
            no_region=no_region,
            schedule=schedule,
            steps=steps,
            guidance=bool(guidance),
            operators=operators,
            uncounted=uncounted,
            diagram=diagram_of(trace, region),
            depth=depth,
        )


def _count(
    trace: Trace, region: Region | None, *, attention: bool, norms: str | None
) -> tuple[tuple[OperatorMacs, ...], tuple[Uncounted, ...]]:
    """Operators with MACs in the order they ran, each at its level, and those of unknown MACs."""
    levels = Levels(trace)
    skipped = skipped_nodes(trace, region) if region is not None else set[int]()
    counted: list[OperatorMacs] = []
    unknown: dict[str, list[str]] = {}
    for node in trace.nodes:
        operator_kind = kind(node)
        if operator_kind == "unknown":
            unknown.setdefault(operator_name(node), []).append(node.meta["module"])
            continue
        here = node_macs(node, attention=attention, norms=norms)
        if not here:
            continue
        index = node.meta["index"]
        space = levels.spatial.get(levels.at[index], ())
        counted.append(
            OperatorMacs(operator_name(node), operator_kind, node.meta["module"], space, here, index in skipped)
        )
    rows = (Uncounted(name, len(modules), tuple(dict.fromkeys(modules))) for name, modules in unknown.items())
    return tuple(counted), tuple(rows)


def _adaptor_macs(adaptor: Adaptor, region: Region, *, attention: bool, norms: str | None) -> int:
    """MACs of one call of the adaptor on tensors of the boundary's shapes."""
    if is_identity(adaptor):
        return 0
    check_region(adaptor, region)
    try:
        trace = _trace_adaptor(adaptor, region)
    except ClockworkError:
        raise
    except Exception as error:
        raise AdaptorError(
            "an adaptor can be called with tensors of the region's boundary",
            seen={
                "entry": shape(region.entry.shape),
                "exit": shape(region.exit.shape),
                "error": f"{type(error).__name__}: {error}",
            },
            do="build the adaptor for this region",
        ) from error
    sizes = trace.outputs[0].meta["shape"] if trace.outputs else ()
    if sizes != region.exit.shape:
        raise AdaptorError(
            "an adaptor must return a tensor of the exit's shape",
            seen={"exit": shape(region.exit.shape), "returned": shape(sizes)},
            do="build the adaptor for this region",
        )
    return sum(node_macs(node, attention=attention, norms=norms) for node in trace.nodes)


def _trace_adaptor(adaptor: Callable[..., torch.Tensor], region: Region) -> Trace:
    """On a copy without weights where that works, else on the adaptor itself."""
    try:
        return record(as_module(_on_meta(adaptor)), *_boundary(region, torch.device("meta"), adaptor))
    except Exception:  # no copy, or an operator without a meta kernel: the adaptor's own device tells what is wrong
        weights = list(adaptor.parameters()) if isinstance(adaptor, nn.Module) else []
        device = weights[0].device if weights else torch.device("cpu")
        return record(as_module(adaptor), *_boundary(region, device, adaptor))


def _on_meta(adaptor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    if not isinstance(adaptor, nn.Module):
        return adaptor
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in adaptor.parameters()}
    memo.update({id(buffer): buffer.detach().to("meta") for buffer in adaptor.buffers()})
    return copy.deepcopy(adaptor, memo)


def _boundary(region: Region, device: torch.device, adaptor: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an adaptor's call, zeros of the recorded shapes; None for what cannot be picked up."""
    weights = list(adaptor.parameters()) if isinstance(adaptor, nn.Module) else []
    floating = next((p.dtype for p in weights if p.is_floating_point()), None)

    def zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(sizes, dtype=floating or dtype, device=device)

    tensors = {name: zeros(sizes, region.cut_plan.ports[name].dtype) for name, sizes in region.inputs.items()}
    exit = zeros(region.exit.shape, region.exit.dtype)
    entry = tensors.get("entry")
    sides = {name: tensors.get(name) for name in ("time", "text")}
    own = {name: entry if name == "entry_cached" else None for name in needs_of(adaptor)}
    return (entry, exit), sides | own


@contextlib.contextmanager
def counting(unet: nn.Module) -> Iterator[list[int]]:
    """Record every call of `unet` in the block and count its MACs; slow, so for one batch and not for all.

    Args:
        unet: not wrapped: a wrapper counts on its own (`cw.stats`).

    Yields:
        MACs of each call so far: convolutions and matrix products, attention products counted.

    Example:
        >>> import torch
        >>> layer = torch.nn.Conv2d(3, 8, 3, padding=1)
        >>> with counting(layer) as macs:
        ...     _ = layer(torch.zeros(1, 3, 4, 4))
        >>> macs  # 16 positions of 3·3·3·8
        [3456]
    """
    macs: list[int] = []
    recorders: list[Recorder] = []
    bind, paths = Binder(unet.forward), module_paths(unet)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = Recorder(unet, bind(args, kwargs), paths)
        recorders.append(recorder)
        recorder.start(args, kwargs, frame=sys._getframe(1))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder = recorders.pop()
        recorder.stop(output)
        macs.append(sum(map(node_macs, recorder.bindings.nodes)))

    handles = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        unet.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        yield macs
    finally:
        for recorder in recorders:
            recorder.stop()
        for handle in handles:
            handle.remove()

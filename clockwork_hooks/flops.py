"""What passes and trajectories cost, counted on the recorded graph: exact per operator, module and resolution level.

MACs are those of convolutions and matrix products, FLOPs are twice the MACs. Whether attention products are among them
is an option that every rendering names: the paper leaves them out (338.61 GMACs for SD v1.5), a GPU does not
(401.64 GMACs). A model on the meta device is counted without running anything; no number depends on a model's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from clockwork_hooks.blocks import diagram_of
from clockwork_hooks.boundary import Region
from clockwork_hooks.choice import Choice
from clockwork_hooks.cost import FlopsReport
from clockwork_hooks.counts import MacsRow, OperatorMacs, Uncounted
from clockwork_hooks.errors import AdaptorError, ArgumentError, ClockworkError, RegionNotFoundError
from clockwork_hooks.graph import Trace, record
from clockwork_hooks.levels import Levels
from clockwork_hooks.macs import kind, node_macs, operator_name
from clockwork_hooks.operators import PRODUCTS
from clockwork_hooks.regions import skipped_nodes
from clockwork_hooks.report import shape
from clockwork_hooks.schedule import Schedule

__all__ = ["FlopsReport", "MacsRow", "OperatorMacs", "Uncounted", "flops_report"]


def flops_report(
    unet: nn.Module,
    /,
    *args: Any,
    clock: int | Schedule = 2,
    steps: int = 8,
    guidance: bool = False,
    adaptor: nn.Module | Callable[..., torch.Tensor] | Literal["identity"] | None = None,
    region: Region | None = None,
    level: int | None = None,
    resolution: int | tuple[int, ...] | None = None,
    share: float | None = None,
    modules: Iterable[str] | str | None = None,
    entry: str | None = None,
    exit: str | None = None,
    cut: Literal["outer", "paper"] = "outer",
    attention: bool = True,
    norms: Literal["fvcore"] | None = None,
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
        adaptor: None or "identity" (no MACs), or a module called as `adaptor(entry, exit, time=..., text=...)`.
        region: what to skip, from `find_region`; None has it chosen by the options that follow.
        level, resolution, share, modules, entry, exit, cut: which region, as in `find_region`.
        attention: count attention products; False is the paper's convention.
        norms: "fvcore" adds fvcore's estimate for normalisations.
        depth: names of a module path that the view by module keeps.
        **kwargs: likewise arguments of the call.

    Returns:
        The report: totals in MACs and FLOPs, views by level, operator and module, the list of what is not counted.
        Without a region it still has the full pass, and says why there is no adaptor pass.

    Raises:
        ArgumentError: `steps`, `clock`, `norms` or a choice of the region is outside its rule.
        AdaptorError: the adaptor does not fit the region.
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
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError("steps is an int of at least 1", seen={"steps": repr(steps)}, do="pass steps=8")
    schedule = clock if isinstance(clock, Schedule) else Schedule.every(clock)
    choice = Choice(level=level, resolution=resolution, share=share, modules=modules, entry=entry, exit=exit, cut=cut)
    choice.instead_of(region)
    trace = record(unet, args, kwargs)
    no_region = ""
    if region is None:
        try:
            region = choice.find(trace, unet)
        except RegionNotFoundError as error:
            if choice != Choice(cut=cut):  # what was asked for by name is not there
                raise
            no_region = str(error)
    operators, uncounted = _count(trace, region, attention=attention, norms=norms)
    own = None if region is None else _adaptor_macs(adaptor, region, attention=attention, norms=norms)
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
    """Operators with MACs in the order they ran, and those of unknown MACs.

    An operator whose tensor names no level (text keys, attention products, embeddings) counts at the level where the
    operators before it work. Attention products always do: heads times tokens may by chance be another level's
    positions.
    """
    levels = Levels(trace)
    skipped = skipped_nodes(trace, region) if region is not None else set[int]()
    at: tuple[int, ...] = ()
    counted: list[OperatorMacs] = []
    unknown: dict[str, list[str]] = {}
    for node in trace.nodes:
        found = kind(node)
        if found == "unknown":
            unknown.setdefault(operator_name(node), []).append(node.meta["module"])
            continue
        here = node_macs(node, attention=attention, norms=norms)
        if not here:
            continue
        at = at if found in PRODUCTS else levels.resolution(node) or at
        index = node.meta["index"]
        counted.append(OperatorMacs(operator_name(node), found, node.meta["module"], at, here, index in skipped))
    rows = (Uncounted(name, len(modules), tuple(dict.fromkeys(modules))) for name, modules in unknown.items())
    return tuple(counted), tuple(rows)


class _Call(nn.Module):
    """An adaptor as a module with named arguments, so that any callable can be traced."""

    def __init__(self, adaptor: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.adaptor = adaptor

    def forward(self, entry: torch.Tensor | None, exit_cached: torch.Tensor, **sides: Any) -> torch.Tensor:
        return self.adaptor(entry, exit_cached, **sides)


def _adaptor_macs(adaptor: object, region: Region, *, attention: bool, norms: str | None) -> int:
    """MACs of one call of the adaptor on tensors of the boundary's shapes."""
    if adaptor is None or adaptor == "identity":
        return 0
    if not callable(adaptor):
        raise AdaptorError(
            'an adaptor is None, "identity", or a module called as adaptor(entry, exit, time=..., text=...)',
            seen={"adaptor": repr(adaptor)},
            do="pass one of these",
        )
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
    made = trace.outputs[0].meta["shape"] if trace.outputs else ()
    if made != region.exit.shape:
        raise AdaptorError(
            "an adaptor returns a tensor of the exit's shape",
            seen={"exit": shape(region.exit.shape), "returned": shape(made)},
            do="build the adaptor for this region",
        )
    return sum(node_macs(node, attention=attention, norms=norms) for node in trace.nodes)


def _trace_adaptor(adaptor: Callable[..., torch.Tensor], region: Region) -> Trace:
    """On a copy without weights where that works, else on the adaptor itself."""
    try:
        return record(_Call(_on_meta(adaptor)), *_boundary(region, torch.device("meta"), adaptor))
    except Exception:  # no copy, or an operator without a meta kernel: the adaptor's own device tells what is wrong
        weights = list(adaptor.parameters()) if isinstance(adaptor, nn.Module) else []
        device = weights[0].device if weights else torch.device("cpu")
        return record(_Call(adaptor), *_boundary(region, device, adaptor))


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

    given = {name: zeros(sizes, region.plan.ports[name].dtype) for name, sizes in region.inputs.items()}
    exit = zeros(region.exit.shape, region.exit.dtype)
    return (given.get("entry"), exit), {name: given.get(name) for name in ("time", "text")}

"""What the calls of an input signature need: found from the first of them, which is traced as it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clockwork_hooks import emit, reasons
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.choice import Choice
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.graph import Trace, finish, module_paths
from clockwork_hooks.hooks import Installed
from clockwork_hooks.inputs import time_candidates
from clockwork_hooks.macs import node_macs
from clockwork_hooks.passes import Active, Pass
from clockwork_hooks.recorder import Recorder
from clockwork_hooks.regions import match, skipped_nodes
from clockwork_hooks.running import Prepared, Running
from clockwork_hooks.tree import tensors

__all__ = ["Preparation", "likely_exits"]


class Preparation:
    """Records first calls, finds the region in them, patches the modules with skipped calls.

    Args:
        unet: the UNet.
        adaptor: stands in for the region.
        region: the region to skip, or how to choose it.
        time: name of the time input, None to find it.
        keep_graph: under autograd, a kept exit stays in the graph of the call that made it.

    Attributes:
        looks: all passes pick boundary tensors up, also those that have no use for them.
        skips: some pass may need modules to be patched; else that waits until one does.
    """

    looks = False
    skips = True

    def __init__(
        self, unet: nn.Module, adaptor: Adaptor, *, region: Region | Choice, time: str | None, keep_graph: bool
    ) -> None:
        self.unet, self.adaptor, self.time, self.keep_graph = unet, adaptor, time, keep_graph
        self.wanted = region
        self.region = region if isinstance(region, Region) else None
        self.active = Active()
        self.resting = False
        self.tracing: Pass | None = None  # set in what torch.compile traces, never while anything runs
        self.installed = Installed(self)
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    @property
    def regions(self) -> tuple[Region, ...]:
        """The region, once it is known."""
        return () if self.region is None else (self.region,)

    @property
    def adaptors(self) -> tuple[Adaptor, ...]:
        """What stands in for it."""
        return (self.adaptor,)

    def _record(self, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rank = max((leaf.ndim - 2 for leaf in tensors(running.arguments.flat)), default=1)
        running.recorder = Recorder(self.unet, running.arguments, module_paths(self.unet))
        running.recorder.start(args, kwargs, frame=running.frame, keep=max(rank, 1), exits=self._likely_exits())

    def _likely_exits(self) -> tuple[frozenset[str], ...]:
        """For each region, paths of modules that may return its exit, where something is known before the trace."""
        return (likely_exits(self.wanted, self.region),)

    def _traced(self, running: Running, output: Any) -> tuple[Prepared, dict[int, torch.Tensor]]:
        """Turn the recorded call into a plan: (what its signature needs, likely exits that were kept alive by node)."""
        recorder = running.recorder
        assert recorder is not None  # only called for recorded calls
        kept = dict(recorder.kept)
        for named in recorder.named.values():
            kept |= named
        for node in recorder.cut if self.keep_graph else ():
            kept.pop(node, None)
        recorder.kept.clear()
        recorder.named.clear()
        recorder.stop(output)
        trace = finish(recorder, self.unet, running.arguments, time=self.time)
        prepared = self._prepared[running.key] = self._prepare(trace)
        return prepared, kept

    def _find(self, trace: Trace, wanted: Region | Choice, known: Region | None) -> tuple[Region | None, str]:
        """The region of this trace: the one known from other inputs if it is there; None, and why."""
        known = wanted if isinstance(wanted, Region) else known
        region = match(trace, self.unet, known) if known is not None else None
        if isinstance(wanted, Region) or region is not None:
            return region, reasons.OTHER_REGION
        try:
            return wanted.find(trace, self.unet), ""
        except RegionNotFoundError:
            if known is None:
                raise
            return None, reasons.NO_REGION

    def _prepare(self, trace: Trace) -> Prepared:
        region, why = self._find(trace, self.wanted, self.region)
        costs = [node_macs(node) for node in trace.nodes]
        full = sum(costs)
        rest = full - sum(costs[n] for n in skipped_nodes(trace, region)) if region is not None else full
        if region is not None:
            emit.check_region(self.adaptor, region)
            if self.skips:
                self._install(region)
            self.region = self.region or region
        return Prepared(region, full, rest, trace.time, trace.sample, why)

    def _adopt(self, running: Running) -> Prepared | None:
        """The plan of the region that the user found before, if it was found for such a call: no trace is needed."""
        region, autocast = self.wanted, running.key[2]
        if not isinstance(region, Region) or region.signature != running.arguments.signature or autocast is not None:
            return None
        if self.skips:
            self._install(region)
        time = time_candidates(running.arguments, sample=region.sample, time=self.time) if self.time else region.times
        if len(time) > 1:
            return None
        rest = region.full_macs - region.macs
        prepared = Prepared(region, region.full_macs, rest, time[0] if time else None, region.sample)
        self._prepared[running.key] = prepared
        return prepared

    def _install(self, region: Region) -> None:
        known = module_paths(self.unet)
        modules = {known[id(module)]: module for module in self.unet.modules()}
        self.installed.add(region.plan, modules, looks=self.looks or emit.looks(self.adaptor))


def likely_exits(wanted: Region | Choice, known: Region | None) -> frozenset[str]:
    """Paths of modules of which the one called last may return the region's exit."""
    paths = frozenset(known.exit.paths) if known is not None else frozenset[str]()
    return paths | (wanted.exits if isinstance(wanted, Choice) else frozenset[str]())

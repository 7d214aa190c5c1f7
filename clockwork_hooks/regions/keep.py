"""A region without some of its modules: those that others look at, and all that these need, run on every pass."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.tracing import Trace, module_paths
from clockwork_hooks.regions.build import without
from clockwork_hooks.regions.facts import Facts
from clockwork_hooks.regions.find import skipped_nodes
from clockwork_hooks.regions.region import Region

__all__ = ["check_keep", "keeping"]


def check_keep(unet: nn.Module, keep: object) -> tuple[str, ...]:
    """The paths of modules to keep; `ArgumentError` if one is no module of the UNet."""
    names = (keep,) if isinstance(keep, str) else keep
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            "keep= names modules that run on every pass, by their dotted paths",
            seen={"keep": repr(keep)[:80]},
            do='pass keep=["mid_block"]',
        )
    paths = {path for path in module_paths(unet).values() if path}
    for name in names:
        if name not in paths:
            near = get_close_matches(name, paths, n=3)
            raise ArgumentError(
                "keep= names modules that run on every pass, by their dotted paths",
                seen={"keep": name, "modules with such names": ", ".join(near) or "none"},
                do="pass paths as in unet.named_modules()",
            )
    return tuple(names)


def keeping(trace: Trace, unet: nn.Module, region: Region, keep: tuple[str, ...]) -> Region:
    """The region, but calls of the modules to keep run, and all that their inputs come from.

    Args:
        trace: where the region was found.
        unet: the UNet.
        region: in that trace.
        keep: dotted paths of modules.

    Raises:
        RegionNotFoundError: they need all of it, or return its exit.
    """
    if not keep:
        return region
    skipped = skipped_nodes(trace, region)
    needed: set[int] = set()
    for call in trace.calls:
        if call.path in keep:  # what lies outside of the region runs anyway
            needed.update(skipped.intersection(range(call.first, call.last)))
    for index in range(len(trace.nodes) - 1, -1, -1):
        if index in needed:
            node = trace.nodes[index]  # all that it takes: of a skipped one not even the shape is asked for
            needed.update(int(one.meta["index"]) for one in (*node.all_input_nodes, *node.meta.get("after", ())))
    smaller = without(Facts(trace, unet), region, needed)
    if smaller is None:
        raise RegionNotFoundError(
            "of a region something is left to skip beside the modules to keep, its exit among it",
            seen={"region": region.line, "keep": ", ".join(keep)},
            do="keep fewer modules, or those that lie deeper in it",
        )
    return smaller

"""Find the low-resolution regions of a UNet from its graph alone: no block names, no class list.

A region is everything whose every path to the output passes one tensor, its exit, and that works below the
resolution of the tensors that enter it. Regions nest: below the highest level, below the next, and so on
(Clockwork Diffusion, arXiv 2312.08128, Sec. 4.1 and Fig. 8, splits SD v1.5 by hand at one of these places).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.finder import Finder, listed
from clockwork_hooks.graph import Trace, record

__all__ = ["choose", "find_region", "find_regions", "match", "regions_of", "skipped_nodes"]


def find_regions(unet: nn.Module, /, *args: Any, **kwargs: Any) -> tuple[Region, ...]:
    """Every region of the UNet's main chain, widest first.

    One call is traced (on the meta device too: no weights are needed). Several regions can lie below one level: the
    wider ones also skip blocks *at* that level; the last of a level is "the region below it".

    Args:
        unet: any UNet.
        *args: the arguments of one call, as in a sampling loop.
        **kwargs: likewise.

    Returns:
        The regions, widest first; each one contains the next.

    Raises:
        RegionNotFoundError: nothing can be skipped; says what was looked for, the resolutions seen, and how to name
            a region by hand.
        TraceError: the call could not be recorded.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.down = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Conv2d(8, 32, 4, 2, 1)
        ...         self.body, self.up = torch.nn.Conv2d(32, 32, 3, 1, 1), torch.nn.ConvTranspose2d(32, 8, 4, 2, 1)
        ...         self.head = torch.nn.Conv2d(16, 3, 3, 1, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.stem(x)
        ...         return self.head(torch.cat([h, self.up(self.body(self.down(h)))], 1))
        >>> (region,) = ch.find_regions(Tiny(), torch.zeros(1, 3, 16, 16))
        >>> region.entry.path, region.exit.path, region.resolution, region.bottleneck
        ('stem', 'up', (16, 16), (8, 8))

    Source: arXiv 2312.08128, Sec. 4.1, Appendix A.
    """
    return regions_of(record(unet, args, kwargs), unet)


def find_region(
    unet: nn.Module,
    /,
    *args: Any,
    level: int = 1,
    cut: Literal["outer", "paper"] = "outer",
    entry: str | None = None,
    exit: str | None = None,
    **kwargs: Any,
) -> Region:
    """One region: below the highest level by default, or named by hand.

    Args:
        unet: any UNet.
        *args: the arguments of one call.
        level: 1 is the region below the highest resolution ("stage 1" of the paper), 2 the one below the next.
        cut: "outer" skips the downsampler into the region and the upsampler out of it too; "paper" leaves both
            running, so r_in comes after the first and r_out before the second.
        entry: dotted path of the module whose output enters, for a region named by hand; with `exit`.
        exit: dotted path of the module whose output leaves; every path from the entry to the UNet's output must
            pass it.
        **kwargs: likewise arguments of the call.

    Returns:
        The region.

    Raises:
        RegionNotFoundError: there is no such region; lists those there are.
        ArgumentError: level, cut or a path is outside its rule.

    Source: arXiv 2312.08128, Sec. 4.1; Fig. 8 for the paper's own cut of SD v1.5.
    """
    return choose(record(unet, args, kwargs), unet, level=level, cut=cut, entry=entry, exit=exit)


def choose(
    trace: Trace,
    unet: nn.Module,
    *,
    level: int = 1,
    cut: str = "outer",
    entry: str | None = None,
    exit: str | None = None,
) -> Region:
    """`find_region` on an existing trace."""
    if cut not in ("outer", "paper"):
        raise ArgumentError("a cut is 'outer' or 'paper'", seen={"cut": repr(cut)}, do="pass one of these")
    if isinstance(level, bool) or not isinstance(level, int) or level < 1:
        raise ArgumentError("a level is an int of at least 1", seen={"level": repr(level)}, do="pass level=1")
    if (entry is None) != (exit is None):
        raise ArgumentError(
            "a region named by hand has an entry and an exit",
            seen={"entry": entry, "exit": exit},
            do="pass both: dotted paths of the modules whose outputs flow in and out",
        )
    finder = Finder(trace, unet)
    if entry is not None and exit is not None:
        return finder.by_hand(entry, exit)
    regions = finder.chain()
    found = next((region for region in reversed(regions) if region.level == level), None)
    if found is not None and found.resolution in finder.small:
        raise finder.not_found(regions)
    if found is None:
        levels = sorted({region.level for region in regions})
        raise RegionNotFoundError(
            "there is a region below each level of the UNet but the last",
            seen={"level": level, "levels with a region": levels, **listed(regions)},
            do=f"pass level={levels[-1]} or less",
        )
    if cut == "outer":
        return found
    if found.inner is None:
        raise RegionNotFoundError(
            "the paper's cut lies between the region's downsampler and its upsampler",
            seen={"region": found.line},
            do='pass cut="outer"',
        )
    return found.inner


def regions_of(trace: Trace, unet: nn.Module) -> tuple[Region, ...]:
    """`find_regions` on an existing trace."""
    return Finder(trace, unet).chain()


def match(trace: Trace, unet: nn.Module, region: Region) -> Region | None:
    """The same region in another trace of the same UNet (another batch, size or device); None if it has none."""
    finder = Finder(trace, unet)
    try:
        if region.cut == "hand":
            found = [finder.by_hand(region.entry.path, region.exit.path)]
        else:
            found = [r for outer in finder.chain() for r in (outer, outer.inner) if r is not None]
    except (RegionNotFoundError, ArgumentError):
        return None
    return next((r for r in found if r.fingerprint == region.fingerprint), None)


def skipped_nodes(trace: Trace, region: Region) -> set[int]:
    """Indices of the nodes that an adaptor pass does not run: those of the skipped module calls."""
    wanted = {(call.path, call.ordinal) for call in region.plan.skipped}
    return {
        index for call in trace.calls if (call.path, call.ordinal) in wanted for index in range(call.first, call.last)
    }

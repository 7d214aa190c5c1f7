"""Find the low-resolution regions of a UNet from its graph alone: no block names, no class list.

A region is everything whose every path to the output passes one tensor, its exit, and that works below the
resolution of the tensors that enter it. Regions nest: below the highest level, below the next, and so on
(Clockwork Diffusion, arXiv 2312.08128, Sec. 4.1 and Fig. 8, splits SD v1.5 by hand at one of these places).
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.tracing import Trace, record
from clockwork_hooks.regions.choice import Choice, region_or_choice, split_options
from clockwork_hooks.regions.named import by_ends, by_modules
from clockwork_hooks.regions.region import Region
from clockwork_hooks.regions.search import Search, of_fingerprint

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


def find_region(unet: nn.Module, /, *args: Any, region: Choice | None = None, **kwargs: Any) -> Region:
    """One region: below the highest level by default, or chosen in one of the other ways.

    Args:
        unet: any UNet.
        *args: the arguments of one call.
        region: which one, a `Choice`; its options may be passed one by one instead: `level=2`, `share=0.9`, ...
        **kwargs: likewise arguments of the call, and options of `Choice`.

    Returns:
        The region.

    Raises:
        RegionNotFoundError: there is no such region; lists those there are.
        ArgumentError: an option is outside its rule, or several ways to choose are mixed.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")  # on the meta device: no weights
        >>> print(find_region(unet, *args, resolution=32, cut="paper", **kwargs).line)
        down_blocks.0.downsamplers.0.conv → up_blocks.2.attentions.2, 32×32 down to 8×8, 58.0% of MACs, level 1
        >>> print(find_region(unet, *args, share=0.75, **kwargs).line)
        down_blocks.0.attentions.0 → up_blocks.3.attentions.0, 64×64 down to 8×8, 77.6% of MACs, level 1

    Source: arXiv 2312.08128, Sec. 4.1; Fig. 8 for the paper's own cut of SD v1.5.
    """
    options, kwargs = split_options(unet, kwargs)
    wanted = region_or_choice(region, options)
    return wanted if isinstance(wanted, Region) else wanted.find(record(unet, args, kwargs), unet)


def choose(trace: Trace, unet: nn.Module, **options: Any) -> Region:
    """`find_region` on an existing trace; the options are those of `Choice`."""
    return Choice(**options).find(trace, unet)


def regions_of(trace: Trace, unet: nn.Module) -> tuple[Region, ...]:
    """`find_regions` on an existing trace."""
    return Search(trace, unet).chain()


def match(trace: Trace, unet: nn.Module, region: Region) -> Region | None:
    """The same region in another trace of the same UNet (another batch, size or device); None if it has none."""
    search = Search(trace, unet)
    if region.cut != "hand":
        with contextlib.suppress(RegionNotFoundError):
            return of_fingerprint(search.chain(), region.fingerprint, level=region.level, cut=region.cut)
        return None
    skipped = [call.path for call in region.skipped]
    for by, named in ((by_ends, (region.entry.path, region.exit.path)), (by_modules, (skipped,))):
        with contextlib.suppress(RegionNotFoundError, ArgumentError):
            same = by(search.facts, *named)
            if same.fingerprint == region.fingerprint:
                return same
    return None


def skipped_nodes(trace: Trace, region: Region) -> set[int]:
    """Indices of the nodes that an adaptor pass does not run: those of the skipped module calls."""
    wanted = {(call.path, call.ordinal) for call in region.cut_plan.skipped}
    return {
        index for call in trace.calls if (call.path, call.ordinal) in wanted for index in range(call.first, call.last)
    }

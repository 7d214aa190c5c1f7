"""What an analysis compares: regions, each with something that stands in for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.adaptors.resolve import AdaptorLike, is_identity, resolve_adaptor
from clockwork_hooks.analysis.maps import region_name
from clockwork_hooks.engine import stand_in
from clockwork_hooks.errors import AdaptorError, ArgumentError
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.find import choose, match, regions_of
from clockwork_hooks.regions.region import Region

__all__ = ["Adaptors", "Candidate", "candidates"]

Adaptors = AdaptorLike | list[AdaptorLike] | tuple[AdaptorLike, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A region with its adaptor.

    Attributes:
        name: level, edge and share of the MACs; and the adaptor, unless it is the identity.
        region: the region, of a trace of the UNet.
        adaptor: stands in for it.
        argument: the adaptor as the caller named it; None for the identity.
    """

    name: str
    region: Region
    adaptor: Adaptor
    argument: AdaptorLike

    @property
    def adaptor_name(self) -> str:
        """The adaptor's class, or "identity"."""
        return "identity" if self.argument is None else type(self.adaptor).__name__


def candidates(
    trace: Trace, unet: nn.Module, regions: Iterable[Region] | None, adaptor: Adaptors
) -> tuple[Candidate, ...]:
    """Every adaptor with every region that it can stand in for.

    Args:
        trace: of the UNet, as it is sampled with.
        unet: the UNet.
        regions: those to look at. None: for the identity all nested ones, for an adaptor the one that it was made for.
        adaptor: one, or a list of several; as `wrap` takes them.

    Raises:
        ArgumentError: what is given is no region of this UNet, or there is no adaptor.
        AdaptorError: what is given is no adaptor, or an adaptor fits none of the regions.
        RegionNotFoundError: the UNet has none.
    """
    several = list(adaptor) if isinstance(adaptor, (list, tuple)) else [adaptor]
    if not several:
        raise ArgumentError("something stands in for a region", seen={"adaptor": adaptor}, do="pass adaptor=None")
    matches = None if regions is None else _matches(trace, unet, tuple(regions))
    by_name: dict[str, Candidate] = {}
    for one in several:
        argument, used = None if is_identity(one) else one, resolve_adaptor(one)
        for region in _regions(trace, unet, matches, used, identity=argument is None):
            name = region_name(region) + ("" if argument is None else f", {type(used).__name__}")
            again = sum(key == name or key.startswith(f"{name} #") for key in by_name)
            name = f"{name} #{again + 1}" if again else name
            by_name[name] = Candidate(name, region, used, argument)
    return tuple(by_name.values())


def _matches(trace: Trace, unet: nn.Module, chosen: tuple[Region, ...]) -> tuple[Region, ...]:
    if not chosen or not all(isinstance(region, Region) for region in chosen):
        raise ArgumentError(
            "candidates are regions of the UNet",
            seen={"regions": [type(region).__name__ for region in chosen] or "none"},
            do="pass some of ch.find_regions(unet, *args)",
        )
    matches = [match(trace, unet, region) for region in chosen]
    if None in matches:
        raise ArgumentError(
            "candidates are regions of this UNet, as generate calls it",
            seen={"not found": [r.line for r, f in zip(chosen, matches, strict=True) if f is None]},
            do="pass some of ch.find_regions(unet, *args), found for this UNet",
        )
    return tuple(region for region in matches if region is not None)


def _regions(
    trace: Trace, unet: nn.Module, matches: tuple[Region, ...] | None, adaptor: Adaptor, *, identity: bool
) -> tuple[Region, ...]:
    if identity:
        return matches or regions_of(trace, unet)
    if matches is None:
        region = choose(trace, unet, **stand_in.region_options(adaptor))
        stand_in.check_region(adaptor, region)
        return (region,)
    fitting, refused = [], None
    for region in matches:
        try:
            stand_in.check_region(adaptor, region)
            fitting.append(region)
        except AdaptorError as error:
            refused = error
    if refused is not None and not fitting:
        raise refused
    return tuple(fitting)

"""What of a trace can be skipped: search, choice, boundary, cut."""

from clockwork_hooks.regions.find import Choice, find_region, find_regions
from clockwork_hooks.regions.region import Boundary, Region, Side

__all__ = ["Boundary", "Choice", "Region", "Side", "find_region", "find_regions"]

"""Regions in JSON files: found again by their fingerprint, or taken as they are where nothing can have changed.

What a pass needs of a region (which calls it skips, what stands in for them, where the boundary is picked up) follows
from the UNet's structure and from the call's input signature. A file holds it with a seal, a digest of all of it and of
the structure: where the UNet at hand has that structure, calls of that signature need no analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.regions.cut import CutPlan, dtype_of
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.region import Boundary, Region, Side, seal
from clockwork_hooks.regions.structure import structure
from clockwork_hooks.reports.report import reading

__all__ = ["saved_choice", "saved_region"]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            "a region is read from the JSON file that region.save wrote",
            seen={"region": path, "error": type(error).__name__},
            do='pass ch.find_region(unet, ...), or the file of one that was saved: cw.region.save("region.json")',
        ) from error


def saved_choice(path: str | Path) -> Choice:
    """The choice of a region that `region.save(path)` wrote as JSON: where it is not there any more, nothing is.

    Raises:
        ArgumentError: there is no such file, or it holds no region.
    """
    with reading(Region, _text(path)) as data:
        if data["cut"] == "hand" and len(data["entries"]) > 1:
            return Choice(modules=tuple(dict.fromkeys(call["path"] for call in data["skipped"])))
        if data["cut"] == "hand":
            return Choice(entry=data["entry"]["path"], exit=data["exit"]["path"])
        return Choice(level=data["level"], cut=data["cut"], fingerprint=data["fingerprint"], strict=True)


def saved_region(path: str | Path, unet: nn.Module) -> Region | None:
    """The region that `region.save(path)` wrote, if it holds for this UNet as it stands in the file.

    Args:
        path: the JSON file.
        unet: as it is now.

    Returns:
        The region; None where the UNet has another structure, or the file says too little.

    Raises:
        ArgumentError: there is no such file, or it holds no region.
    """
    with reading(Region, _text(path)) as data:
        saved = data.get("passes")
        if saved is None or saved["seal"] != seal(structure(unet), data):
            return None
        return _region(data, saved)


def _region(data: Mapping[str, Any], saved: Mapping[str, Any]) -> Region:
    entry, exit, *entries = map(_edge, [data["entry"], data["exit"], *data["entries"]], saved["edges"])
    sides = (
        Side(one["kind"], tuple(one["inputs"]), one["path"], tuple(one["shape"]), dtype_of(one["dtype"]), node)
        for one, node in zip(data["sides"], saved["sides"], strict=True)
    )
    names = "model level cut full_macs macs macs_share parameters parameter_share fingerprint sample"
    fields: dict[str, Any] = {name: data[name] for name in names.split()}
    fields |= {name: tuple(data[name]) for name in ("resolution", "bottleneck", "times", "residuals")}
    fields |= {name: tuple(saved[name]) for name in ("unread", "uncounted", "signature")}
    return Region(
        **fields,
        entry=entry,
        exit=exit,
        entries=tuple(entries),
        sides=tuple(sides),
        leftover=tuple((one["operator"], one["calls"]) for one in data["leftover"]),
        by_level=tuple((tuple(row["resolution"]), row["down_macs"], row["up_macs"]) for row in data["by_level"]),
        cut_plan=CutPlan.of(saved),
    )


def _edge(data: Mapping[str, Any], more: Mapping[str, Any]) -> Boundary:
    return Boundary(
        data["path"],
        data["call"],
        tuple(more["paths"]),
        tuple(data["shape"]),
        dtype_of(data["dtype"]),
        tuple(more["resolution"]),
        more["node"],
    )

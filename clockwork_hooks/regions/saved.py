"""Regions in JSON files: a region's own file, and what an adaptor's file says of the region that it was made for.

What a pass needs of a region (which calls it skips, what stands in for them, where the boundary is picked up) follows
from the UNet's structure and from the call's input signature. A region's file holds it with a seal, a digest of all of
it and of the structure: where the UNet at hand has that structure, calls of that signature need no analysis. An
adaptor's file knows its region by its fingerprint, and in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from clockwork_hooks.errors import AdaptorError, ArgumentError, is_whole
from clockwork_hooks.regions.cut import CutPlan, dtype_of
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.fingerprint import is_portable, structure
from clockwork_hooks.regions.region import Boundary, Layout, Region, Side, seal
from clockwork_hooks.reports.report import reading


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
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
    with reading(Region, _text(path), path) as data:
        options = _options(data, [call["path"] for call in data["skipped"]])
        return Choice(**options, strict=True if "fingerprint" in options else None)


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
    with reading(Region, _text(path), path) as data:
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
    fields["scratch"] = tuple(saved.get("scratch", ()))
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


def described_region(region: Region) -> dict[str, Any]:
    """The region as JSON can hold it: its fingerprint, and in words where it lies in this UNet."""
    return {
        "fingerprint": region.fingerprint,
        "model": region.model,
        "level": region.level,
        "cut": region.cut,
        "entry": _port(region.entry),
        "exit": _port(region.exit),
        "entries": [_port(entry) for entry in region.entries],
        "skipped": [f"{call.path} (call {call.ordinal})" for call in region.skipped],
    }


def misdescribed(saved: Mapping[str, Any]) -> list[str]:
    """What a file says of a region, and cannot be: names of the parts. Earlier versions leave some of them out."""
    values = {name: value for name, value in saved.items() if value is not None or name in ("level", "cut", "skipped")}
    cut, edges = values.get("cut", "outer"), [values.get("entry", {}), values.get("exit", {})]
    entries, skipped = values.get("entries", []), values.get("skipped", [])
    right = {
        "fingerprint": isinstance(values.get("fingerprint", ""), str),
        "level": is_whole(values.get("level", 1), 0 if cut == "hand" else 1),
        "cut": cut in ("outer", "paper", "hand"),
        "entry": isinstance(edges[0], Mapping) and (cut != "hand" or isinstance(edges[0].get("path"), str)),
        "exit": isinstance(edges[1], Mapping) and (cut != "hand" or isinstance(edges[1].get("path"), str)),
        "entries": isinstance(entries, list) and all(isinstance(one, Mapping) for one in entries),
        "skipped": isinstance(skipped, list) and all(isinstance(one, str) for one in skipped),
    }
    return [name for name, is_right in right.items() if not is_right]


def region_differences(saved: Mapping[str, Any], region: Region) -> dict[str, str]:
    """What tells the region from the saved one, name → "saved, here"; empty where they are the same.

    Their fingerprints tell, whatever the modules are called. Those of earlier versions were made of names, so these are
    compared. The class name is told only where something else differs: a subclass has the same regions.
    """
    here = described_region(region)
    if saved.get("fingerprint") == here["fingerprint"]:
        return {}
    if not is_portable(saved.get("fingerprint")) and _names(saved) == _names(here):
        return {}
    differing: dict[str, str] = {}
    for name in ("model", "level", "cut"):
        if saved.get(name) != here[name]:
            differing[name] = f"{saved.get(name)} → {here[name]}"
    for name in ("entry", "exit"):
        for part in ("path", "call", "channels"):
            was, now = (saved.get(name) or {}).get(part), here[name][part]
            if was != now:
                differing[f"{name} {part}"] = f"{was} → {now}"
    for name, was, now in (
        ("entries", [str(e.get("path")) for e in saved.get("entries", ())], [e["path"] for e in here["entries"]]),
        ("skipped calls", list(saved.get("skipped", ())), here["skipped"]),
    ):
        lists = [("only saved", [x for x in was if x not in now]), ("only here", [x for x in now if x not in was])]
        if any(some for _, some in lists):
            differing[name] = "; ".join(f"{word}: {_few(some)}" for word, some in lists if some)
    return differing or {"fingerprint": f"{saved.get('fingerprint')} → {here['fingerprint']}"}


def name_advice(saved: Mapping[str, Any] | None) -> str:
    """What else to do about a file of an earlier version, whose fingerprint tells names; "" for any other."""
    if not saved or is_portable(saved.get("fingerprint")):
        return ""
    return "; the file is of an earlier version and knows its region by names: where these are others, make one anew"


def saved_options(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of `Choice` that find the region again; none where the adaptor knows of no region.

    Where no region has the fingerprint, level and cut find the one to compare with.
    """
    if not saved:
        return {}
    return _options(saved, [call.partition(" (call")[0] for call in saved.get("skipped", ())])


def _options(data: Mapping[str, Any], skipped: Iterable[str]) -> dict[str, Any]:
    """The options of `Choice` that find a described region, whose skipped calls are of these modules, again."""
    if data.get("cut") == "hand" and len(data.get("entries", ())) > 1:
        return {"modules": list(dict.fromkeys(skipped))}
    if data.get("cut") == "hand":
        return {"entry": data["entry"]["path"], "exit": data["exit"]["path"]}
    return {name: data.get(name, usual) for name, usual in (("level", 1), ("cut", "outer"), ("fingerprint", None))}


def _names(region: Mapping[str, Any]) -> Any:
    """What the fingerprints of earlier versions were made of: an operator has another name in another mode."""

    def port(value: Any) -> Any:
        path = str((value or {}).get("path"))
        return {**(value or {}), "path": path[path.find(" in ") :] if " in " in path else path}

    ports = port(region.get("exit")), *map(port, region.get("entries") or ())
    return ports, list(region.get("skipped") or ())


def _port(boundary: Boundary) -> dict[str, Any]:
    try:
        channels: int | None = Layout.of_boundary(boundary).channels
    except AdaptorError:
        channels = None
    return {"path": boundary.path, "call": boundary.call, "channels": channels}


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")

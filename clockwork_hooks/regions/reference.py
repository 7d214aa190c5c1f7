"""What an adaptor remembers of the region that it was made for, and how another region differs from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.regions.fingerprint import is_portable
from clockwork_hooks.regions.layout import Layout
from clockwork_hooks.regions.region import Boundary, Region

__all__ = ["advice", "describe", "differences", "options"]


def describe(region: Region) -> dict[str, Any]:
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


def differences(saved: Mapping[str, Any], region: Region) -> dict[str, str]:
    """What tells the region from the saved one, name → "saved, here"; empty where they are the same.

    Their fingerprints tell, whatever the modules are called. Those of earlier versions were made of names, so these are
    compared. The class name is told only where something else differs: a subclass has the same regions.
    """
    here = describe(region)
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


def advice(saved: Mapping[str, Any] | None) -> str:
    """What else to do about a file of an earlier version, whose fingerprint tells names; "" for any other."""
    if not saved or is_portable(saved.get("fingerprint")):
        return ""
    return "; the file is of an earlier version and knows its region by names: where these are others, make one anew"


def options(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of `Choice` that find the region again; none where the adaptor knows of no region.

    Where no region has the fingerprint, level and cut find the one to compare with.
    """
    if not saved:
        return {}
    if saved.get("cut") == "hand" and len(saved.get("entries", ())) > 1:
        return {"modules": list(dict.fromkeys(call.partition(" (call")[0] for call in saved["skipped"]))}
    if saved.get("cut") == "hand":
        return {"entry": saved["entry"]["path"], "exit": saved["exit"]["path"]}
    where = {"level": saved.get("level", 1), "cut": saved.get("cut", "outer")}
    return {**where, "fingerprint": saved.get("fingerprint")}


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

"""Regions named by hand, by their two ends or by the modules to skip; what is named is checked, not taken on trust."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.regions.build import between, build
from clockwork_hooks.regions.facts import Facts, nodes_of
from clockwork_hooks.regions.region import Region

__all__ = ["by_ends", "by_modules", "near"]


def near(path: str, paths: Iterable[str]) -> str:
    """The paths most like a wrong one, for an error."""
    return ", ".join(difflib.get_close_matches(path, list(dict.fromkeys(paths)), n=5, cutoff=0.4)) or "none"


# -- by its two ends ------------------------------------------------------------------------------------------------


def by_ends(facts: Facts, entry: str, exit: str) -> Region:
    """What lies between two module outputs: what depends on the entry and has no path that misses the exit.

    Raises:
        ArgumentError: a path is none of a module that returns one tensor depending on the sample.
        RegionNotFoundError: something else enters, or something goes round the exit.
    """
    source, target = (_output_of(facts, path, role) for path, role in ((entry, "entry"), (exit, "exit")))
    region = between(facts, source, target, level=0, cut="hand")
    if region is None:
        inside = facts.dominance.between(source, target)
        others = {facts.name(u) for u, _ in facts.dominance.crossing(facts.dominance.mask(inside))[0]} - {entry}
        raise RegionNotFoundError(
            "every path from the entry must pass the exit, and nothing else that depends on the sample may enter",
            seen={
                "entry": entry,
                "exit": exit,
                "also enters": ", ".join(sorted(others)) or "nothing",
                "goes round the exit": ", ".join(_round(facts, source, target)[:5]) or "nothing",
            },
            do="choose a later entry or an earlier exit; print(ch.trace(...).graph) shows the paths",
        )
    return region


def _round(facts: Facts, source: int, target: int) -> list[str]:
    """What comes from the source and reaches the output without the target, up to where the target is made."""
    trace, dominance = facts.trace, facts.dominance
    reached = trace.reachable([trace.nodes[source]])
    between = [n for n in range(source + 1, target) if trace.nodes[n] in reached and dominance.live[n]]
    return list(dict.fromkeys(facts.name(n) for n in between if not dominance.within(n, target)))


def _output_of(facts: Facts, path: str, role: str) -> int:
    for call in reversed(facts.trace.calls):
        if call.path == path:
            nodes = nodes_of(call.output)
            if len(nodes) == 1 and facts.dominance.dep[nodes[0]]:
                return nodes[0]
    modules = [call.path for call in facts.trace.calls if call.path and len(nodes_of(call.output)) == 1]
    raise ArgumentError(
        f"the {role} is a called module that returns one tensor depending on the sample",
        seen={role: path, "near it": near(path, modules), "such modules": ", ".join(dict.fromkeys(modules[:40]))},
        do="pass one of these dotted paths",
    )


# -- by the modules to skip -----------------------------------------------------------------------------------------


def by_modules(facts: Facts, modules: Iterable[str]) -> Region:
    """All calls of these modules, if one of them returns a tensor that every path from all of them passes.

    Args:
        facts: of one trace.
        modules: dotted paths; "blocks.4:blocks.20" stands for these two and their siblings called in between.

    Raises:
        ArgumentError: a path is none of a module that is called.
        RegionNotFoundError: there are several exits, a module in between is not named, or a named one also serves
            what is not skipped.
    """
    trace, dominance = facts.trace, facts.dominance
    paths = [path for name in modules for path in _expanded(facts, name)]
    calls = [call for call in trace.calls if call.path in set(paths)]
    named = {n for call in calls for n in _operators(facts, call)}
    carrying = {n for n in named if dominance.dep[n]}
    if not carrying:
        raise RegionNotFoundError(
            "a region depends on the sample", seen={"modules": ", ".join(paths)}, do="name modules that see the sample"
        )
    target = _exit(facts, calls, carrying)
    region = build(facts, target, dominance.around(carrying, target), level=0, cut="hand")
    skipped = {(call.path, call.ordinal) for call in region.skipped} if region else set()
    run = {n for call in trace.calls if (call.path, call.ordinal) in skipped for n in _operators(facts, call)}
    if region is None or not named <= run:
        raise RegionNotFoundError(
            "all that a skipped module computes serves the exit alone",
            seen={"also used elsewhere": ", ".join(c.path or "" for c in calls if not _operators(facts, c) <= run)},
            do="leave these modules out, or name the smaller ones inside of them",
        )
    if others := _unnamed(facts, named, run):
        raise RegionNotFoundError(
            "what lies between the modules of a region is skipped with them",
            seen={"modules": ", ".join(paths), "not named": ", ".join(others)},
            do='name these too; "first:last" stands for a whole range',
        )
    return region


def _expanded(facts: Facts, name: str) -> list[str]:
    """The paths that one name stands for."""
    called = list(dict.fromkeys(call.path for call in facts.trace.calls if call.path))
    first, colon, last = name.partition(":")
    for path in (first, last) if colon else (first,):
        if path not in called:
            inside = [other for other in called if other.startswith(f"{path}.")]
            raise ArgumentError(
                "modules= names modules that the UNet calls",
                seen={"not called": path, "near it": ", ".join(inside[:5]) or near(path, called)},
                do="pass dotted paths as in named_modules(); a list of modules is not called, its modules are",
            )
    if not colon:
        return [first]
    siblings = [path for path in called if path.rpartition(".")[0] == first.rpartition(".")[0]]
    if last not in siblings or siblings.index(first) > siblings.index(last):
        raise ArgumentError(
            "a range goes from a module to one beside it that is called later",
            seen={"range": name, "beside the first": ", ".join(siblings)},
            do="pass for example blocks.4:blocks.20",
        )
    return siblings[siblings.index(first) : siblings.index(last) + 1]


def _operators(facts: Facts, call: ModuleCall) -> set[int]:
    """The live operators of a call."""
    nodes = range(call.first, call.last)
    return {n for n in nodes if facts.dominance.live[n] and facts.trace.nodes[n].op == "call_function"}


def _exit(facts: Facts, calls: list[ModuleCall], carrying: set[int]) -> int:
    """The one tensor among the outputs of the named calls that everything from them passes."""
    outputs = [n for call in calls for n in nodes_of(call.output)]
    dominance = facts.dominance
    for o in sorted(set(outputs), reverse=True):
        if dominance.dep[o] and all(dominance.within(n, o) for n in carrying):
            return o
    last = max((o for o in outputs if dominance.dep[o] and dominance.live[o]), default=max(carrying))
    outside = [
        c.path or "" for c in calls if any(not dominance.within(n, last) for n in _operators(facts, c) & carrying)
    ]
    raise RegionNotFoundError(
        "a region leaves through one tensor, which one of its modules returns and every path from the others passes",
        seen={"last output": facts.name(last), "goes round it": ", ".join(dict.fromkeys(outside)) or "nothing"},
        do="name the module where these come together too, or leave them out",
    )


def _unnamed(facts: Facts, named: set[int], run: set[int]) -> list[str]:
    """The outermost skipped calls with MACs and nothing named inside."""
    unnamed: list[str] = []
    until = 0
    for call in facts.trace.calls:
        nodes = _operators(facts, call)
        if call.path and call.first >= until and nodes and nodes <= run and not nodes & named:
            unnamed += [call.path] if any(facts.trace.macs[n] for n in nodes) else []
            until = call.last
    return list(dict.fromkeys(unnamed))

"""Why has a UNet no region? One sentence for the error."""

from __future__ import annotations

import math
from collections import Counter

from clockwork_hooks.builder import Builder
from clockwork_hooks.calls import ModuleCall
from clockwork_hooks.dominance import Dominance
from clockwork_hooks.graph import Trace
from clockwork_hooks.levels import Levels
from clockwork_hooks.report import shape

__all__ = ["reason"]


def reason(trace: Trace, dom: Dominance, levels: Levels, build: Builder, *, small: bool) -> str:
    """What stands in the way of a region: no lower resolution, several ways back up or none, its size, or no skip."""
    worked = _worked(trace, dom, levels, build)
    if len(worked) < 2:
        return f"no resolution change: every layer works at {_space(levels, max(worked, default=0))}"
    top = max(worked)
    exits = _upward(trace, dom, levels, build, top)
    if len(exits) > 1:
        names = [name if count == 1 else f"{name} ({count}×)" for name, count in Counter(exits).items()]
        return f"no single exit: several exits lead back up: {', '.join(names)}"
    if not exits:
        return f"nothing leads back up to {_space(levels, top)}"
    if small:
        return f"what lies below {_space(levels, top)} is too small a part"
    return (
        f"nothing of {_space(levels, top)} goes round the low resolutions: all passes {exits[0]}, and kept from the "
        "step before it would repeat that step's output"
    )


def _space(levels: Levels, positions: int) -> str:
    return shape(levels.spatial.get(positions, ())) or "one resolution"


def _worked(trace: Trace, dom: Dominance, levels: Levels, build: Builder) -> set[int]:
    """Positions of what modules make of the sample; gates of one pixel left out, and filters padded by functions."""
    made = {spec.node.meta["index"] for call in trace.calls if call.path for spec in build.tensors(call.output)}
    found = {levels.positions(dom.nodes[n]) or 0 for n in made if dom.live[n] and dom.dep[n]}
    return {p for p in found if math.prod(levels.spatial.get(p, ())) > 1}


def _upward(trace: Trace, dom: Dominance, levels: Levels, build: Builder, top: int) -> list[str]:
    """What takes lower resolutions and gives the highest: the outermost such module calls, then bare operators."""

    def of(nodes: list[int]) -> set[int]:
        """Positions of those that depend on the sample; gates of one pixel and unknown ones left out."""
        found = {levels.positions(dom.nodes[n]) or 0 for n in nodes if dom.dep[n] and dom.live[n]}
        return {p for p in found if math.prod(levels.spatial.get(p, (1,))) > 1}

    def lifts(call: ModuleCall) -> bool:
        taken, given = (of([s.node.meta["index"] for s in build.tensors(v)]) for v in (call.inputs, call.output))
        return given == {top} and bool(taken) and max(taken) < top

    names: dict[int, str] = {}
    inside: set[int] = set()
    for call in trace.calls[1:]:
        if call.path and call.first not in inside and lifts(call):
            names[call.first] = call.path
            inside.update(range(call.first, call.last))
    space = levels.spatial[top]
    for n, node in enumerate(dom.nodes):
        below = of(dom.sources[n])
        folded = tuple(node.meta.get("shape", ()))[-len(space) :] != space  # channels in the batch, space to channels
        if n not in inside and not folded and of([n]) == {top} and below and min(below) < top:
            names[n] = build.name(n)
    return [name for _, name in sorted(names.items())]

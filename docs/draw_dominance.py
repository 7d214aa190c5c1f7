"""Why the exit is where it is: two small UNets as graphs, with the place where each operator's ways out meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.regions.flow import Dominance
from clockwork_hooks.reports.u_drawing import Box, Drawing, Line, Word, save, svg

LEFT, TOP, STEP, WIDE, HIGH, ROW, PANEL = 92.0, 96.0, 120.0, 92.0, 44.0, 92.0, 252.0


class OneWayOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)
        self.down, self.body = nn.Conv2d(8, 32, 4, 2, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.up = nn.ConvTranspose2d(32, 8, 4, 2, 1)

    def forward(self, x: Any) -> Any:
        fine = self.stem(x)
        return self.head(torch.cat([fine, self.up(self.body(self.down(fine)))], 1))


class TwoWaysOut(OneWayOut):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.head = nn.ConvTranspose2d(32, 8, 4, 2, 1), nn.Conv2d(24, 3, 3, 1, 1)

    def forward(self, x: Any) -> Any:
        fine = self.stem(x)
        coarse = self.body(self.down(fine))
        return self.head(torch.cat([fine, self.up(coarse), self.side(coarse)], 1))


@dataclass(frozen=True, slots=True)
class Picture:
    page: Drawing

    def to_svg(self) -> str:
        return svg(self.page)

    def save(self, path: str | Path) -> None:
        save(self.page, path)


def picture() -> Picture:
    page = Drawing("Two small UNets as graphs of operators: where the ways of each to the output meet", 2 * PANEL + 24)
    for number, unet in enumerate((OneWayOut().eval(), TwoWaysOut().eval())):
        page.shapes += panel(unet, number * PANEL)
    return Picture(page)


def panel(unet: nn.Module, top: float) -> list[Any]:
    traced = ch.trace(unet, torch.zeros(1, 3, 16, 16))
    ways = Dominance(traced)
    found = [k for k, node in enumerate(traced.nodes) if ways.dep[k] and node.op == "call_function"]
    names = {k: traced.nodes[k].meta["module"] or str(traced.nodes[k].target).split(".")[1] for k in found}
    try:
        region, why = ch.find_region(unet, torch.zeros(1, 3, 16, 16)), ""
    except ch.RegionNotFoundError as error:
        region, why = None, str(error.seen["why"])
    exit = next((k for k in found if region is not None and names[k] == region.exit.path), None)
    inside = {k for k in found if exit is not None and ways.within(k, exit)}
    at = {k: (LEFT + j * STEP, top + TOP + ROW * (traced.nodes[k].meta["shape"][-1] < 16)) for j, k in enumerate(found)}

    shapes: list[Any] = [Word(16, top + 28, type(unet).__name__, size=16, bold=True)]
    told = f"all that reaches the output through {names[exit]} alone is skipped" if exit is not None else why
    shapes.append(Word(16, top + 48, told, kind="quiet" if exit is not None else "edge", size=12))
    shapes += [
        Word(16, top + TOP + ROW * row + 27, size, size=13, bold=True) for row, size in enumerate(("16×16", "8×8"))
    ]
    for k in inside:
        low = at[k][1] > top + TOP
        shapes.append(Box(at[k][0] - 14, at[k][1] - 10 - 28 * low, WIDE + 28, HIGH + 20 + 28 * low, "region"))
    shapes += [edge(at[u], at[k]) for k in found for u in ways.sources[k] if u in at]
    for k in found:
        x, y = at[k]
        shapes += [
            Box(x, y, WIDE, HIGH, "skipped" if k in inside else "block"),
            Word(x + WIDE / 2, y + 19, names[k], "middle", size=13),
            Word(x + WIDE / 2, y + 35, f"meet at {names.get(ways.parent[k], 'output')}", "middle", "quiet"),
        ]
    return shapes


def edge(a: tuple[float, float], b: tuple[float, float]) -> Line:
    """Along a row, over what lies between in it, or from one row to the other."""
    (x1, y1), (x2, y2) = a, b
    if y1 == y2 and x2 - x1 <= STEP:
        return Line(((x1 + WIDE, y1 + HIGH / 2), (x2, y2 + HIGH / 2)), "flow", arrow=True)
    if y1 == y2:
        lift = 14 + (x2 - x1) / 12
        return Line(
            ((x1 + WIDE / 2, y1), ((x1 + x2 + WIDE) / 2, y1 - lift), (x2 + WIDE / 2 - 12, y2)), "skip", arrow=True
        )
    down = y2 > y1
    start = (x1 + WIDE, y1 + HIGH - 6) if down else (x1 + WIDE, y1 + 6)
    return Line((start, (x2 if down else x2 + 8, y2 + (6 if down else HIGH))), "flow", arrow=True)

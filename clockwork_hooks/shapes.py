"""Boxes, lines and words on a page, and the page as SVG or PNG."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.needed import need

__all__ = ["WIDTH", "Box", "Drawing", "Line", "Word", "save", "svg"]

WIDTH = 960.0
# kind → (fill, line) on light and on dark paper
COLOURS = {
    "block": (("#c9d8ec", "#5b7fae"), ("#30435f", "#7fa3d4")),
    "skipped": (("#f6cfa0", "#c77f1f"), ("#6b4718", "#e3a95a")),
    "region": (("#fdf0dc", "none"), ("#33260f", "none")),
    "skip": (("none", "#8a94a3"), ("none", "#7d8899")),
    "flow": (("none", "#5b7fae"), ("none", "#7fa3d4")),
    "mark": (("none", "#b3411d"), ("none", "#f0865f")),
    "word": (("#1d2733", "none"), ("#e4eaf2", "none")),
    "quiet": (("#5a6675", "none"), ("#9aa7b8", "none")),
    "edge": (("#b3411d", "none"), ("#f0865f", "none")),
}
PAPER = ("#ffffff", "#14181f")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; `title` is shown when the mouse rests on it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A quadratic curve for three points (the middle one is its control point), else straight from point to point."""

    points: tuple[tuple[float, float], ...]
    kind: str
    arrow: bool = False


@dataclass(frozen=True, slots=True)
class Word:
    """A line of text; `anchor` is "start", "middle" or "end"; `upright` text reads from bottom to top."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str = "word"
    size: float = 11.0
    bold: bool = False
    upright: bool = False


@dataclass(slots=True)
class Drawing:
    """Shapes on a page of `WIDTH` × `height` pixels, those at the back first."""

    title: str
    height: float = 0.0
    shapes: list[Box | Line | Word] = field(default_factory=list)


def svg(page: Drawing) -> str:
    """The page as SVG text; colours follow the reader's light or dark mode."""
    rules = [
        [f".{kind}{{fill:{pair[mode][0]};stroke:{pair[mode][1]}}}" for kind, pair in COLOURS.items()] for mode in (0, 1)
    ]
    style = (
        f".ch-u{{font-family:system-ui,sans-serif;background:{PAPER[0]}}}" + "".join(f".ch-u {r}" for r in rules[0])
        + f"@media screen and (prefers-color-scheme:dark){{.ch-u{{background:{PAPER[1]}}}"
        + "".join(f".ch-u {r}" for r in rules[1]) + "}"
    )  # fmt: skip
    body = "\n".join(map(_svg_of, page.shapes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ch-u" viewBox="0 0 {WIDTH:g} {page.height:g}" role="img" '
        f'width="100%" style="max-width:{WIDTH:g}px">\n<title>{escape(page.title)}</title>\n<style>{style}</style>\n'
        '<defs><marker id="ch-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="flow" d="M0 0L8 4L0 8" /></marker></defs>\n'
        f"{body}\n</svg>\n"
    )


def _svg_of(shape: Box | Line | Word) -> str:
    if isinstance(shape, Box):
        title = f"<title>{escape(shape.title)}</title>" if shape.title else ""
        return (
            f'<rect class="{shape.kind}" x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" '
            f'height="{shape.height:.1f}" rx="3">{title}</rect>'
        )
    if isinstance(shape, Line):
        points = [f"{x:.1f} {y:.1f}" for x, y in shape.points]
        path = f"M{points[0]}Q{points[1]} {points[2]}" if len(points) == 3 else f"M{'L'.join(points)}"
        arrow = ' marker-end="url(#ch-arrow)"' if shape.arrow else ""
        return f'<path class="{shape.kind}" d="{path}"{arrow} />'
    bold = ' font-weight="600"' if shape.bold else ""
    turn = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.upright else ""
    return (
        f'<text class="{shape.kind}" x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" '
        f'font-size="{shape.size:g}"{bold}{turn}>{escape(shape.text)}</text>'
    )


def save(page: Drawing, path: str | Path) -> None:
    """Write the page to an .svg or a .png file.

    Raises:
        ArgumentError: another ending, or a PNG where matplotlib is missing.
    """
    target = Path(path)
    if target.suffix == ".svg":
        target.write_text(svg(page), encoding="utf-8")
    elif target.suffix == ".png":
        _png(page, target)
    else:
        raise ArgumentError(
            "a diagram is written as SVG or PNG", seen={"file": target}, do="end the name with .svg or .png"
        )


def _png(page: Drawing, target: Path) -> None:
    need("a diagram's PNG is drawn by matplotlib, its SVG needs none", "matplotlib", install="clockwork-hooks[plot]")
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    figure = Figure(figsize=(WIDTH / 96, page.height / 96), dpi=192)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(page.height, 0))
    axes.axis("off")
    for item in page.shapes:
        fill, line = COLOURS[item.kind][0]
        if isinstance(item, Box):
            patch = FancyBboxPatch(
                (item.x + 3, item.y + 3), max(item.width - 6, 0.1), item.height - 6, boxstyle="round,pad=3",
                facecolor=fill, edgecolor=line, linewidth=0.8,
            )  # fmt: skip
            axes.add_patch(patch)
        elif isinstance(item, Line):
            codes = [Curve.MOVETO, *[Curve.CURVE3 if len(item.points) == 3 else Curve.LINETO] * (len(item.points) - 1)]
            look: dict[str, Any] = {"edgecolor": line, "linewidth": 0.9, "fill": False}
            path = Curve(list(item.points), codes)
            arrow = {"arrowstyle": "->", "mutation_scale": 7.0, **look}
            axes.add_patch(FancyArrowPatch(path=path, **arrow) if item.arrow else PathPatch(path, **look))
        else:
            axes.text(
                item.x - 3 * item.upright,
                item.y,
                item.text,
                color=fill,
                fontsize=item.size * 0.72,
                ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
                va="center" if item.upright else "baseline",
                weight="bold" if item.bold else "normal",
                rotation=90 if item.upright else 0,
            )
    figure.savefig(target)

"""Blocks of several levels drawn as a U: a row a level, the way down on the left, the way up on the right.

A `Drawing` describes the page: boxes, lines and words. Pages and notebooks show it as SVG, which is written here: its
blocks have titles, its colours follow the reader, and it needs no package. matplotlib prints the same drawing as PNG.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from clockwork_hooks._numbers import macs, percent, shape
from clockwork_hooks.errors import ArgumentError, first_line, need

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


def svg(drawing: Drawing) -> str:
    """The drawing as SVG text; colours follow the reader's light or dark mode."""
    rules = [
        [f".{kind}{{fill:{pair[mode][0]};stroke:{pair[mode][1]}}}" for kind, pair in COLOURS.items()] for mode in (0, 1)
    ]
    style = (
        f".ch-u{{font-family:system-ui,sans-serif;background:{PAPER[0]}}}" + "".join(f".ch-u {r}" for r in rules[0])
        + f"@media screen and (prefers-color-scheme:dark){{.ch-u{{background:{PAPER[1]}}}"
        + "".join(f".ch-u {r}" for r in rules[1]) + "}"
    )  # fmt: skip
    body = "\n".join(map(_svg_of, drawing.shapes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ch-u" viewBox="0 0 {WIDTH:g} {drawing.height:g}" role="img" '
        f'width="100%" style="max-width:{WIDTH:g}px">\n<title>{escape(drawing.title)}</title>\n<style>{style}</style>\n'
        '<defs><marker id="ch-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="flow" d="M0 0L8 4L0 8" /></marker></defs>\n'
        f"{body}\n</svg>\n"
    )


def _svg_of(item: Box | Line | Word) -> str:
    if isinstance(item, Box):
        title = f"<title>{escape(item.title)}</title>" if item.title else ""
        return (
            f'<rect class="{item.kind}" x="{item.x:.1f}" y="{item.y:.1f}" width="{item.width:.1f}" '
            f'height="{item.height:.1f}" rx="3">{title}</rect>'
        )
    if isinstance(item, Line):
        points = [f"{x:.1f} {y:.1f}" for x, y in item.points]
        path = f"M{points[0]}Q{points[1]} {points[2]}" if len(points) == 3 else f"M{'L'.join(points)}"
        arrow = ' marker-end="url(#ch-arrow)"' if item.arrow else ""
        return f'<path class="{item.kind}" d="{path}"{arrow} />'
    bold = ' font-weight="600"' if item.bold else ""
    turn = f' transform="rotate(-90 {item.x:.1f} {item.y:.1f})"' if item.upright else ""
    return (
        f'<text class="{item.kind}" x="{item.x:.1f}" y="{item.y:.1f}" text-anchor="{item.anchor}" '
        f'font-size="{item.size:g}"{bold}{turn}>{escape(item.text)}</text>'
    )


def save(drawing: Drawing, path: str | Path) -> None:
    """Write the drawing to an .svg or a .png file.

    Its folder is made if need be.

    Raises:
        ArgumentError: another ending, a file that cannot be written, or a PNG where matplotlib is missing.
    """
    target = Path(path)
    if target.suffix not in (".svg", ".png"):
        raise ArgumentError(
            "a diagram is written as SVG or PNG", seen={"file": target}, do="end the name with .svg or .png"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".svg":
            target.write_text(svg(drawing), encoding="utf-8")
        else:
            _png(drawing, target)
    except OSError as error:
        raise ArgumentError(
            "a diagram goes to a file that can be written",
            seen={"file": target, "error": first_line(error)},
            do="name another one",
        ) from error


def _png(drawing: Drawing, target: Path) -> None:
    need("a diagram's PNG is drawn by matplotlib, its SVG needs none", "matplotlib", install="clockwork-hooks[plot]")
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, Rectangle
    from matplotlib.path import Path as Curve

    figure = Figure(figsize=(WIDTH / 96, drawing.height / 96), dpi=192)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(drawing.height, 0))
    axes.axis("off")
    for item in drawing.shapes:
        fill, line = COLOURS[item.kind][0]
        if isinstance(item, Word):
            look: dict[str, Any] = {"color": fill, "fontsize": 0.72 * item.size, "weight": 700 if item.bold else 400}
            turned: dict[str, Any] = {"rotation": 90, "va": "center"} if item.upright else {}
            side = {"start": "left", "middle": "center", "end": "right"}[item.anchor]
            axes.text(item.x - 3 * item.upright, item.y, item.text, ha=side, **look, **turned)
        elif isinstance(item, Box):
            box = Rectangle((item.x, item.y), item.width, item.height, facecolor=fill, edgecolor=line, linewidth=0.8)
            axes.add_patch(box)
        else:
            turn = Curve.CURVE3 if len(item.points) == 3 else Curve.LINETO
            path = Curve(list(item.points), [Curve.MOVETO, *[turn] * (len(item.points) - 1)])
            arrow: dict[str, Any] = {"arrowstyle": "->" if item.arrow else "-", "mutation_scale": 7}
            axes.add_patch(FancyArrowPatch(path=path, edgecolor=line, linewidth=0.9, fill=False, **arrow))
    figure.savefig(target)


MARGIN, TOP = 16.0, 82.0
LABEL = 118.0  # left of the U: resolution and MACs of each level
ROW, GAP = 66.0, 40.0
MIDDLE = 56.0  # the least room between the two arms
SPACE, THIN = 3.0, 5.0
TURN = 13.0  # how far above the lower row the flow turns
LETTER = 6.1  # width of a letter of 11 px text, about


class Shaded(Protocol):
    """What of a `Region` the picture tells."""

    @property
    def entry(self) -> Any:
        """What flows in: its path and shape."""

    @property
    def exit(self) -> Any:
        """What flows out, likewise."""

    @property
    def sides(self) -> Any:
        """What else flows in: kinds and shapes."""


@dataclass(frozen=True, slots=True)
class Block:
    """Module calls that work at one level.

    Attributes:
        name: dotted path of the module; of what they have in common for several.
        level: index into `Diagram.levels`.
        arm: on the way down, or on the way up. The bottleneck counts as down.
        macs: at the traced batch, attention products counted.
        skipped: an adaptor pass does not run it.
        calls: how many module calls are drawn as this block.
        first, last: the nodes from `first` to before `last` are its own.
    """

    name: str
    level: int
    arm: Literal["down", "up"]
    macs: int
    skipped: bool
    calls: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Skip:
    """A tensor that goes round the levels below: indices of the blocks that it leaves and reaches."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Diagram:
    """A UNet's levels, blocks and skips, with its region.

    Attributes:
        model: class name.
        levels: spatial shapes, highest resolution first.
        blocks: in the order in which they run.
        skips: between blocks of the two arms.
        region: the `Region` that adaptor passes skip; None where there is none.
    """

    model: str
    levels: tuple[tuple[int, ...], ...]
    blocks: tuple[Block, ...]
    skips: tuple[Skip, ...]
    region: Shaded | None

    def cell(self, level: int, arm: str) -> tuple[int, ...]:
        """Indices of the blocks of one arm of one level."""
        return tuple(k for k, block in enumerate(self.blocks) if (block.level, block.arm) == (level, arm))

    def to_svg(self) -> str:
        """The picture as SVG text: needs no network, and follows the reader's light or dark mode."""
        return svg(draw(self))

    def save(self, path: str | Path) -> None:
        """Write the picture to a file whose ending tells the format: .svg, or .png (with matplotlib).

        Raises:
            ArgumentError: another ending, or a PNG where matplotlib is missing.
        """
        save(draw(self), path)

    def _repr_svg_(self) -> str:
        return self.to_svg()


def draw(diagram: Diagram) -> Drawing:
    """Lay out the U: a row for each level, the way down on the left, the way up on the right."""
    drawing = Drawing(f"{diagram.model} as a U: blocks sized by MACs, the region that adaptor passes skip shaded")
    places = _place(diagram)
    drawing.height = TOP + len(diagram.levels) * (ROW + GAP) + 62
    lines = [*_flow(diagram, places), *_arcs(diagram, places)]
    drawing.shapes += [*_shade(diagram, places), *lines, *_boxes(diagram, places), *_marks(diagram, places, lines)]
    drawing.shapes += _words(diagram, drawing.height)
    return drawing


def _row(level: int) -> float:
    return TOP + 12 + level * (ROW + GAP)


def _place(diagram: Diagram) -> dict[int, Box]:
    """Where each block goes: widths by MACs, one scale for all, an arm a little further in at each level."""
    depth = max(len(diagram.levels) - 1, 1)
    left, right = MARGIN + LABEL, WIDTH - MARGIN
    step = min(34.0, 150.0 / depth)
    rooms = [(right - left - 2 * level * step - MIDDLE) / 2 for level in range(len(diagram.levels))]
    cells = {(level, arm): diagram.cell(level, arm) for level in range(len(diagram.levels)) for arm in ("down", "up")}
    one_arm = not any(block.arm == "up" for block in diagram.blocks)

    def room(level: int) -> float:
        return 2 * rooms[level] if one_arm or not cells[level, "up"] else rooms[level]

    scale = min(
        (
            (room(level) - SPACE * len(cell) - THIN * len(cell)) / max(sum(diagram.blocks[k].macs for k in cell), 1)
            for (level, _), cell in cells.items()
            if cell
        ),
        default=1.0,
    )
    places: dict[int, Box] = {}
    for (level, arm), cell in cells.items():
        widths = [THIN + scale * diagram.blocks[k].macs for k in cell]
        total = sum(widths) + SPACE * max(len(cell) - 1, 0)
        x = left + level * step if arm == "down" else right - level * step - total
        if arm == "down" and not cells[level, "up"] and not one_arm:
            x = (left + right - total) / 2  # the bottleneck closes the U
        for k, width in zip(cell, widths, strict=True):
            block = diagram.blocks[k]
            places[k] = Box(x, _row(level), width, ROW, "skipped" if block.skipped else "block", _title(block, diagram))
            x += width + SPACE
    return places


def _title(block: Block, diagram: Diagram) -> str:
    total = sum(other.macs for other in diagram.blocks) or 1
    calls = f", {block.calls} calls" if block.calls > 1 else ""
    runs = "skipped on adaptor passes" if block.skipped else "runs on every pass"
    return (
        f"{block.name}{calls}: {macs(block.macs)}, {percent(block.macs / total)}, "
        f"{shape(diagram.levels[block.level])}, {runs}"
    )


def _shade(diagram: Diagram, places: dict[int, Box]) -> Iterator[Box]:
    """The region behind its blocks, a band for each level; bands of neighbouring levels touch."""
    for level in range(len(diagram.levels)):
        inside = [places[k] for k, block in enumerate(diagram.blocks) if block.level == level and block.skipped]
        if inside:
            first, last = min(box.x for box in inside), max(box.x + box.width for box in inside)
            below = any(block.level == level + 1 and block.skipped for block in diagram.blocks)
            yield Box(first - 6, _row(level) - 8, last - first + 12, ROW + (GAP if below else 16), "region")


def _flow(diagram: Diagram, places: dict[int, Box]) -> Iterator[Line]:
    """From each block to the next one, where that is at another level."""
    for k in range(len(diagram.blocks) - 1):
        a, b = diagram.blocks[k], diagram.blocks[k + 1]
        if a.level != b.level:
            one, two = places[k], places[k + 1]
            down = b.level > a.level
            x1, y1 = one.x + one.width / 2, one.y + (ROW if down else 0)
            x2, y2 = two.x + two.width / 2, two.y + (0 if down else ROW)
            between = max(y1, y2) - TURN  # nearer to the lower row: the words at the marks hang from the upper one
            yield Line(((x1, y1), (x1, between), (x2, between), (x2, y2)), "flow", arrow=True)


def _arcs(diagram: Diagram, places: dict[int, Box]) -> Iterator[Line]:
    arriving: dict[int, int] = {}
    total = {target: sum(s.target == target for s in diagram.skips) for target in {s.target for s in diagram.skips}}
    for skip in sorted(diagram.skips, key=lambda s: (s.target, -s.source)):
        one, two = places[skip.source], places[skip.target]
        share = arriving.get(skip.target, 0) + 1
        arriving[skip.target] = share
        x1, x2 = one.x + one.width / 2, two.x + two.width * share / (total[skip.target] + 1)
        lift = 14 + min(16.0, abs(x2 - x1) / 40)
        yield Line(((x1, one.y), ((x1 + x2) / 2, min(one.y, two.y) - 2 * lift), (x2, two.y)), "skip")


def _boxes(diagram: Diagram, places: dict[int, Box]) -> Iterator[Box | Word]:
    """Each block with as much of its name as fits, upright where it is narrow."""
    for k, block in enumerate(diagram.blocks):
        box = places[k]
        yield box
        x, y = box.x + box.width / 2, box.y + ROW / 2
        text = next((name for name in _names(block) if len(name) * LETTER + 6 <= box.width), None)
        short = next((name for name in _names(block) if len(name) * LETTER * 0.77 + 4 <= ROW), None)
        if text is None and short is None and (letters := int((box.width - 6) / LETTER)) >= 8:
            text = "…" + next(_names(block))[1 - letters :]  # transformer_blocks.0: nothing shorter tells it apart
        if text is not None:
            yield Word(x, y - 3, text, "middle")
            if len(str(macs(block.macs))) * LETTER <= box.width:
                yield Word(x, y + 12, str(macs(block.macs)), "middle", "quiet", 10)
        elif box.width >= 11:
            yield Word(x + 3.2, y, short or "…", "middle", "word", 8.5, upright=True)


def _names(block: Block) -> Iterator[str]:
    """The path, then less and less of its beginning, while it still says more than a number."""
    parts = block.name.split(".")
    more = f" ({block.calls})" if block.calls > 1 else ""
    for k in range(len(parts)):
        if k == 0 or not parts[k].isdigit():
            yield ".".join(parts[k:]) + more


def _marks(diagram: Diagram, places: dict[int, Box], lines: Iterable[Line]) -> Iterator[Word | Line]:
    """Where the region's entry and exit are, each with its word at the first place that no line crosses."""
    inside = [places[k] for k, block in enumerate(diagram.blocks) if block.skipped]
    if diagram.region is None or not inside:
        return
    points = [point for line in lines for point in _along(line)]
    for name, box, x, side in (
        ("entry", inside[0], inside[0].x - SPACE / 2, -1),
        ("exit", inside[-1], inside[-1].x + inside[-1].width + SPACE / 2, 1),
    ):
        wide = LETTER * len(name) + 4

        def crossed(place: tuple[int, float], x: float = x, wide: float = wide) -> int:
            left, low = min(x, x + place[0] * wide), place[1]
            return sum(left - 2 <= px <= left + wide + 2 and low - 11 <= py <= low + 3 for px, py in points)

        rows = [y for more in (0, 6, 12, 18) for y in (box.y + ROW + 13 + more, box.y - 5 - more)]
        turn, y = min(((turn, y) for y in rows for turn in (side, -side)), key=crossed)
        yield Line(((x, min(box.y - 12, y - 9)), (x, max(box.y + ROW + 12, y + 2))), "mark")
        yield Word(x + 4 * turn, y, name, "start" if turn > 0 else "end", "edge", 11, bold=True)


def _along(line: Line) -> Iterator[tuple[float, float]]:
    """Points of a line, of each straight piece of it, or of a quadratic Bézier curve."""
    shares = [k / 60 for k in range(61)]
    if len(line.points) == 3:
        (ax, ay), (cx, cy), (bx, by) = line.points
        for t in shares:
            a, b, c = (1 - t) ** 2, t * t, 2 * t * (1 - t)
            yield a * ax + b * bx + c * cx, a * ay + b * by + c * cy
        return
    for (ax, ay), (bx, by) in pairwise(line.points):
        yield from ((ax + t * (bx - ax), ay + t * (by - ay)) for t in shares)


def _words(diagram: Diagram, height: float) -> Iterator[Word]:
    yield Word(MARGIN, 24, diagram.model, size=16, bold=True)
    total = sum(block.macs for block in diagram.blocks)
    skipped = sum(block.macs for block in diagram.blocks if block.skipped)
    share = f", an adaptor pass skips {percent(skipped / total)}" if skipped and total else ""
    line = f"{macs(total)} a pass at the traced batch, attention products counted{share}"
    yield Word(MARGIN, 43, line, kind="quiet", size=12)
    for level, space in enumerate(diagram.levels):
        y = _row(level)
        own = sum(block.macs for block in diagram.blocks if block.level == level)
        yield Word(MARGIN, y + ROW / 2 - 4, shape(space), size=13, bold=True)
        yield Word(MARGIN, y + ROW / 2 + 13, f"{macs(own)}", kind="quiet")
    region = diagram.region
    if region is None:
        yield Word(MARGIN, height - 14, "No region can be skipped: every pass is full.", kind="edge", size=12)
        return
    counts = Counter(f"{side.kind} {shape(side.shape) or 'number'}" for side in region.sides)
    sides = "; ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items()) or "none"
    edge = f"entry {region.entry.path} {shape(region.entry.shape)} → exit {region.exit.path} {shape(region.exit.shape)}"
    yield Word(MARGIN, height - 30, edge, kind="edge", size=12)
    yield Word(MARGIN, height - 12, f"side inputs: {sides}", kind="quiet", size=12)

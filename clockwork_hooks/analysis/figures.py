"""The pictures of the analyses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from clockwork_hooks.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clockwork_hooks.analysis.drift import Drift
    from clockwork_hooks.analysis.plan import Plan
    from clockwork_hooks.analysis.robustness import Robustness

__all__ = ["curves", "grid", "heat_map", "pareto"]

_STYLES = {"first": ":", "down": "--", "bottleneck": "-.", "up": "-"}


def curves(result: Robustness) -> Figure:
    """Distance over the first disturbed step, a line a map; colours go by resolution, line styles by place."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({one.resolution for one in result.maps}, reverse=True)
    colours = {size: colormaps["viridis"](0.2 + 0.75 * k / max(len(sizes) - 1, 1)) for k, size in enumerate(sizes)}
    for one in result.maps:
        axes.plot(
            result.starts,
            result.distances[one.name],
            linestyle=_STYLES[one.kind],
            color=colours[one.resolution],
            marker="o",
            markersize=3,
            label=one.name,
        )
    axes.set(xlabel=f"disturbed from step k of {result.steps} on", ylabel="L2 distance to the undisturbed result")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_title(f"α = {result.alpha:g}, statistics per {result.statistics}", fontsize=10)
    return figure


def grid(result: Robustness) -> Figure:
    """The first picture of every cell, with the undisturbed one at the left."""
    from matplotlib.figure import Figure

    plain = result.pictures.get(("", 0))
    if plain is None or plain.ndim != 3 or plain.shape[0] not in (1, 3):
        raise ArgumentError(
            "a grid shows pictures (C, H, W) with one or three channels",
            seen={"results": None if plain is None else tuple(plain.shape)},
            do="let generate return pictures; results read from JSON have none",
        )
    rows, columns = len(result.maps), len(result.starts) + 1
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.1 * rows + 0.5), dpi=130, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for r, one in enumerate(result.maps):
        for c, start in enumerate((0, *result.starts)):
            axes = cells[r][c]
            _show(axes, plain if c == 0 else result.pictures[one.name, start])
            if r == 0:
                axes.set_title("plain" if c == 0 else f"k = {start}", fontsize=8)
            if c == 0:
                axes.set_ylabel(one.name, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def heat_map(drift: Drift) -> Figure:
    """Candidates by steps: how every region's exit changes, and below it what each clock's adaptor steps are off by.

    On a logarithmic scale: in the first steps some exits change by many times what they do later on.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, PercentFormatter

    names = list(drift.regions)
    clocks = sorted({clock for effects in drift.effects.values() for clock in effects})
    panels = [("‖r(s) - r(s-1)‖ / ‖r(s)‖ at the exit", [drift.changes[name] for name in names])]
    panels += [(f"error at the exit, clock {n}", [drift.error(name, n) for name in names]) for n in clocks]
    size = (min(14, 4.2 + 0.3 * drift.steps), 0.4 + len(panels) * (0.5 + 0.3 * len(names)))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    cells = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    known = [value for _, rows in panels for row in rows for value in row if value] or [1.0]
    scale = LogNorm(max(min(known), 1e-3 * max(known)), max(known), clip=True)
    extent = (0.5, drift.steps + 0.5, len(names), 0)
    for axes, (title, rows) in zip(cells, panels, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in rows]
        image = axes.imshow(values, aspect="auto", cmap="magma", norm=scale, extent=extent, interpolation="none")
        axes.set_facecolor("0.85")
        axes.set_yticks([k + 0.5 for k in range(len(names))], names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
    cells[-1].set_xlabel("denoising step s")
    cells[-1].xaxis.get_major_locator().set_params(integer=True)
    ticks = LogLocator(subs=(1.0, 2.0, 5.0))
    figure.colorbar(image, ax=list(cells), ticks=ticks, format=PercentFormatter(1.0))
    return figure


def pareto(plan: Plan) -> Figure:
    """Measured error against saving, a colour a candidate, a marker a kind of schedule; the chosen one is circled."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    kinds = {"planned": ("o", "planned"), "clock": ("x", "uniform clocks"), "adaptive": ("^", "adaptive")}
    for k, name in enumerate(dict.fromkeys(option.region for option in plan.options)):
        for kind, (marker, words) in kinds.items():
            mine = [o for o in plan.options if o.region == name and o.kind.split()[0] == kind]
            points = [(100 * o.gain(plan.weigh), 100 * o.measured) for o in mine if o.measured is not None]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=f"C{k}", label=f"{name}, {words}")
    best = [(100 * o.gain(plan.weigh), 100 * o.measured) for o in plan.pareto() if o.measured is not None]
    axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0)
    x, y = 100 * plan.chosen.gain(plan.weigh), 100 * (plan.chosen.measured or 0)
    axes.scatter([x], [y], s=160, facecolors="none", edgecolors=rcParams["text.color"], label="chosen")
    axes.set(xlabel=f"{plan.weigh} saved, %", ylabel="relative L2 error of the result, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _show(axes: Any, picture: Tensor) -> None:
    image = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(image, cmap="gray" if image.shape[2] == 1 else None, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])

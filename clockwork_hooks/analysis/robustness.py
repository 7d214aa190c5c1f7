"""`measure_robustness`: how well does a sampler recover from a disturbed feature map, and from which step on?

From step k on, a feature map f is mixed with noise that keeps its statistics, f ← μ + √α(f - μ) + √(1-α)z with
z ~ N(0, σ²), and the final result is compared with the undisturbed one. What can be disturbed early without harm can
be approximated: the observation that the paper's choice of region rests on.

The maps are chosen from the graph, none is named in the code: the first convolution, what comes out of each way down,
the bottleneck, and what comes out of each region on the way up, as in arXiv 2312.08128, Sec. 3 and App. C.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from clockwork_hooks._generate import Generate, with_seed
from clockwork_hooks._numbers import count, shape
from clockwork_hooks._tree import flat, leaf_at, map_leaves
from clockwork_hooks.analysis.sampling import Watch, check_runs, final, first_call, reference
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError, is_several, is_whole, named_options, share
from clockwork_hooks.graph.operators import is_spatial
from clockwork_hooks.graph.recorder import TensorSpec, specs_in
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.blocks import View
from clockwork_hooks.regions.find import choose, regions_of
from clockwork_hooks.regions.flow import Dominance, Levels
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import FieldReport
from clockwork_hooks.reports.tables import Table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MapKind = Literal["first", "down", "bottleneck", "up"]


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A tensor that a module call returns.

    Attributes:
        name: "first", "down 32×32", "bottleneck 8×8", "up 64×64": where it is in the U.
        kind: first convolution, end of a level's way down, bottleneck, or a region's exit on the way up.
        path: dotted path of the module that returns it.
        call: which of the module's calls, from 0.
        leaf: which tensor of what the call returns.
        shape: as traced.
        resolution: spatial shape.
    """

    name: str
    kind: MapKind
    path: str
    call: int
    leaf: int
    shape: tuple[int, ...]
    resolution: tuple[int, ...]


def find_maps(trace: Trace, unet: nn.Module) -> tuple[FeatureMap, ...]:
    """The maps of one trace, in the order in which they are made.

    Args:
        trace: of one call of `unet`.
        unet: the UNet.

    Returns:
        The first convolution, the end of each level's way down but the last, the bottleneck, and the exit of the
        region below each level; fewer where the UNet has no such thing.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> from clockwork_hooks.graph import trace
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> [found.name for found in find_maps(trace(unet, *args, **kwargs), unet)][:3]
        ['first', 'down 32×32', 'down 16×16']

    Source: arXiv 2312.08128, Sec. 3, Fig. 2 (upsampling outputs) and App. C (bottleneck, downsampling, conv_in).
    """
    return tuple(_Maps(trace, unet).maps())


def choose_maps(maps: Sequence[FeatureMap], names: Iterable[str] | None) -> tuple[FeatureMap, ...]:
    """Those of the maps that are named; all for None.

    Raises:
        ArgumentError: a name is no map's; lists those that are.
    """
    if names is None:
        return tuple(maps)
    by_name = {one.name: one for one in maps}
    wanted: list[Any] = list(names) if is_several(names) else [names]
    wrong = [name for name in wanted if not (isinstance(name, str) and name in by_name)]
    if wrong or not wanted:
        close = [match for name in wrong for match in get_close_matches(str(name), by_name, n=1)]
        raise ArgumentError(
            "feature maps are chosen by their names",
            seen={"no such map": ", ".join(map(str, wrong)) or "none given", "maps": ", ".join(by_name)},
            do="pass {maps}",
            arguments={"maps": close or list(by_name)[:1]},
        )
    return tuple(by_name[name] for name in wanted)


class _Maps:
    """Reads the maps off a trace."""

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.trace, self.unet = trace, unet
        self.dom, self.levels = Dominance(trace), Levels(trace)
        # node → the innermost call that computes and returns it, and where among its outputs; a call that only hands it
        # on, as an `nn.Identity` on a shortcut does, is on one of its ways alone
        self.producers: dict[int, tuple[Any, int]] = {}
        for call in trace.calls:
            for k, leaf in enumerate(flat(call.output)):
                n = leaf.node.meta["index"] if isinstance(leaf, TensorSpec) else -1
                if call.path and call.first <= n < call.last and self.dom.dep[n]:
                    self.producers[n] = (call, k)
        self.at = {n: self.levels.positions(trace.nodes[n]) or 0 for n in self.producers}
        self.worked = self.levels.worked

    def maps(self) -> Iterator[FeatureMap]:
        if not self.worked:
            return
        bottom = self._bottleneck()
        first = next((n for n in sorted(self.producers) if is_spatial(self.trace.nodes[n])), None)
        if first is not None:
            yield self._map("first", "first", first)
        for positions in self.worked[:-1]:
            last = self._last_before(positions, bottom)
            if last is not None and last != first:
                yield self._map("down", "down", last)
        if bottom is not None:
            yield self._map("bottleneck", "bottleneck", bottom)
        yield from self._exits()

    def _crossing(self) -> list[int]:
        """For each node, how many tensors that depend on the sample are made up to there and used after it."""
        change = [0] * len(self.trace.nodes)
        for u in range(len(change)):
            users = [v for v in self.dom.users[u] if self.dom.live[v]] if self.dom.dep[u] and self.dom.live[u] else []
            if users:
                change[u] += 1
                change[max(users)] -= 1
        return list(itertools.accumulate(change))

    def _bottleneck(self) -> int | None:
        """Of what whole blocks at the lowest level return, the last one that all skips go round."""
        crossing, floor = self._crossing(), self.worked[-1]
        whole = {(block.first, block.last) for block in View(self.trace, None).whole()}
        blocks = [call for call in self.trace.calls if (call.first, call.last) in whole]
        returned = {spec.node.meta["index"] for block in blocks for spec in specs_in(block.output)}
        low = [n for n in returned & self.producers.keys() if self.at[n] == floor and self.dom.live[n]]
        return max(low, key=lambda n: (crossing[n], n), default=None)

    def _last_before(self, positions: int, bottom: int | None) -> int | None:
        low = [
            n for n in self.producers if self.at[n] == positions and self.dom.live[n] and (bottom is None or n < bottom)
        ]
        lower = [n for n in self.producers if self.at[n] in self.worked and self.at[n] < positions]
        return max((n for n in low if not lower or n < min(lower)), default=None)

    def _exits(self) -> Iterator[FeatureMap]:
        """Exits of the regions below each level, the lowest first."""
        try:
            regions = regions_of(self.trace, self.unet)
        except RegionNotFoundError:
            return
        for region in sorted({r.level: r for r in regions}.values(), key=lambda r: -r.level):
            if region.exit.node in self.producers:
                yield self._map("up", "up", region.exit.node)

    def _map(self, word: str, kind: MapKind, n: int) -> FeatureMap:
        call, leaf = self.producers[n]
        space = self.levels.resolution(self.trace.nodes[n]) or ()
        name = word if kind == "first" else f"{word} {shape(space)}"
        return FeatureMap(name, kind, str(call.path), call.ordinal, leaf, self.trace.nodes[n].meta["shape"], space)


Statistics = Literal["channel", "map"]


@dataclass(frozen=True, slots=True)
class Robustness(FieldReport):
    """L2 distance of the final result for every (map, first disturbed step).

    Attributes:
        maps: what was disturbed.
        starts: first disturbed steps, from 1.
        steps: denoising steps of the sampler.
        alpha: share of the map's own variance that is kept.
        statistics: whose mean and variance the noise has: each channel's, or the whole map's.
        distances: name of the map → L2 distance to the undisturbed result, one a start; a mean over samples.
        norm: L2 norm of the undisturbed result, a mean over samples.
        samples: how many results each number is a mean of.
        seeds: of the noise that sampling starts from.
        pictures: (map, start) → the first result, (C, H, W), and ("", 0) → the undisturbed one; where they are images.
    """

    SCHEMA = "robustness/1"

    maps: tuple[FeatureMap, ...]
    starts: tuple[int, ...]
    steps: int
    alpha: float
    statistics: Statistics
    distances: Mapping[str, tuple[float, ...]]
    norm: float
    samples: int
    seeds: tuple[int, ...]
    pictures: Mapping[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def table(self) -> Table:
        """Distances, a row a map, a column a start."""
        rows = [(one.name, one.path, *(f"{d:.2f}" for d in self.distances[one.name])) for one in self.maps]
        notes = (
            f"L2 distance to the undisturbed result (norm {self.norm:.2f}), mean of {count(self.samples, 'sample')}; "
            f"disturbed from step k of {self.steps} on, α = {self.alpha:g}, statistics per {self.statistics}.",
        )
        return table("Robustness", ("map", "module", *(f">k={k}" for k in self.starts)), rows, notes=notes)

    def plot(self, path: str | Path) -> None:
        """Curves of distance over start, a line a map (PNG, SVG or PDF; needs matplotlib). Source: Figs. 12 and 13."""
        self._curves().save(path)

    def plot_grid(self, path: str | Path) -> None:
        """The first picture of every cell, a row a map, a column a start (needs matplotlib). Source: Fig. 2.

        Raises:
            ArgumentError: the results are no pictures, or were not kept.
        """
        self._grid().save(path)

    def figures(self) -> Sequence[Plot]:
        """The curves, and the grid where the results are pictures."""
        first = self.pictures.get(("", 0))
        shown = first is not None and first.ndim == 3 and first.shape[0] in (1, 3)
        return plots(self._curves(), *([self._grid()] if shown else []))

    def _curves(self) -> Plot:
        return Plot(lambda: curves(self), "Distance to the undisturbed result over the first disturbed step")

    def _grid(self) -> Plot:
        return Plot(lambda: grid(self), "Results by disturbed map and first disturbed step")


@named_options
def measure_robustness(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    maps: Iterable[str] | None = None,
    starts: Iterable[int] | None = None,
    alpha: float = 0.3,
    statistics: Statistics = "channel",
    seeds: Sequence[int] = (0,),
    console: Console | None = None,
) -> Robustness:
    """Disturb each feature map from each step on, and measure what it does to the result.

    Every cell samples from the same noise, and is disturbed by the same noise.

    Args:
        unet, generate, conditions, seeds, console: as in `measure_drift`.
        maps: names of the maps, as `measure_robustness` lists them in an error; None for all.
        starts: first disturbed steps, from 1; None for about ten over the trajectory.
        alpha: share of the variance that stays the map's own, 0 (noise alone) to 1 (no noise).
        statistics: "channel": mean and variance over space, for each sample and channel; "map": over all but the batch.

    Returns:
        The distances; `.plot(...)`, `.plot_grid(...)`, `.to_json()`.

    Raises:
        ArgumentError: an option is outside its rule, a start lies beyond the last step, or `generate` never calls
            the UNet.
        TraceError: a call of the UNet could not be recorded.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks import measure_robustness
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> def generate(count, seed):
        ...     x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        ...     for t in (900, 600, 300, 0):
        ...         x = x - 0.1 * unet(x, t).sample
        ...     return x
        >>> result = measure_robustness(unet, generate, [2], starts=(1, 4))
        >>> [one.name for one in result.maps]
        ['first', 'down 16×16', 'bottleneck 8×8', 'up 16×16']
        >>> result.distances["up 16×16"][0] > result.distances["up 16×16"][1] > 0
        True

    Source: arXiv 2312.08128, Sec. 3, Fig. 2; App. C, Figs. 10-13.
    """
    batches = check_runs(generate, conditions, seeds)
    generate = with_seed(generate)
    _check(alpha, statistics)
    trace = first_call(unet, generate, batches[0], seeds[0])
    chosen = choose_maps(find_maps(trace, unet), maps)
    cells = [(k, seed) for seed in range(len(seeds)) for k in range(len(batches))]
    plain, steps = [], 0
    with Watch(unet, choose(trace, unet)) as watch, ProgressBar(console) as bar:
        for k, seed in cells:
            with watch.trajectory():
                plain.append(reference(generate, batches[k], seeds[seed]))
            steps = max(steps, watch.steps)
        first_steps = _starts(starts, steps)
        sums = {(one.name, start): 0.0 for one in chosen for start in first_steps}
        pictures = {("", 0): plain[0][0].float().cpu()}
        task = bar.add_task("", total=len(sums) * len(cells))
        for one in chosen:
            for start in first_steps:
                for (k, seed), before in zip(cells, plain, strict=True):
                    bar.update(task, description=f"{one.name}, from step {start}")
                    with watch.trajectory(), _disturbed(unet, one, start, watch, alpha, statistics, seeds[seed]):
                        result = final(generate, batches[k], seeds[seed])
                    sums[one.name, start] += float((result.float() - before.float()).flatten(1).norm(dim=1).sum())
                    pictures.setdefault((one.name, start), result[0].float().cpu())
                    bar.advance(task)
    samples = sum(map(len, plain))
    return Robustness(
        maps=chosen,
        starts=first_steps,
        steps=steps,
        alpha=alpha,
        statistics=statistics,
        distances={one.name: tuple(sums[one.name, k] / samples for k in first_steps) for one in chosen},
        norm=sum(float(before.float().flatten(1).norm(dim=1).sum()) for before in plain) / samples,
        samples=samples,
        seeds=tuple(seeds),
        pictures=pictures,
    )


def disturb(f: Tensor, alpha: float, statistics: Statistics, noise: Tensor) -> Tensor:
    """The map f as μ + √α(f - μ) + √(1-α)σz, with the map's own mean and deviation.

    Args:
        f: (B, C, ...) feature map.
        alpha: share of the variance that is kept.
        statistics: "channel" for mean and deviation of each channel, "map" for those of the whole map, of each sample.
        noise: z, standard normal, in f's shape.

    Source: arXiv 2312.08128, Sec. 3.
    """
    axes = tuple(range(2 if statistics == "channel" and f.ndim > 2 else 1, f.ndim))
    mean = f.mean(axes, keepdim=True)
    deviation = f.std(axes, keepdim=True, correction=0)
    return mean + math.sqrt(alpha) * (f - mean) + math.sqrt(1 - alpha) * deviation * noise


@contextlib.contextmanager
def _disturbed(
    unet: nn.Module, one: FeatureMap, start: int, watch: Watch, alpha: float, statistics: Statistics, seed: int
) -> Iterator[None]:
    """Disturb one map at every call from step `start` on; the noise is the same whatever the start and the map."""
    counts = {"root": -1, "call": 0}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if counts["root"] != watch.calls:
            counts.update(root=watch.calls, call=0)
        ordinal, counts["call"] = counts["call"], counts["call"] + 1
        feature = leaf_at(output, one.leaf)
        if ordinal != one.call or watch.step < start or not isinstance(feature, Tensor):
            return None
        generator = torch.Generator(feature.device).manual_seed(1_000_003 * (seed + 1) + watch.calls)
        noise = torch.randn(feature.shape, generator=generator, device=feature.device, dtype=torch.float32)
        disturbed = disturb(feature.float(), alpha, statistics, noise).to(feature.dtype)
        return map_leaves(lambda leaf: disturbed if leaf is feature else leaf, output)

    handle = unet.get_submodule(one.path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check(alpha: object, statistics: object) -> None:
    share("alpha", alpha, rule="α is a share, 0 to 1", example=0.3)
    if statistics not in ("channel", "map"):
        raise ArgumentError(
            'statistics are those of each "channel" or of the whole "map"',
            seen={"statistics": repr(statistics)},
            do='pass statistics="channel"',
        )


def _starts(first_steps: Iterable[int] | None, steps: int) -> tuple[int, ...]:
    if first_steps is None:
        stride = max(1, round(steps / 10))
        return tuple(range(1, steps + 1, stride))
    starts: tuple[Any, ...] = tuple(first_steps) if is_several(first_steps) else (first_steps,)
    wrong = [k for k in starts if not is_whole(k, 1, steps)]
    if wrong or not starts:
        raise ArgumentError(
            "a start is a denoising step of the sampler",
            seen={"starts": starts, "outside": wrong or "none given", "steps": steps},
            do=f"choose from 1 to {steps}",
        )
    return starts


_STYLES = {"first": ":", "down": "--", "bottleneck": "-.", "up": "-"}


def curves(result: Robustness) -> Figure:
    """Distance over the first disturbed step, a line a map; colours go by resolution, line styles by place."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def _show(axes: Any, picture: Tensor) -> None:
    image = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(image, cmap="gray" if image.shape[2] == 1 else None, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])

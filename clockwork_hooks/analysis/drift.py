"""`measure_drift`: how much does what a region emits change from step to step, and what would keeping it cost?

One run of the sampler serves all regions and clocks: of each region's exit only the last few steps are held, and what
is compared is reduced to sums as it passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.analysis.maps import FeatureMap, exit_maps, leaf_of, region_name
from clockwork_hooks.analysis.watch import Generate, Watch, candidates, check_runs, final, first_call
from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.plots import Plot, plots
from clockwork_hooks.progress import progress
from clockwork_hooks.regions import choose
from clockwork_hooks.rendering import Report, reading
from clockwork_hooks.report import Table, percent, table
from clockwork_hooks.wrapper import wrap

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Drift", "measure_drift"]


@dataclass(frozen=True, slots=True)
class Drift(Report):
    """How regions' exits change over a trajectory. A step is None where there is nothing to compare it with.

    Attributes:
        regions: name → one line about the region, widest first.
        shares: name → share of a full pass's MACs that the region holds.
        steps: denoising steps of the sampler.
        ages: name → for each age of 1, 2, ... steps: ‖r(s) - r(s - age)‖ / ‖r(s)‖ for each step s from 1.
        cosines: name → cosine of r(s) and r(s - 1), for each step.
        effects: name → clock → what that clock does to the final result: ‖x̂ - x‖ / ‖x‖, a mean over samples.
        adaptor: class name of the adaptor that made `effects`.
        samples: how many results each effect is a mean of.
        seeds: of the noise that sampling starts from.
    """

    SCHEMA = "drift/1"

    regions: Mapping[str, str]
    shares: Mapping[str, float]
    steps: int
    ages: Mapping[str, tuple[tuple[float | None, ...], ...]]
    cosines: Mapping[str, tuple[float | None, ...]]
    effects: Mapping[str, Mapping[int, float]]
    adaptor: str
    samples: int
    seeds: tuple[int, ...]

    def change(self, region: str) -> tuple[float | None, ...]:
        """‖r(s) - r(s - 1)‖ / ‖r(s)‖ for each step."""
        return self.ages[region][0]

    def identity_error(self, region: str, clock: int) -> tuple[float | None, ...]:
        """The identity's error at each adaptor step of a clock, None at full steps; on undisturbed trajectories.

        Raises:
            ArgumentError: the clock is above the largest that was measured.
        """
        if not 2 <= clock <= len(self.ages[region]) + 1:
            raise ArgumentError(
                "errors are known for the clocks that were measured",
                seen={"clock": clock, "measured": f"2 to {len(self.ages[region]) + 1}"},
                do="measure with clocks=(...) up to this one",
            )
        found = ((s - 1) % clock for s in range(1, self.steps + 1))
        return tuple(self.ages[region][age - 1][s] if age else None for s, age in enumerate(found))

    def table(self) -> Table:
        """A row a region: mean change, mean cosine, and the effect of each clock."""
        clocks = sorted({clock for effects in self.effects.values() for clock in effects})
        rows = [
            (
                name,
                percent(_mean(self.change(name))),
                f"{_mean(self.cosines[name]):.3f}",
                *(percent(self.effects[name].get(clock)) for clock in clocks),
            )
            for name in self.regions
        ]
        heads = ("region", ">change a step", ">cosine", *(f">result at clock {clock}" for clock in clocks))
        notes = (
            f"Mean over {self.steps} steps of ‖r(s) - r(s-1)‖/‖r(s)‖ at the region's exit; relative L2 error of the "
            f"final result, mean of {self.samples} samples, {self.adaptor}.",
            *(f"{name}: {line}" for name, line in self.regions.items()),
        )
        return table("Drift", heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in Drift.__slots__}

    @classmethod
    def from_json(cls, text: str) -> Drift:
        """What `to_json` wrote.

        Raises:
            ArgumentError: the text is no drift.
        """
        with reading(cls, text) as data:
            del data["schema"]
            data["ages"] = {name: tuple(map(tuple, ages)) for name, ages in data["ages"].items()}
            data["cosines"] = {name: tuple(values) for name, values in data["cosines"].items()}
            data["effects"] = {r: {int(c): e for c, e in effects.items()} for r, effects in data["effects"].items()}
            return cls(**{**data, "seeds": tuple(data["seeds"])})

    def plot(self, path: str | Path) -> None:
        """A heat map, regions by steps (PNG, SVG or PDF; needs matplotlib)."""
        self._heat_map().save(path)

    def figures(self) -> Sequence[Plot]:
        """The heat map."""
        return plots(self._heat_map())

    def _heat_map(self) -> Plot:
        from clockwork_hooks.analysis.figures import heat_map

        return Plot(lambda: heat_map(self), "Relative change of each region's exit at each step")


def measure_drift(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    regions: Iterable[Region] | None = None,
    adaptor: Adaptor | str | None = None,
    clocks: Sequence[int] = (2, 3, 4),
    seeds: Sequence[int] = (0,),
    console: Console | None = None,
) -> Drift:
    """Measure how regions' exits change along real trajectories, and what keeping them does to the result.

    Args:
        unet: what `generate` calls; not wrapped.
        generate: your own sampling code: `generate(batch, seed)` draws its noise from the seed and returns one tensor,
            samples first.
        conditions: batches of whatever `generate` takes.
        regions: candidates, from `find_regions`; None for all nested ones. An adaptor has one region: its own.
        adaptor: stands in for the region in `effects`; None for the identity.
        clocks: whose effects are measured: one more run of the sampler for each region and clock.
        seeds: of the noise that sampling starts from.
        console: where the progress bar goes; None for standard error.

    Returns:
        The drift; `.plot(...)` draws a heat map.

    Raises:
        ArgumentError: an option is outside its rule, or `generate` never calls the UNet.
        RegionNotFoundError: the UNet has no region.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks import measure_drift
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> def generate(count, seed):
        ...     x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        ...     for t in (900, 600, 300, 0):
        ...         x = x - 0.1 * unet(x, t).sample
        ...     return x
        >>> drift = measure_drift(unet, generate, [2], clocks=(2,))
        >>> [step is None for step in drift.change(next(iter(drift.regions)))]
        [True, False, False, False]

    Source: arXiv 2312.08128, Sec. 3 and 4.1 (low-resolution features change slowly).
    """
    batches = check_runs(conditions, seeds)
    wrong = [clock for clock in clocks if isinstance(clock, bool) or not isinstance(clock, int) or clock < 2]
    if wrong:
        raise ArgumentError("clocks that skip are ints of at least 2", seen={"clocks": clocks}, do="pass clocks=(2,)")
    trace = first_call(unet, generate, batches[0], seeds[0])
    chosen = candidates(trace, unet, regions, adaptor)
    maps = exit_maps(trace, unet, chosen)
    runs = [(batch, seed) for seed in seeds for batch in batches]
    longest = max((2, *clocks)) - 1
    sums = [_Sums(longest) for _ in chosen]
    plain: list[Tensor] = []
    steps = 0
    with progress(console) as bar:
        task = bar.add_task("drift", total=len(runs) * (1 + len(chosen) * len(clocks)))
        with Watch(unet, choose(trace, unet)) as watch:
            for batch, seed in runs:
                with watch.trajectory(), _followed(unet, maps, sums, watch):
                    plain.append(final(unet, generate, batch, seed))
                steps = max(steps, watch.step)
                bar.advance(task)
        effects: dict[str, dict[int, float]] = {}
        for region in chosen:
            for clock in clocks:
                bar.update(task, description=f"{region_name(region)}, clock {clock}")
                errors = []
                with wrap(unet, adaptor, region=region, clock=clock) as cw:
                    for (batch, seed), reference in zip(runs, plain, strict=True):
                        cw.reset()
                        errors.append(relative_error(final(unet, generate, batch, seed), reference))
                        bar.advance(task)
                effects.setdefault(region_name(region), {})[clock] = float(torch.cat(errors).mean())
    return Drift(
        regions={region_name(region): region.line for region in chosen},
        shares={region_name(region): region.macs_share for region in chosen},
        steps=steps,
        ages={region_name(r): s.ages(steps) for r, s in zip(chosen, sums, strict=True)},
        cosines={region_name(r): s.cosines(steps) for r, s in zip(chosen, sums, strict=True)},
        effects=effects,
        adaptor="identity" if adaptor in (None, "identity") else type(adaptor).__name__,
        samples=sum(len(reference) for reference in plain),
        seeds=tuple(seeds),
    )


def relative_error(made: Tensor, reference: Tensor) -> Tensor:
    """‖made - reference‖ / ‖reference‖ of each sample, (B,), on the CPU."""
    difference = (made.float() - reference.float()).flatten(1).norm(dim=1)
    relative: Tensor = difference / reference.float().flatten(1).norm(dim=1).clamp_min(1e-12)
    return relative.cpu()


class _Sums:
    """One region's sums over calls and trajectories, kept on the device until the end."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.recent: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self.squares: dict[tuple[int, int], Tensor] = {}  # (step, age) → Σ ‖r(s) - r(s - age)‖², and age 0: Σ ‖r(s)‖²
        self.products: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, key: tuple[int, int], step: int, exit: Tensor) -> None:
        """One call's exit."""
        now = exit.detach().float()
        self._sum((step, 0), now.square().sum())
        for age in range(1, self.longest + 1):
            before = next((r for s, r in self.recent.get(key, ()) if s == step - age and r.shape == now.shape), None)
            if before is not None:
                self._sum((step, age), (now - before).square().sum())
                if age == 1:
                    product, norms = (now * before).sum(), now.norm() * before.norm()
                    one, two = self.products.get(step, (0, 0))
                    self.products[step] = (product + one, norms + two)
        self.recent[key] = [*self.recent.get(key, [])[-self.longest + 1 :], (step, now.clone())][-self.longest :]

    def _sum(self, where: tuple[int, int], value: Tensor) -> None:
        self.squares[where] = value + self.squares.get(where, 0)

    def ages(self, steps: int) -> tuple[tuple[float | None, ...], ...]:
        """Relative changes by age and step."""

        def change(step: int, age: int) -> float | None:
            if (step, age) not in self.squares:
                return None
            return math.sqrt(float(self.squares[step, age]) / max(float(self.squares[step, 0]), 1e-24))

        return tuple(tuple(change(s, age) for s in range(1, steps + 1)) for age in range(1, self.longest + 1))

    def cosines(self, steps: int) -> tuple[float | None, ...]:
        """Cosines to the step before, by step."""
        pairs = (self.products.get(s) for s in range(1, steps + 1))
        return tuple(None if p is None else float(p[0]) / max(float(p[1]), 1e-24) for p in pairs)


class _Follower:
    """A hook that adds one map to its sums."""

    def __init__(self, one: FeatureMap, sums: _Sums, watch: Watch) -> None:
        self.one, self.sums, self.watch = one, sums, watch
        self._root, self._call = 0, 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._call = self._call + 1 if self._root == self.watch.calls else 0
        self._root = self.watch.calls
        exit = leaf_of(output, self.one.leaf)
        if self._call == self.one.call and exit is not None:
            self.sums.add(self.watch.branch, self.watch.step, exit)


@contextlib.contextmanager
def _followed(unet: nn.Module, maps: Sequence[FeatureMap], sums: Sequence[_Sums], watch: Watch) -> Iterator[None]:
    """Add the exits of one trajectory to the sums."""
    handles = []
    try:
        for one, total in zip(maps, sums, strict=True):
            total.recent.clear()
            handles.append(unet.get_submodule(one.path).register_forward_hook(_Follower(one, total, watch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0

"""`plan`: which region, and which steps may use the adaptor, for a given error or saving; chosen by measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.analysis.drift import measure_drift, relative_error
from clockwork_hooks.analysis.maps import region_name
from clockwork_hooks.analysis.search import Sensitivity, probe_steps
from clockwork_hooks.analysis.watch import Generate, candidates, check_runs, final, first_call
from clockwork_hooks.boundary import Region
from clockwork_hooks.choice import Choice
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.plots import Plot, plots
from clockwork_hooks.progress import progress
from clockwork_hooks.rendering import Report, reading
from clockwork_hooks.report import Table, percent, table
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.wrapper import wrap

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Option", "Plan", "plan"]


@dataclass(frozen=True, slots=True)
class Option:
    """One region with one set of adaptor steps.

    Attributes:
        region: name of the region.
        steps: adaptor steps, from 2.
        kind: "planned", or "clock N".
        saved: share of a trajectory's MACs that do not run.
        predicted: relative L2 error of the result, from sensitivities; None for a clock that was measured at once.
        measured: that error, end to end, on the conditions and seeds that were planned with; None if not measured.
    """

    region: str
    steps: tuple[int, ...]
    kind: str
    saved: float
    predicted: float | None
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Plan(Report):
    """A region and a schedule for one sampler and number of steps; `wrap(unet, plan=plan)` takes it.

    Attributes:
        chosen: region, adaptor steps, errors.
        held_out: relative L2 error on conditions or seeds that were not planned with.
        options: everything that was considered, with what is known about it.
        steps: denoising steps of the sampler.
        level, share: find the region again: below this level, with at least this share of the MACs.
        fingerprint: of the region.
        model: class name of the UNet.
        adaptor: stands in for the region; None for the identity. Not in the JSON.
        found: the region itself; None after `from_json`.
    """

    SCHEMA = "plan/1"

    chosen: Option
    held_out: float
    options: tuple[Option, ...]
    steps: int
    level: int
    share: float
    fingerprint: str
    model: str
    adaptor: Adaptor | str | None = field(default=None, compare=False, repr=False)
    found: Region | None = field(default=None, compare=False, repr=False)

    @property
    def region(self) -> Region | Choice:
        """The region; after `from_json`, how `wrap` finds it at the first call."""
        return self.found or Choice(level=self.level, share=self.share)

    @property
    def schedule(self) -> Schedule:
        """The adaptor at exactly the chosen steps."""
        return Schedule.at(self.chosen.steps)

    def pareto(self) -> tuple[Option, ...]:
        """The measured options that no other one beats in both saving and error, by saving."""
        known = [option for option in self.options if option.measured is not None]
        best = [
            one
            for one in known
            if not any(o.saved >= one.saved and _error(o) < _error(one) for o in known if o is not one)
        ]
        return tuple(sorted(best, key=lambda option: option.saved))

    def table(self) -> Table:
        """The measured options by saving; the chosen one is marked, and so is what no other beats."""
        best, chosen = self.pareto(), self.chosen
        rows = [
            (
                "chosen" if option == chosen else "best" if option in best else "",
                option.kind,
                option.region,
                len(option.steps),
                percent(option.saved),
                percent(option.predicted),
                percent(option.measured),
            )
            for option in sorted(self.options, key=lambda option: option.saved)
            if option.measured is not None
        ]
        notes = (
            f"{self.model}, {self.steps} steps: {chosen.region}, adaptor at {', '.join(map(str, chosen.steps))}.",
            "Relative L2 error of the result. Saved: share of a trajectory's MACs, attention products counted.",
            f"The chosen option: predicted {percent(chosen.predicted)}, measured {percent(chosen.measured)}, held out "
            f"{percent(self.held_out)}.",
        )
        heads = ("", "schedule", "region", ">adaptor steps", ">saved", ">predicted", ">measured")
        return table("Plan", heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """Everything but the adaptor."""
        names = ["held_out", "steps", "level", "share", "fingerprint", "model"]
        options = [_plain(option) for option in self.options]
        return {"chosen": _plain(self.chosen), "options": options} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, text: str, *, adaptor: Adaptor | str | None = None) -> Plan:
        """What `to_json` wrote.

        Raises:
            ArgumentError: the text is no plan.
        """
        with reading(cls, text) as data:
            names = ["held_out", "steps", "level", "share", "fingerprint", "model"]
            return cls(
                chosen=_option(data["chosen"]),
                options=tuple(map(_option, data["options"])),
                adaptor=adaptor,
                **{name: data[name] for name in names},
            )

    def plot(self, path: str | Path) -> None:
        """Error against saving, planned schedules and clocks (PNG, SVG or PDF; needs matplotlib)."""
        self._pareto().save(path)

    def figures(self) -> Sequence[Plot]:
        """Error against saving."""
        return plots(self._pareto())

    def _pareto(self) -> Plot:
        from clockwork_hooks.analysis.figures import pareto

        return Plot(lambda: pareto(self), "Error of the result against MACs saved, by region and kind of schedule")


def plan(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    max_error: float | None = None,
    min_saving: float | None = None,
    regions: Iterable[Region] | None = None,
    adaptor: Adaptor | str | None = None,
    clocks: Sequence[int] = (2, 3, 4),
    probes: int = 12,
    seeds: Sequence[int] = (0,),
    held_out: Iterable[Any] | None = None,
    held_out_seeds: Sequence[int] = (1_000_003,),
    console: Console | None = None,
) -> Plan:
    """Choose region and schedule from measured error against MACs.

    Of every candidate region the drift is measured, and what one adaptor step alone does to the result. From these
    follow the sets of adaptor steps of least predicted error. The best set of each region and the uniform clocks are
    then run end to end, and the one with the least measured error (or the largest saving) wins.

    Args:
        unet: what `generate` calls; not wrapped.
        generate: your own sampling code: `generate(batch, seed)` returns one tensor, samples first.
        conditions: batches to plan with.
        max_error: relative L2 error of the result that is allowed: the largest saving within it is chosen.
        min_saving: share of a trajectory's MACs that must be saved: the least error is chosen. One of the two.
        regions: candidates, from `find_regions`; None for all nested ones.
        adaptor: stands in for the region; None for the identity. An adaptor has one region: its own.
        clocks: uniform clocks to compare with.
        probes: steps at which a single adaptor step is measured, for each region.
        seeds: of the noise to plan with.
        held_out: batches to verify with; None for the same with other seeds.
        held_out_seeds: of the noise to verify with.
        console: where the progress bar goes; None for standard error.

    Returns:
        The plan, with predicted, measured and held-out error; `.to_json()`, `.table()`, `.plot(...)`.

    Raises:
        ArgumentError: not exactly one of `max_error` and `min_saving`, a budget that nothing reaches (says what is
            reached), or an option outside its rule.
        RegionNotFoundError: the UNet has no region.

    Source: arXiv 2312.08128, Sec. 4.3 and Tab. 3 compare schedules of this kind by hand.
    """
    _check(max_error, min_saving, probes)
    batches = check_runs(conditions, seeds)
    trace = first_call(unet, generate, batches[0], seeds[0])
    chosen = candidates(trace, unet, regions, adaptor)
    drift = measure_drift(
        unet, generate, batches, regions=chosen, adaptor=adaptor, clocks=clocks, seeds=seeds, console=console
    )
    runs = _Runs(unet, generate, [(batch, seed) for seed in seeds for batch in batches], adaptor)
    found = _Planner(drift.steps, {region_name(region): region for region in chosen}, runs)
    with progress(console) as bar:
        found.tell = bar.update
        found.task = bar.add_task("planning", total=None)
        for name in found.regions:
            found.probe(name, drift.ages[name], probes)
            found.clocks(name, drift.effects[name])
        best = found.within(max_error) if max_error is not None else found.saving(float(min_saving or 0))
    others = list(held_out) if held_out is not None else batches
    fresh = _Runs(unet, generate, [(batch, seed) for seed in held_out_seeds for batch in others], adaptor)
    region = found.regions[best.region]
    return Plan(
        chosen=best,
        held_out=fresh.error(region, best.steps),
        options=tuple(found.options),
        steps=drift.steps,
        level=region.level,
        share=math.floor(region.macs_share * 1e6) / 1e6,
        fingerprint=region.fingerprint,
        model=region.model,
        adaptor=adaptor,
        found=region,
    )


class _Runs:
    """Runs of the sampler from the same noise, with and without adaptor steps."""

    def __init__(
        self, unet: nn.Module, generate: Generate, runs: Sequence[tuple[Any, int]], adaptor: Adaptor | str | None
    ) -> None:
        self.unet, self.generate, self.runs, self.adaptor = unet, generate, runs, adaptor
        self._plain: list[Tensor] = []

    def error(self, region: Region, steps: Iterable[int]) -> float:
        """Relative L2 error of the result with the adaptor at these steps, a mean over samples."""
        if not self._plain:
            self._plain = [final(self.unet, self.generate, *run) for run in self.runs]
        errors = []
        with wrap(self.unet, self.adaptor, region=region, schedule=Schedule.at(steps)) as cw:
            for run, reference in zip(self.runs, self._plain, strict=True):
                cw.reset()
                errors.append(relative_error(final(self.unet, self.generate, *run), reference))
        return float(torch.cat(errors).mean())


class _Planner:
    """Probes regions and chooses among sets of steps."""

    def __init__(self, steps: int, regions: dict[str, Region], runs: _Runs) -> None:
        self.steps, self.regions, self.runs = steps, regions, runs
        self.options: list[Option] = []
        self.sets: dict[str, list[Option]] = {}
        self.tell: Callable[..., None] = lambda *args, **kwargs: None
        self.task: Any = None

    def saved(self, name: str, count: int) -> float:
        """Share of a trajectory's MACs that `count` adaptor steps save."""
        return self.regions[name].macs_share * count / self.steps

    def probe(self, name: str, ages: Sequence[Sequence[float | None]], probes: int) -> None:
        """Measure single adaptor steps of a region, and choose its sets of 1, 2, ... steps."""
        weights = {}
        for step in probe_steps(self.steps, probes):
            self.tell(self.task, description=f"{name}, adaptor at step {step} alone")
            off = ages[0][step - 1]
            if off:
                weights[step] = self.runs.error(self.regions[name], (step,)) / off
        if not weights:
            self.sets[name] = []
            return
        sensitivity = Sensitivity(ages, weights)
        sets = sensitivity.best()
        self.sets[name] = [
            Option(name, tuple(sorted(s)), "planned", self.saved(name, len(s)), sensitivity.predicted(s)) for s in sets
        ]

    def clocks(self, name: str, effects: Any) -> None:
        """Add the uniform clocks, which the drift has measured."""
        for clock, error in effects.items():
            steps = tuple(s for s in range(1, self.steps + 1) if not Schedule.every(clock).is_full(s))
            self.options.append(Option(name, steps, f"clock {clock}", self.saved(name, len(steps)), None, error))

    def measured(self, option: Option) -> Option:
        """The option with its error, measured once."""
        known = next((o for o in self.options if (o.region, o.steps) == (option.region, option.steps)), None)
        if known is not None and known.kind == "planned":
            return known
        self.tell(self.task, description=f"{option.region}, {len(option.steps)} adaptor steps")
        error = known.measured if known is not None else self.runs.error(self.regions[option.region], option.steps)
        made = replace(option, measured=error)
        self.options.append(made)
        return made

    def saving(self, wanted: float) -> Option:
        """The least measured error at this saving or more."""
        for sets in self.sets.values():
            reaching = [option for option in sets if option.saved >= wanted - 1e-9]
            if reaching:
                self.measured(reaching[0])
        enough = [option for option in self.options if option.saved >= wanted - 1e-9]
        if not enough:
            most = max((o.saved for sets in self.sets.values() for o in sets), default=0.0)
            raise ArgumentError(
                "a plan saves what its regions and steps allow",
                seen={"min_saving": percent(wanted), "most that can be saved": percent(most)},
                do="ask for less, or pass wider regions",
            )
        return min(enough, key=_error)

    def within(self, allowed: float) -> Option:
        """The largest saving within this measured error."""
        for sets in self.sets.values():
            low, high = 0, len(sets)
            while low < high:  # errors grow with the number of steps, nearly always
                middle = (low + high) // 2
                if _error(self.measured(sets[middle])) <= allowed:
                    low = middle + 1
                else:
                    high = middle
        good = [option for option in self.options if _error(option) <= allowed]
        if not good:
            least = min(self.options, key=_error, default=None)
            raise ArgumentError(
                "a plan has at least one adaptor step",
                seen={
                    "max_error": percent(allowed),
                    "least error": percent(least.measured) if least else "none measured",
                },
                do="allow more, train an adaptor, or sample with more steps",
            )
        return max(good, key=lambda option: (option.saved, -_error(option)))


def _error(option: Option) -> float:
    return math.inf if option.measured is None else option.measured


def _plain(option: Option) -> dict[str, Any]:
    return {name: getattr(option, name) for name in Option.__slots__}


def _option(data: dict[str, Any]) -> Option:
    return Option(**{**data, "steps": tuple(data["steps"])})


def _check(max_error: object, min_saving: object, probes: object) -> None:
    given = {"max_error": max_error, "min_saving": min_saving}
    if (max_error is None) == (min_saving is None):
        raise ArgumentError("a plan has one budget", seen=given, do="pass max_error= or min_saving=")
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1):
            raise ArgumentError(f"{name} is a share between 0 and 1", seen={name: repr(value)}, do=f"pass {name}=0.3")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ArgumentError("probes is an int of at least 1", seen={"probes": repr(probes)}, do="pass probes=12")

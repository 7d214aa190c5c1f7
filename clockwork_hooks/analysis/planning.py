"""`plan`: choose the region, the steps and the adaptor for a given error or saving, by measuring; and its report.

Steps are chosen by arithmetic from measured sensitivities, one region at a time (`Sensitivity`). The error that a set
of adaptor steps makes is predicted as √Σ(w(s)·d(s, age))²: d(s, age) is what keeping a feature for `age` steps is off
by at step s (`Drift.errors`), and w(s) is what such an error does to the result. w is measured, one adaptor step at a
time, where a probe was made, and interpolated between.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from torch import nn

from clockwork_hooks._generate import Generate, with_seed
from clockwork_hooks._numbers import count, percent
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.adaptors.stand_in import AdaptorLike
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.sampling import (
    Adaptors,
    Candidate,
    Measured,
    Runs,
    Series,
    candidates,
    check_clocks,
    check_regions,
    check_runs,
    first_call,
    follow,
    not_finite,
    region_name,
)
from clockwork_hooks.errors import ArgumentError, named_options, share, whole
from clockwork_hooks.regions.find import Choice, choose, regions_of
from clockwork_hooks.regions.region import Region
from clockwork_hooks.regions.saved import described_region, saved_options
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import FieldReport, reading
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, early_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Weigh = Literal["MACs", "ms"]


@dataclass(frozen=True, slots=True)
class Option:
    """One region with one adaptor and one schedule.

    Attributes:
        region: name of the region, and of the adaptor unless it is the identity.
        kind: "planned", "clock N", "rule" and the schedule of a rule of thumb, or "adaptive".
        steps: adaptor steps, from 2; none of an adaptive schedule, whose steps are known when they run.
        saved: share of a trajectory's MACs that do not run, attention products and the adaptor counted.
        predicted: relative L2 error of the result, from sensitivities; None for an adaptive schedule.
        measured: that error, end to end, on the conditions and seeds that were planned with; None if not measured.
        saved_ms: share of the time in the UNet that is saved; None if time was not asked for.
        threshold, longest: of an adaptive schedule.
    """

    region: str
    kind: str
    steps: tuple[int, ...]
    saved: float
    predicted: float | None = None
    measured: float | None = None
    saved_ms: float | None = None
    threshold: float | None = None
    longest: int | None = None

    @property
    def schedule(self) -> Schedule:
        """What `wrap(schedule=...)` takes."""
        if self.threshold is None:
            return Schedule.at(self.steps)
        return Schedule.adaptive(self.threshold, longest=self.longest or 1)

    @property
    def error(self) -> float:
        """The measured error; infinite where it was not measured."""
        return math.inf if self.measured is None else self.measured

    @property
    def what(self) -> tuple[str, tuple[int, ...]]:
        """What runs: two kinds of schedule may come to the same steps."""
        return self.region, self.steps

    def gain(self, weigh: Weigh) -> float:
        """What is saved, in the unit that a plan weighs."""
        return self.saved if weigh == "MACs" or self.saved_ms is None else self.saved_ms


@dataclass(frozen=True, slots=True)
class Plan(FieldReport):
    """Region, schedule and adaptor for one sampler and number of steps; `wrap(unet, plan=plan)` takes it.

    Attributes:
        chosen: what was chosen: region, adaptor steps, errors.
        held_out: relative L2 error of it on conditions or seeds that were not planned with.
        options: everything that was measured; and the planned sets of all other sizes, with their predicted errors.
        steps: denoising steps of the sampler.
        weigh: what savings are measured in: "MACs" or "ms".
        choice: options of `Choice` that find the region again.
        fingerprint: of the region.
        model: class name of the UNet.
        adaptor_name: "identity", or the adaptor's class.
        adaptor_folder: where a saved one was read from; None otherwise.
        adaptor: stands in for the region; None for the identity. Not in the JSON.
        live_region: the region itself; None after `from_json`.
    """

    SCHEMA = "plan/1"

    chosen: Option
    held_out: float
    options: tuple[Option, ...]
    steps: int
    weigh: Weigh
    choice: Mapping[str, Any]
    fingerprint: str
    model: str
    adaptor_name: str = "identity"
    adaptor_folder: str | None = None
    adaptor: AdaptorLike = field(default=None, compare=False, repr=False)
    live_region: Region | None = field(default=None, compare=False, repr=False)

    @property
    def region(self) -> Region | Choice:
        """The region; after `from_json`, how `wrap` finds it at the first call."""
        return self.live_region or Choice(**self.choice, strict=True)

    @property
    def schedule(self) -> Schedule:
        """The adaptor at exactly the chosen steps."""
        return self.chosen.schedule

    @property
    def rule(self) -> str:
        """The rule of thumb that the chosen steps amount to: "spread(2)", "nearly every(3, first_full=2): ..."."""
        return rule_of_thumb(self.chosen.steps, self.steps)

    def pareto(self) -> tuple[Option, ...]:
        """The measured options that no other one beats in both saving and error, by saving."""
        measured = [option for option in self.options if option.error < math.inf]
        best = [
            one
            for one in measured
            if not any(
                o.gain(self.weigh) >= one.gain(self.weigh) and o.error < one.error for o in measured if o is not one
            )
        ]
        return tuple(sorted(best, key=lambda option: option.gain(self.weigh)))

    def table(self) -> Table:
        """The measured options by saving; the chosen one is marked, and so are those on the Pareto front."""
        best, chosen, timed = self.pareto(), self.chosen, self.weigh == "ms"
        rows = [
            (
                "chosen" if option == chosen else "Pareto" if option in best else "",
                option.kind if option.threshold is None else str(option.schedule),
                option.region,
                len(option.steps) if option.threshold is None else None,
                percent(option.saved),
                *((percent(option.saved_ms),) if timed else ()),
                percent(option.predicted),
                percent(option.measured),
            )
            for option in sorted(self.options, key=lambda option: option.gain(self.weigh))
            if option.measured is not None
        ]
        notes = (
            f"{self.model}, {count(self.steps, 'step')}: {chosen.region}, adaptor at "
            f"{', '.join(map(str, chosen.steps))}, which is {self.rule}. Pareto: no other option saves more at "
            "so small an error.",
            "Relative L2 error of the result. Saved: share of a trajectory's MACs, attention products counted"
            + ("; and of the milliseconds spent in the UNet, from medians of its passes." if timed else "."),
            f"The chosen option: predicted {percent(chosen.predicted) or '–'}, measured {percent(chosen.measured)}, "
            f"held out {percent(self.held_out)}.",
        )
        saved = (">MACs saved", ">ms saved") if timed else (">saved",)
        heads = ("", "schedule", "region", ">adaptor steps", *saved, ">predicted", ">measured")
        return table("Plan", heads, rows, notes=notes)

    @classmethod
    def from_json(cls, text: str, *, adaptor: AdaptorLike = None) -> Plan:
        """What `to_json` wrote.

        Args:
            text: the JSON.
            adaptor: what the plan was made with, where it is neither the identity nor the folder of a saved one.

        Raises:
            ArgumentError: the text is no plan, or lacks its adaptor.
        """
        with reading(cls, text):
            plan = super(Plan, cls).from_json(text)
            _ = plan.region, plan.schedule  # a field of another type is an error of the file
        if adaptor is None and plan.adaptor_folder is None and plan.adaptor_name != "identity":
            raise ArgumentError(
                "a plan has to be used with the adaptor that it was made with",
                seen={"adaptor of the plan": plan.adaptor_name, "given": "none"},
                do="pass Plan.from_json(text, adaptor=...)",
            )
        return replace(plan, adaptor=plan.adaptor_folder if adaptor is None else adaptor)

    def plot(self, path: str | Path) -> None:
        """Error against saving: planned schedules, clocks, adaptive ones (PNG, SVG or PDF; needs matplotlib)."""
        self._pareto().save(path)

    def figures(self) -> Sequence[Plot]:
        """Error against saving."""
        return plots(self._pareto())

    def _pareto(self) -> Plot:
        return Plot(lambda: pareto(self), "Error of the result against what is saved, by region and kind of schedule")


_SLACK = 1e-9
_FEW = 3  # are judged on what is held out
CALIBRATED = "calibrated"  # as an adaptor


@named_options
def plan(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    max_error: float | None = None,
    min_saving: float | None = None,
    weigh: Weigh = "MACs",
    regions: Iterable[Region] | None = None,
    adaptor: Adaptors = None,
    guidance: float | None = None,
    log_snr: Any = None,
    clocks: Sequence[int] = (2, 3, 4),
    adaptive: bool = False,
    longest: int | None = None,
    probes: int = 12,
    seeds: Sequence[int] = (0,),
    held_out: Iterable[Any] | None = None,
    held_out_seeds: Sequence[int] = (1_000_003,),
    time: str | None = None,
    console: Console | None = None,
) -> Plan:
    """Choose region, adaptor and schedule from measured error against MACs or milliseconds.

    A candidate is a region with an adaptor. For each one it measures the adaptor's error along the trajectory, and what
    one adaptor step alone does to the result. From these it predicts the best sets of adaptor steps. Uniform clocks,
    rules of thumb (`Schedule.spread`, and "first two full, last full"), the best set for each clock's saving and the
    best set for the budget are then run end to end. For a saving, the best three run again on what was not planned
    with, and the best one there wins. For an error, the largest saving wins.

    Args:
        unet, generate, conditions, regions, seeds, console: as in `measure_drift`.
        adaptor: as there; or "calibrated", alone or in the list: `calibrate` computes an adaptor for each of
            `regions` (None: the default one and the widest). The best three and an early rule are calibrated again,
            each for its own steps and with a trend, and the best one wins.
        guidance, log_snr: as in `calibrate`; only for "calibrated".
        max_error: allowed relative L2 error of the result: the largest saving within it is chosen.
        min_saving: share of a trajectory's MACs (or ms) to save: the smallest error is chosen. Pass one of the two.
        weigh: "MACs"; or "ms": savings are of the time in the UNet, medians over passes on its own device.
        clocks: uniform clocks to compare with.
        adaptive: also measure adaptive schedules that save about as much as each clock. They are never chosen, as
            what they save depends on what is sampled.
        longest: most adaptor steps in a row of planned and adaptive schedules; None for twice the largest clock.
        probes: steps at which a single adaptor step is measured, for each candidate.
        held_out: batches to verify with; None for the same with other seeds.
        held_out_seeds: of the noise to verify with.
        time: name of the argument that holds the time, if several may.

    Returns:
        The plan, with predicted, measured and held-out error; `.to_json()`, `.table()`, `.plot(...)`.

    Raises:
        ArgumentError: not exactly one of `max_error` and `min_saving`, a budget that nothing reaches (says what is
            reached), or an option outside its rule.
        AdaptorError: an adaptor fits none of the regions.
        RegionNotFoundError: the UNet has no region.

    Example:
        >>> from clockwork_hooks import plan, wrap
        >>> found = plan(unet, generate, [prompts], min_saving=0.4)  # doctest: +SKIP
        >>> cw = wrap(unet, plan=found)  # doctest: +SKIP

    Source: arXiv 2312.08128, Sec. 4.3 and Tab. 3 compare schedules of this kind by hand.
    """
    _check(max_error, min_saving, weigh, probes, longest)
    batches = check_runs(generate, conditions, seeds)
    others = check_runs(generate, batches if held_out is None else held_out, held_out_seeds)
    check_clocks(clocks)
    generate = with_seed(generate)
    ready, calibrates = _adaptors(adaptor, guidance=guidance, log_snr=log_snr)
    solver = _Calibrating(unet, generate, batches, {"guidance": guidance, "log_snr": log_snr, "time": time})
    regions = None if regions is None else check_regions(regions)
    trace = first_call(unet, generate, batches[0], seeds[0], time=time)
    pairs = candidates(trace, unet, regions, ready) if ready or not calibrates else ()
    if calibrates:
        pairs += solver.candidates(regions or (choose(trace, unet), regions_of(trace, unet)[0]))
    runs = Runs(unet, generate, [(batch, seed) for seed in seeds for batch in batches], timed=weigh == "ms")
    longest = longest or 2 * max(clocks)
    each = probes + len(clocks) * (5 if adaptive else 4)
    with ProgressBar(console) as bar:
        task = bar.add_task("planning", total=len(runs.runs) + len(pairs) * each)
        steps, series = follow(runs, pairs, longest, lambda: bar.advance(task))

        def tell(what: str) -> None:
            bar.update(task, advance=1, description=what)

        planner = _Planner(runs, {one.name: one for one in pairs}, solver, steps, weigh, longest, tell)
        for one in pairs:
            planner.clocks(one, clocks)
            planner.rules(one, clocks)
            planner.probe(one, series[one.name], probes)
            planner.frontier(one, series[one.name], adaptive=adaptive)
        fresh = Runs(unet, generate, [(batch, seed) for seed in held_out_seeds for batch in others])
        error, best, chosen = planner.best(fresh, max_error, min_saving)
    region = chosen.region
    return Plan(
        chosen=best,
        held_out=error,
        options=tuple(best if (one.kind, one.what) == (best.kind, best.what) else one for one in planner.everything),
        steps=steps,
        weigh=weigh,
        choice=saved_options(described_region(region)),
        fingerprint=region.fingerprint,
        model=region.model,
        adaptor_name=chosen.adaptor_name,
        adaptor_folder=os.fspath(chosen.argument) if isinstance(chosen.argument, (str, os.PathLike)) else None,
        adaptor=chosen.argument,
        live_region=region,
    )


@dataclass(slots=True)
class _Calibrating:
    """Solves for candidates' adaptors, from the conditions that are planned with and noise of its own."""

    unet: nn.Module
    generate: Generate
    batches: Sequence[Any]
    options: Mapping[str, Any]
    solved: list[Candidate] = field(default_factory=list)

    def candidates(self, regions: Iterable[Region]) -> tuple[Candidate, ...]:
        """One for each region, calibrated at all steps."""
        for region in dict.fromkeys(regions):
            adaptor = self._solve(region, None)
            self.solved.append(Candidate(f"{region_name(region)}, calibrated", region, adaptor, adaptor))
        return tuple(self.solved)

    def again(self, one: Candidate, steps: Sequence[int]) -> Candidate:
        """The same, calibrated for these steps alone; only such an adaptor follows a trend."""
        if one not in self.solved:
            return one
        adaptor = self._solve(one.region, Schedule.at(steps))
        return replace(one, adaptor=adaptor, argument=adaptor)

    def _solve(self, region: Region, schedule: Schedule | None) -> CalibratedAdaptor:
        seeds = itertools.count(2_000_003)
        return calibrate(
            self.unet, lambda batch: self.generate(batch, next(seeds)), self.batches, region=region, schedule=schedule,
            console=Console(quiet=True), **self.options,
        )  # fmt: skip


@dataclass(slots=True)
class _Planner:
    """Measures candidates, and chooses among their schedules.

    Attributes:
        runs: of the sampler.
        candidates: by name.
        solver: has calibrated the adaptors of some, and does so once more for the steps that are chosen.
        steps: of the sampler.
        weigh: what savings are measured in.
        longest: most adaptor steps in a row.
        tell: takes what is being measured.
        options: what was measured.
        sets: name → planned sets of 1, 2, ... adaptor steps.
        shares: name → what one adaptor step saves of a trajectory's MACs, and of its milliseconds.
    """

    runs: Runs
    candidates: dict[str, Candidate]
    solver: _Calibrating
    steps: int
    weigh: Weigh
    longest: int
    tell: Callable[[str], None]
    options: list[Option] = field(default_factory=list)
    sets: dict[str, list[Option]] = field(default_factory=dict)
    shares: dict[str, tuple[float, float | None]] = field(default_factory=dict)

    def clocks(self, one: Candidate, clocks: Sequence[int]) -> None:
        """Measure uniform clocks; the first one tells what an adaptor step saves."""
        for clock in clocks:
            self.tell(f"{one.name}, clock {clock}")
            schedule = Schedule.every(clock)
            outcome = self.runs.outcome(one, schedule)
            if not outcome.adaptor_passes:  # one step
                continue
            self.shares.setdefault(one.name, _shares(outcome, self.steps))
            option = self._option(one.name, f"clock {clock}", schedule.adaptor_steps(self.steps), None)
            self.options.append(replace(option, measured=outcome.error, saved=outcome.saved))

    def rules(self, one: Candidate, clocks: Sequence[int]) -> None:
        """Measure rules of thumb that are no uniform clock: spread, early, and the first two and the last full."""
        for clock in clocks if one.name in self.shares else ():
            ends = Schedule.every(clock, first_full=2, last_full=1)
            for schedule in (Schedule.spread(clock), Schedule.early(clock), ends):
                steps = schedule.adaptor_steps(self.steps)
                if not steps or any(option.what == (one.name, steps) for option in self.options):
                    continue
                self.tell(f"{one.name}, {schedule}")
                self.options.append(self._run(self._option(one.name, f"rule {schedule}", steps, None)))

    def probe(self, one: Candidate, series: Series, probes: int) -> None:
        """Measure single adaptor steps, and choose the sets of 1, 2, ... steps."""
        weights = {}
        usable = [step for step, off in enumerate(series.errors[0], 1) if off]
        for k in probe_steps(len(usable) + 1, probes):
            step = usable[k - 2]
            self.tell(f"{one.name}, adaptor at step {step} alone")
            off = series.errors[0][step - 1] or 1.0
            weights[step] = self.runs.outcome(one, Schedule.at({step})).error / off
        self.sets[one.name] = []
        if weights and one.name in self.shares:
            search = Sensitivity(series.errors, weights)
            self.sets[one.name] = [
                self._option(one.name, "planned", tuple(sorted(s)), search.predicted(s)) for s in search.best()
            ]
            for k, option in enumerate(self.options):
                error = search.predicted(frozenset(option.steps)) if option.region == one.name else math.inf
                if math.isfinite(error):  # else a step of the clock's is full whatever it says
                    self.options[k] = replace(option, predicted=error)

    def frontier(self, one: Candidate, series: Series, *, adaptive: bool) -> None:
        """Measure what saves as much as each clock: the planned set, and an adaptive schedule if asked for."""
        uniform = [option for option in self.options if option.kind.startswith("clock")]
        counts = sorted({len(option.steps) for option in uniform if option.region == one.name})
        for option in self.sets[one.name]:
            if len(option.steps) in counts:
                self.measured(option)
        thresholds = (threshold_for(series.entries, count, self.longest) for count in counts if adaptive)
        for threshold in dict.fromkeys(value for value in thresholds if value is not None):
            self.tell(f"{one.name}, adaptive")
            option = Option(one.name, "adaptive", (), 0.0, threshold=float(f"{threshold:.4g}"), longest=self.longest)
            outcome = self.runs.outcome(one, option.schedule)
            steps, timed = self.steps * outcome.adaptor_passes / outcome.calls, self.shares[one.name][1]
            saved_ms = None if timed is None else timed * steps
            self.options.append(replace(option, saved=outcome.saved, measured=outcome.error, saved_ms=saved_ms))

    def _option(self, name: str, kind: str, chosen: tuple[int, ...], predicted: float | None) -> Option:
        share, timed = self.shares[name]
        count = len(chosen)
        return Option(name, kind, chosen, count * share, predicted, saved_ms=None if timed is None else count * timed)

    def _run(self, option: Option) -> Option:
        """The option with its error, and with what it saves."""
        outcome = self.runs.outcome(self.candidates[option.region], option.schedule)
        return replace(option, measured=outcome.error, saved=outcome.saved)

    def measured(self, option: Option) -> Option:
        """The option with its error, measured once."""
        same = [one for one in self.options if one.what == option.what]
        planned = next((o for o in same if o.kind == "planned"), None)
        if planned is not None:
            return planned
        self.tell(f"{option.region}, {len(option.steps)} adaptor steps")
        # a clock may have these very steps
        measured = replace(option, measured=same[0].measured, saved=same[0].saved) if same else self._run(option)
        self.options.append(measured)
        return measured

    @property
    def everything(self) -> tuple[Option, ...]:
        """What was measured; and the planned sets of all other sizes, with the error that is predicted."""
        measured = {option.what for option in self.options if option.kind == "planned"}
        return (
            *self.options,
            *(option for sets in self.sets.values() for option in sets if option.what not in measured),
        )

    @property
    def fixed(self) -> list[Option]:
        """What may be chosen: all but the adaptive ones."""
        return [option for option in self.options if option.threshold is None]

    def best(self, fresh: Runs, max_error: float | None, min_saving: float | None) -> tuple[float, Option, Candidate]:
        """Of the options within the budget, the one of least error on fresh runs: that error, it, and its candidate."""
        best = [self.within(max_error)] if max_error is not None else self.saving(float(min_saving or 0))
        finalists = [(one, self.solver.again(self.candidates[one.region], one.steps)) for one in best]
        self.tell("what is held out")
        judged = [self.judged(fresh, *pair) for pair in finalists]
        if min_saving is not None:  # those that were measured reach it; what is calibrated anew may cost more
            judged = [one for one in judged if one[1].gain(self.weigh) >= min_saving - _SLACK] or [
                self.judged(fresh, one, self.candidates[one.region]) for one in best
            ]
        least = min(judged, key=lambda one: one[0])
        if least[0] == math.inf:
            do = "ask for less" if max_error is None else "allow less error"
            raise not_finite({"held out": count(len(fresh.runs), "run")}, do=do)
        return least

    def saving(self, wanted: float) -> list[Option]:
        """The three of least measured error at this saving or more, the best first; each set of steps once."""
        for sets in self.sets.values():
            reaching = [option for option in sets if option.gain(self.weigh) >= wanted - _SLACK]
            if reaching:
                self.measured(reaching[0])
        early = self._early(wanted)
        enough = [option for option in self.fixed if option.gain(self.weigh) >= wanted - _SLACK]
        if not enough:
            every = [*self.fixed, *(option for sets in self.sets.values() for option in sets)]
            most = max((option.gain(self.weigh) for option in every), default=0.0)
            raise ArgumentError(
                "a plan can save at most what its regions and steps allow",
                seen={"min_saving": percent(wanted), "most that can be saved": percent(most)},
                do="ask for less, or pass wider regions",
            )
        least = sorted((option for option in enough if option.error < math.inf), key=lambda option: option.error)
        if not least:
            raise not_finite({"min_saving": percent(wanted), "schedules measured": len(enough)}, do="ask for less")
        few = list({option.what: option for option in reversed(least)}.values())[::-1][:_FEW]
        taken = [option.what for option in few]
        return [*few, *(option for option in early if option.what not in taken)]

    def judged(self, runs: Runs, option: Option, candidate: Candidate) -> tuple[float, Option, Candidate]:
        """The error on other runs, and the option with what it saves with this adaptor, which may be another one."""
        outcome = runs.outcome(candidate, option.schedule)
        if candidate is not self.candidates[option.region] and outcome.adaptor_passes:
            measured = self.shares[option.region][0]
            option = replace(option, saved=option.saved * _shares(outcome, self.steps)[0] / measured)
        return outcome.error, option, candidate

    def _early(self, wanted: float) -> list[Option]:
        """Of what is calibrated the early rule that saves so much: only when calibrated for it, it follows a trend."""
        options = []
        for name in (one.name for one in self.solver.solved if one.name in self.shares):
            for full in range(self.steps - 1, 2, -1):
                steps = early_steps(full, self.steps)
                option = self._option(name, f"rule early, {full} full", steps, None)
                if option.gain(self.weigh) >= wanted - _SLACK:
                    same = (one for one in self.options if one.what == option.what)
                    options.append(next(same, None) or self.measured(option))
                    break
        return sorted(options, key=lambda option: option.error)[:1]

    def within(self, allowed: float) -> Option:
        """The largest saving within this measured error."""
        for sets in self.sets.values():
            low, high = 0, len(sets)
            while low < high:  # errors grow with the number of steps, nearly always
                middle = (low + high) // 2
                if self.measured(sets[middle]).error <= allowed:
                    low = middle + 1
                else:
                    high = middle
        good = [option for option in self.fixed if option.error <= allowed and option.gain(self.weigh) > 0]
        if not good:
            least = min(self.fixed, key=lambda option: option.error, default=None)
            raise ArgumentError(
                "a plan needs at least one adaptor step within its budget",
                seen={
                    "max_error": f"{allowed:.3g}",
                    "least error": f"{least.error:.3g}" if least else "none measured",
                },
                do="allow more, train an adaptor, or sample with more steps",
            )
        return max(good, key=lambda option: (option.gain(self.weigh), -option.error))


def _shares(outcome: Measured, steps: int) -> tuple[float, float | None]:
    """What one adaptor step saves of a trajectory: of its MACs, and of its milliseconds if they were measured."""
    timed = None if outcome.ms is None else (1 - outcome.ms[1] / outcome.ms[0]) / steps
    return outcome.saved * outcome.calls / outcome.adaptor_passes / steps, timed


def _adaptors(adaptor: Adaptors, **solving: Any) -> tuple[list[AdaptorLike], bool]:
    """The adaptors that are there, and whether one is to be calibrated besides; only that one reads what follows."""
    several = list(adaptor) if isinstance(adaptor, (list, tuple)) else [adaptor]
    ready = [one for one in several if one != CALIBRATED]
    unread = {name: value for name, value in solving.items() if value is not None}
    if unread and len(ready) == len(several):
        raise ArgumentError(
            "guidance and log_snr are used only where an adaptor is calibrated",
            seen={**unread, "adaptor": adaptor},
            do="pass {adaptor}, or leave them out",
            arguments={"adaptor": CALIBRATED},
        )
    return ready, len(ready) < len(several)


def _check(max_error: object, min_saving: object, weigh: object, probes: object, longest: object) -> None:
    budgets = {"max_error": max_error, "min_saving": min_saving}
    if (max_error is None) == (min_saving is None):
        either = dict.fromkeys(budgets)
        raise ArgumentError(
            "a plan needs exactly one budget", seen=budgets, do="pass {max_error} or {min_saving}", arguments=either
        )
    for name, value in budgets.items():
        if value is not None:
            share(name, value, example=0.3, ends=False)
    if weigh not in ("MACs", "ms"):
        raise ArgumentError('a plan weighs "MACs" or "ms"', seen={"weigh": repr(weigh)}, do='pass weigh="MACs"')
    for name, value in {"probes": probes, "longest": 1 if longest is None else longest}.items():
        whole(name, value, least=1, example=12)


def pareto(plan: Plan) -> Figure:
    """Measured error against saving, a colour a candidate, a marker a kind of schedule; the chosen one is circled."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "planned": ("o", "planned"),
        "clock": ("x", "uniform clocks"),
        "adaptive": ("^", "adaptive"),
        "rule": ("+", "rules of thumb"),
    }
    for k, name in enumerate(dict.fromkeys(option.region for option in plan.options)):
        for kind, (marker, words) in kinds.items():
            mine = [o for o in plan.options if o.region == name and o.kind.split()[0] == kind]
            points = [(100 * o.gain(plan.weigh), 100 * o.measured) for o in mine if o.measured is not None]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=f"C{k}", label=f"{name}, {words}")
    best = [(100 * o.gain(plan.weigh), 100 * o.measured) for o in plan.pareto() if o.measured is not None]
    axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, label="Pareto front")
    x, y = 100 * plan.chosen.gain(plan.weigh), 100 * (plan.chosen.measured or 0)
    axes.scatter([x], [y], s=160, facecolors="none", edgecolors=rcParams["text.color"], label="chosen")
    axes.set(xlabel=f"{plan.weigh} saved, %", ylabel="relative L2 error of the result, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return figure


def probe_steps(steps: int, probes: int) -> tuple[int, ...]:
    """Steps from 2 to the last, evenly spread and denser at the beginning, where errors hurt most.

    Example:
        >>> probe_steps(20, 6)
        (2, 4, 7, 10, 15, 20)
    """
    last = steps - 1
    count = min(probes, last)
    if count <= 1:
        return tuple(range(2, 2 + count))
    spread = (2 + round((last - 1) * (k / (count - 1)) ** 1.5) for k in range(count))
    return tuple(dict.fromkeys(spread))


def adaptive_steps(entries: Sequence[Sequence[float | None]], threshold: float, longest: int) -> tuple[int, ...]:
    """The adaptor steps that `Schedule.adaptive(threshold, longest=longest)` takes where the entry moves like this.

    Args:
        entries: for each age from 1: how far the entry is from what it was so many steps before, for each step from 1.
        threshold, longest: of the schedule.

    Example:
        >>> adaptive_steps([(None, 0.1, 0.1, 0.3, 0.1), (None, None, 0.2, 0.4, 0.3)], threshold=0.25, longest=2)
        (2, 3, 5)
    """
    steps, age = [], 0
    for step in range(2, len(entries[0]) + 1):
        moved = entries[age][step - 1] if age < min(longest, len(entries)) else None
        age = age + 1 if moved is not None and moved <= threshold else 0
        if age:
            steps.append(step)
    return tuple(steps)


def threshold_for(entries: Sequence[Sequence[float | None]], count: int, longest: int) -> float | None:
    """The smallest threshold with which so many steps or more use the adaptor; None if none does."""
    values = sorted({value for age in entries for value in age if value is not None and 0 < value < math.inf})
    return next((v for v in values if len(adaptive_steps(entries, v, longest)) >= count), None)


def rule_of_thumb(chosen: Iterable[int], steps: int) -> str:
    """The simple schedule that adaptor steps amount to, as text; the nearest one, where none has these very steps.

    Example:
        >>> rule_of_thumb({3, 4, 6, 7}, 8)
        'spread(2)'
        >>> rule_of_thumb({3, 5, 7}, 8)
        'every(2, first_full=2)'
        >>> rule_of_thumb({3, 4, 6, 8}, 8)
        'nearly every(5, first_full=2): 1 step differs'
    """
    wanted = set(chosen)
    rules = [
        *(Schedule.every(clock) for clock in range(2, steps + 1)),
        *(Schedule.spread(clock) for clock in range(2, steps + 1)),
        *(Schedule.early(clock) for clock in range(2, steps + 1)),
        *(
            Schedule.every(clock, first_full=first, last_full=last)
            for last in range(3)
            for first in range(1, max(steps - 1, 2))
            for clock in range(2, steps + 1)
        ),
    ]
    off = [(len(wanted ^ set(rule.adaptor_steps(steps))), number) for number, rule in enumerate(rules)]
    if not off:
        return "every step is full"
    differing, number = min(off)
    if not differing:
        return str(rules[number])
    return f"nearly {rules[number]}: {differing} {'step differs' if differing == 1 else 'steps differ'}"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What adaptor steps of one region cost in error.

    Attributes:
        ages: for each age from 1: what keeping the exit so long is off by, relative, for each step from 1.
        weights: step → measured error of the result with this adaptor step alone, over what the exit was off by.
    """

    ages: Sequence[Sequence[float | None]]
    weights: Mapping[int, float]

    def weight(self, step: int) -> float:
        """At any step, on a logarithmic scale between the probes."""
        probes = sorted(self.weights)
        if step <= probes[0] or step >= probes[-1]:
            return self.weights[probes[0] if step <= probes[0] else probes[-1]]
        high = next(s for s in probes if s >= step)
        low = max(s for s in probes if s <= step)
        if high == low:
            return self.weights[high]
        share = (step - low) / (high - low)
        one, two = (math.log(max(self.weights[s], 1e-12)) for s in (low, high))
        return math.exp(one + share * (two - one))

    def predicted(self, chosen: frozenset[int]) -> float:
        """Error of the result with these adaptor steps; infinite where a feature would have to serve too long."""
        total, age = 0.0, 0
        for step in range(1, len(self.ages[0]) + 1):
            age = age + 1 if step in chosen else 0
            total += self._squared(step, age) if age else 0.0
        return math.sqrt(total)

    def best(self) -> list[frozenset[int]]:
        """The sets of 1, 2, ... adaptor steps with the least predicted error.

        Squared errors add up over steps, and each depends on its step and age alone: dynamic programming over the
        steps, with (age, number of adaptor steps so far) as the state, finds the exact minimum.
        """
        states: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
        for step in range(1, len(self.ages[0]) + 1):
            after: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for (age, adapted), (cost, chosen) in states.items():
                _keep(after, (0, adapted), (cost, chosen))
                more = self._squared(step, age + 1) if step > 1 else math.inf
                if not math.isinf(more):
                    _keep(after, (age + 1, adapted + 1), (cost + more, (*chosen, step)))
            states = after
        least: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (_, adapted), state in states.items():
            if adapted:
                _keep(least, adapted, state)
        return [frozenset(least[adapted][1]) for adapted in sorted(least)]

    def _squared(self, step: int, age: int) -> float:
        off = self.ages[age - 1][step - 1] if age <= len(self.ages) else None
        return math.inf if off is None else float(self.weight(step) * off) ** 2


def _keep(table: dict[Any, tuple[float, tuple[int, ...]]], key: Any, one: tuple[float, tuple[int, ...]]) -> None:
    if key not in table or one < table[key]:
        table[key] = one

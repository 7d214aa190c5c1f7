"""`plan`: which region, adaptor and steps, for a given error or saving; chosen by measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from clockwork_hooks.adaptors.origin import describe, options
from clockwork_hooks.analysis.candidates import Candidate, StandIns, candidates
from clockwork_hooks.analysis.follow import Series, follow
from clockwork_hooks.analysis.plan import Option, Plan, Weigh
from clockwork_hooks.analysis.runs import Outcome, Runs
from clockwork_hooks.analysis.search import Sensitivity, probe_steps, threshold_for
from clockwork_hooks.analysis.watch import Generate, check_clocks, check_runs, first_call
from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.progress import progress
from clockwork_hooks.report import percent
from clockwork_hooks.schedule import Schedule

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["plan"]

_SLACK = 1e-9


def plan(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    max_error: float | None = None,
    min_saving: float | None = None,
    weigh: Weigh = "MACs",
    regions: Iterable[Region] | None = None,
    adaptor: StandIns = None,
    clocks: Sequence[int] = (2, 3, 4),
    adaptive: bool = False,
    longest: int | None = None,
    probes: int = 12,
    seeds: Sequence[int] = (0,),
    held_out: Iterable[Any] | None = None,
    held_out_seeds: Sequence[int] = (1_000_003,),
    console: Console | None = None,
) -> Plan:
    """Choose region, adaptor and schedule from measured error against MACs or milliseconds.

    Of every candidate, a region with an adaptor, it is measured what the adaptor is off by along the trajectory, and
    what one adaptor step alone does to the result. From these follow the sets of adaptor steps of least predicted
    error. Uniform clocks, and the sets that save as much as each of them, are then run end to end; so is the set that
    the budget asks for. The one with the least measured error (or the largest saving) wins.

    Args:
        unet, generate, conditions, regions, adaptor, seeds, console: as in `measure_drift`.
        max_error: relative L2 error of the result that is allowed: the largest saving within it is chosen.
        min_saving: share of a trajectory's MACs (or ms) that must be saved: the least error is chosen. One of the two.
        weigh: "MACs"; or "ms": savings are of the time spent in the UNet, medians over passes on its own device.
        clocks: uniform clocks to compare with.
        adaptive: also measure adaptive schedules that save about as much as each clock. They are compared, and never
            chosen: what they save depends on what is sampled.
        longest: most adaptor steps in a row of planned and adaptive schedules; None for twice the largest clock.
        probes: steps at which a single adaptor step is measured, for each candidate.
        held_out: batches to verify with; None for the same with other seeds.
        held_out_seeds: of the noise to verify with.

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
    found = candidates(first_call(unet, generate, batches[0], seeds[0]), unet, regions, adaptor)
    runs = Runs(unet, generate, [(batch, seed) for seed in seeds for batch in batches], timed=weigh == "ms")
    longest = longest or 2 * max(clocks)
    each = probes + len(clocks) * (3 if adaptive else 2)
    with progress(console) as bar:
        task = bar.add_task("planning", total=len(runs.runs) + len(found) * each)
        steps, series = follow(runs, found, longest, lambda: bar.advance(task))

        def tell(what: str) -> None:
            bar.update(task, advance=1, description=what)

        planner = _Planner(runs, {one.name: one for one in found}, steps, weigh, longest, tell)
        for one in found:
            planner.clocks(one, clocks)
            planner.probe(one, series[one.name], probes)
            planner.frontier(one, series[one.name], adaptive=adaptive)
        best = planner.within(max_error) if max_error is not None else planner.saving(float(min_saving or 0))
    chosen = planner.candidates[best.region]
    fresh = Runs(unet, generate, [(batch, seed) for seed in held_out_seeds for batch in others])
    region = chosen.region
    return Plan(
        chosen=best,
        held_out=fresh.outcome(chosen, best.schedule).error,
        options=planner.everything,
        steps=steps,
        weigh=weigh,
        choice=options(describe(region)),
        fingerprint=region.fingerprint,
        model=region.model,
        adaptor_name=chosen.adaptor_name,
        adaptor_folder=chosen.given if isinstance(chosen.given, str) else None,
        adaptor=chosen.given,
        found=region,
    )


@dataclass(slots=True)
class _Planner:
    """Measures candidates, and chooses among their schedules.

    Attributes:
        runs: of the sampler.
        candidates: by name.
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
            made = self.runs.outcome(one, schedule)
            if not made.adaptor_passes:  # one step
                continue
            self.shares.setdefault(one.name, _shares(made, self.steps))
            chosen = tuple(s for s in range(1, self.steps + 1) if not schedule.is_full(s))
            option = self._option(one.name, f"clock {clock}", chosen, None)
            self.options.append(replace(option, measured=made.error, saved=made.saved))

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
        counts = sorted({len(option.steps) for option in self.options if option.region == one.name})
        for option in self.sets[one.name]:
            if len(option.steps) in counts:
                self.measured(option)
        found = (threshold_for(series.entries, count, self.longest) for count in counts if adaptive)
        for threshold in dict.fromkeys(value for value in found if value is not None):
            self.tell(f"{one.name}, adaptive")
            made = Option(one.name, "adaptive", (), 0.0, threshold=float(f"{threshold:.4g}"), longest=self.longest)
            outcome = self.runs.outcome(one, made.schedule)
            steps, timed = self.steps * outcome.adaptor_passes / outcome.calls, self.shares[one.name][1]
            saved_ms = None if timed is None else timed * steps
            self.options.append(replace(made, saved=outcome.saved, measured=outcome.error, saved_ms=saved_ms))

    def _option(self, name: str, kind: str, chosen: tuple[int, ...], predicted: float | None) -> Option:
        share, timed = self.shares[name]
        count = len(chosen)
        return Option(name, kind, chosen, count * share, predicted, saved_ms=None if timed is None else count * timed)

    def measured(self, option: Option) -> Option:
        """The option with its error, measured once."""
        same = [o for o in self.options if (o.region, o.steps) == (option.region, option.steps)]
        known = next((o for o in same if o.kind == "planned"), None)
        if known is not None:
            return known
        self.tell(f"{option.region}, {len(option.steps)} adaptor steps")
        if same:  # a clock has these very steps
            made = replace(option, measured=same[0].measured, saved=same[0].saved)
        else:
            found = self.runs.outcome(self.candidates[option.region], option.schedule)
            made = replace(option, measured=found.error, saved=found.saved)
        self.options.append(made)
        return made

    @property
    def everything(self) -> tuple[Option, ...]:
        """What was measured; and the planned sets of all other sizes, with the error that is predicted."""
        known = {(option.region, option.steps) for option in self.options if option.kind == "planned"}
        sets = (option for sets in self.sets.values() for option in sets)
        return (*self.options, *(option for option in sets if (option.region, option.steps) not in known))

    @property
    def fixed(self) -> list[Option]:
        """What may be chosen: all but the adaptive ones."""
        return [option for option in self.options if option.threshold is None]

    def saving(self, wanted: float) -> Option:
        """The least measured error at this saving or more."""
        for sets in self.sets.values():
            reaching = [option for option in sets if option.gain(self.weigh) >= wanted - _SLACK]
            if reaching:
                self.measured(reaching[0])
        enough = [option for option in self.fixed if option.gain(self.weigh) >= wanted - _SLACK]
        if not enough:
            every = [*self.fixed, *(option for sets in self.sets.values() for option in sets)]
            most = max((option.gain(self.weigh) for option in every), default=0.0)
            raise ArgumentError(
                "a plan saves what its regions and steps allow",
                seen={"min_saving": percent(wanted), "most that can be saved": percent(most)},
                do="ask for less, or pass wider regions",
            )
        return min(enough, key=lambda option: option.error)

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
                "a plan has at least one adaptor step",
                seen={
                    "max_error": f"{allowed:.3g}",
                    "least error": f"{least.error:.3g}" if least else "none measured",
                },
                do="allow more, train an adaptor, or sample with more steps",
            )
        return max(good, key=lambda option: (option.gain(self.weigh), -option.error))


def _shares(made: Outcome, steps: int) -> tuple[float, float | None]:
    """What one adaptor step saves of a trajectory: of its MACs, and of its milliseconds if they were measured."""
    timed = None if made.ms is None else (1 - made.ms[1] / made.ms[0]) / steps
    return made.saved * made.calls / made.adaptor_passes / steps, timed


def _check(max_error: object, min_saving: object, weigh: object, probes: object, longest: object) -> None:
    given = {"max_error": max_error, "min_saving": min_saving}
    if (max_error is None) == (min_saving is None):
        raise ArgumentError("a plan has one budget", seen=given, do="pass max_error= or min_saving=")
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1):
            raise ArgumentError(f"{name} is a share between 0 and 1", seen={name: repr(value)}, do=f"pass {name}=0.3")
    if weigh not in ("MACs", "ms"):
        raise ArgumentError('a plan weighs "MACs" or "ms"', seen={"weigh": repr(weigh)}, do='pass weigh="MACs"')
    for name, value in {"probes": probes, "longest": 1 if longest is None else longest}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} is an int of at least 1", seen={name: repr(value)}, do=f"pass {name}=12")

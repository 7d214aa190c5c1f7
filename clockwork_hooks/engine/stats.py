"""What ran, what it cost, and why each full pass was full; and what a user is told of it once, in a warning.

The warnings are of no adaptor pass, of another number of steps, and of somebody who looks at skipped modules.
"""

from __future__ import annotations

import functools
import json
import threading
import types
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from clockwork_hooks._numbers import macs, percent, quantity
from clockwork_hooks._tree import attribute
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.timeline import Position
from clockwork_hooks.engine.hooks import walk
from clockwork_hooks.errors import ClockworkError, NoEffectWarning, OtherStepsWarning, SkippedModuleWarning, warn
from clockwork_hooks.reports.report import Report
from clockwork_hooks.schedule import Schedule

if TYPE_CHECKING:
    from clockwork_hooks.reports.tables import Table


_COUNTING = threading.Lock()  # of all wrappers: one of its own, a `Stats` could be neither copied nor pickled


@dataclass(slots=True)
class Counts:
    """Passes and what they cost.

    Attributes:
        full_passes: calls that ran the whole UNet.
        adaptor_passes: calls in which the adaptor stood in for the region.
        reasons: why full passes were full → how many: "first step" and what begins with "scheduled" are the schedule's
            own, every other one is a pass that could not be placed, or that the schedule would have given to the
            adaptor.
        regions: where several regions have clocks of their own, which one adaptor passes skipped → how many.
        macs_run: multiply-accumulates that ran, the adaptor's included; convolutions and matrix products, attention
            products counted. 1 MAC = 2 FLOPs.
        macs_plain: what the same calls cost without Clockwork.
    """

    full_passes: int = 0
    adaptor_passes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    regions: Counter[str] = field(default_factory=Counter)
    macs_run: int = 0
    macs_plain: int = 0

    @property
    def macs_saved(self) -> int:
        """MACs that did not run."""
        return self.macs_plain - self.macs_run

    @property
    def saving(self) -> float:
        """Share of the MACs that did not run, 0 to 1."""
        return self.macs_saved / self.macs_plain if self.macs_plain else 0.0


@dataclass(slots=True)
class TrajectoryStats(Counts):
    """Counts of one trajectory.

    Attributes:
        number: in order of their beginning, over all threads, from 1.
        steps: denoising steps so far.
    """

    number: int = 0
    steps: int = 0


@dataclass(slots=True)
class Stats(Counts):
    """Counts of one wrapper over all its calls, threads and trajectories together.

    Attributes:
        full_passes: calls that ran the whole UNet.
        adaptor_passes: calls in which the adaptor stood in for the region.
        reasons: why full passes were full → how many; docs/timeline.md says what each means.
        regions: where several regions have clocks, which one adaptor passes skipped → how many.
        macs_run: multiply-accumulates that ran, the adaptor's included, attention products counted.
        macs_plain: what the same calls cost without Clockwork.
        trajectories: the same counts for each of the last 64 trajectories, newest last.

    Example:
        >>> stats = Stats(full_passes=4, adaptor_passes=4, macs_run=60, macs_plain=80)  # cw.stats
        >>> stats.macs_saved, stats.saving
        (20, 0.25)
    """

    trajectories: deque[TrajectoryStats] = field(default_factory=lambda: deque(maxlen=64))

    def count(
        self, reason: str | None, run: int, plain: int, trajectory: int = 0, step: int = 0, region: str = ""
    ) -> None:
        """Add one pass: a full one with its reason, an adaptor pass without.

        Args:
            reason: why it was full.
            run, plain: MACs that ran, and that a full pass runs.
            trajectory: its number; 0 for a call that belongs to none.
            step: of the trajectory.
            region: which one an adaptor pass skipped, where there are several.
        """
        with _COUNTING:
            counts = self.trajectories[-1] if trajectory and self.trajectories else None
            if counts is None or counts.number != trajectory:
                counts = self._of(trajectory)
            counts.steps = step
            if reason is None:
                self.adaptor_passes += 1
                counts.adaptor_passes += 1
                if region:
                    self.regions[region] += 1
                    counts.regions[region] += 1
            else:
                self.full_passes += 1
                counts.full_passes += 1
                self.reasons[reason] += 1
                counts.reasons[reason] += 1
            self.macs_run += run
            self.macs_plain += plain
            counts.macs_run += run
            counts.macs_plain += plain

    def _of(self, trajectory: int) -> TrajectoryStats:
        """Counts of this trajectory: another thread's may have begun meanwhile; of none, counts that nobody sees."""
        own = next((counts for counts in self.trajectories if counts.number == trajectory), None)
        if own is None:
            own = TrajectoryStats(number=trajectory)
            if trajectory:
                self.trajectories.append(own)
        return own

    def clear(self) -> None:
        """Start counting anew."""
        with _COUNTING:
            self.full_passes = self.adaptor_passes = self.macs_run = self.macs_plain = 0
            self.reasons.clear()
            self.regions.clear()
            self.trajectories.clear()


@dataclass(frozen=True, slots=True)
class RunReport(Report):
    """`cw.report()`: the counts, the region and the schedule at one moment; prints as a short text.

    Attributes:
        model: class name of the UNet.
        region: one line about the region; "not known yet" before the first call.
        schedule: as `Schedule` prints.
        adaptor: class name.
        full_passes, adaptor_passes, reasons, macs_run, macs_plain: as in `Stats`.
        cache: branch → bytes that are kept for it now, features and copies of its conditions.
        regions: as in `Stats`.
        uncounted: operators of the recorded calls that may multiply and accumulate, and are in no count: where there
            are any, MACs are lower bounds.

    Example:
        >>> report = RunReport(
        ...     "UNet",
        ...     "down.0 → up.1",
        ...     "every(2)",
        ...     "IdentityAdaptor",
        ...     full_passes=1,
        ...     adaptor_passes=1,
        ...     reasons={"first step": 1},
        ...     macs_run=1_500_000,
        ...     macs_plain=2_000_000,
        ... )  # cw.report()
        >>> print(report)
        Clockwork on UNet
          region       down.0 → up.1
          schedule     every(2)
          adaptor      IdentityAdaptor
          passes       1 full, 1 with the adaptor
          full because first step: 1
          MACs run     1.50 MMACs of 2.00 MMACs (attention products counted)
          saved        25.0%
    """

    SCHEMA = "run/1"

    model: str
    region: str
    schedule: str
    adaptor: str
    full_passes: int
    adaptor_passes: int
    reasons: dict[str, int]
    macs_run: int
    macs_plain: int
    cache: dict[str, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def saving(self) -> float:
        """Share of the MACs that did not run, 0 to 1."""
        return 1 - self.macs_run / self.macs_plain if self.macs_plain else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) in the order of printing."""
        return [
            ("region", self.region),
            ("schedule", self.schedule),
            ("adaptor", self.adaptor),
            ("passes", f"{self.full_passes} full, {self.adaptor_passes} with the adaptor"),
            *(("skipping", f"{region}: {count}") for region, count in self.regions.items()),
            *(("full because", f"{reason}: {count}") for reason, count in self.reasons.items()),
            ("MACs run", f"{macs(self.macs_run)} of {macs(self.macs_plain)} (attention products counted)"),
            *([("lower bound", f"not counted: {', '.join(self.uncounted)}")] if self.uncounted else []),
            ("saved", str(percent(self.saving))),
            *(("cache", f"{branch}: {quantity(size, 'B')}") for branch, size in self.cache.items()),
        ]

    def __str__(self) -> str:
        return "\n".join([f"Clockwork on {self.model}", *(f"  {name:<13}{value}" for name, value in self.rows())])

    def table(self) -> Table:
        """The same as a table: rich prints it."""
        from clockwork_hooks.reports.tables import table

        return table(f"Clockwork on {self.model}", ("", "what ran"), self.rows())

    def data(self) -> dict[str, Any]:
        """All fields; counts as integers, MACs in units."""
        return {name: getattr(self, name) for name in RunReport.__slots__} | {"saving": self.saving}


# Nothing is amiss where passes are full for these.
_QUIET = frozenset(
    {
        *(reasons.FIRST, reasons.SCHEDULED, reasons.MOVED, reasons.LONGEST),
        *(reasons.TRACED, reasons.TRAINING, reasons.TEACHER),
        *(reasons.TRANSFORMED, reasons.REPEATED, reasons.UNREADABLE, reasons.UNANALYSED),
    }
)
_STEPS, _DOUBTED = 6, 3
_RESTARTS = 12
_UP_AND_DOWN = (
    "times go up and down: either a sampler evaluates between its steps or adds noise before each (dpm_2_ancestral, "
    "dpmpp_2s_ancestral, EDM with churn, KarrasVe), or times are drawn at random (score distillation, losses)",
    'for a sampler, `with cw.sampler("dpm_2_ancestral", sigmas):` around each run, with its own name ("edm" for EDM, '
    '"karras_ve"), or `with cw.step():` around the evaluations of each step, as for RePaint; for random times, '
    "`cw.enabled = False`",
)
_RUNS, _EVALUATIONS = 24, 128  # of one step, in a row; of one step: a picture in tiles has many
_ONE_STEP = (
    "each call is the first step of a run: `with cw.trajectory():` or `cw.reset()` is inside the loop over the steps, "
    "or `with cw.step():` is around all of it, or the time is the same in every call",
    "put `with cw.trajectory():` around the whole run, and `with cw.step():` around the evaluations of one step; for "
    "single evaluations, which have nothing to reuse: `cw.enabled = False`",
)
_WHOLE_RUNS = 2  # that none of the adaptor's steps was in
_PATIENCE = {reasons.EVIDENCE: 9}  # a trend is believed after five strides
# Libraries whose hooks and forwards move or compute what the module itself does, and look at nothing.
_HARMLESS = ("torch", "accelerate", "diffusers", "peft", "clockwork_hooks")


class NoAdaptorPass:
    """Counts denoising steps without an adaptor pass, and warns once: of the leading reason, and what to do.

    Attributes:
        needless: paths of `ignore=` that the last recorded call had no argument at.
        runs_tell: does it tell anything that the run under way has no adaptor pass?
    """

    def __init__(self) -> None:
        self.needless: tuple[str, ...] = ()
        self.runs_tell = True
        self._warned, self._steps, self._calls, self._at, self._adapted = False, 0, 0, (0, 0), 0
        self._open = 0  # steps up to the last of which nothing but what the region was given stood in the way
        self._runs, self._evaluations = 0, 0  # since a second step
        self._whole_runs, self._reached = 0, 0  # by the schedule alone, and the last step of the longest
        self._moved = False  # did an adaptive schedule decide in them?
        self._doubted: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()

    def count(self, reason: str, place: Position, adapted: int) -> None:
        """A full pass has run, for this reason; there were so many adaptor passes before it."""
        if self._warned:
            return
        if adapted != self._adapted:
            self._adapted, self._steps, self._calls, self._runs, self._evaluations = adapted, 0, 0, 0, 0
            self._whole_runs, self._reached, self._moved, self._open = -1, 0, False, 0  # the run under way has one
            self._doubted.clear()
            self._changed.clear()
        self._calls += 1
        if self.runs_tell:
            self._count_runs(reason, place)
        else:
            self._runs, self._evaluations, self._whole_runs = 0, 0, -1
        if place.changed:
            self._changed.update(place.changed)
        if place.trajectory == 0 or self._at != (place.trajectory, place.step):
            self._at, self._steps = (place.trajectory, place.step), self._steps + 1
            if reason not in _QUIET:
                self._doubted[reason] += 1
        if reason in (reasons.MOVED, reasons.LONGEST):
            self._open = self._steps
            self._doubted.clear()
            self._changed.clear()
        steps = self._steps - self._open
        up_and_down = place.restarts >= _RESTARTS and self._calls >= _RESTARTS
        if up_and_down or (self._runs >= _RUNS and reason == reasons.UNREADABLE):
            self._warn(reason, place)
        elif self._runs >= _RUNS or self._evaluations >= _EVALUATIONS:
            self._warn(reasons.FIRST, place, _ONE_STEP)
        elif self._whole_runs >= _WHOLE_RUNS:
            if self._moved:
                self._warn(reasons.MOVED, place)
            else:
                self._warn(reasons.SCHEDULED, place, _not_reached(self._reached))
        elif steps >= _STEPS and self._doubted.total() >= _DOUBTED:
            leading = self._doubted.most_common(1)[0][0]
            if steps >= _PATIENCE.get(leading, _STEPS):
                self._warn(leading, place)

    def _count_runs(self, reason: str, place: Position) -> None:
        """Runs of one step in a row, and whole runs in which the schedule alone made all passes full."""
        begins = reason == reasons.UNREADABLE or (reason == reasons.FIRST and self._at[0] != place.trajectory)
        if reason not in (reasons.FIRST, reasons.TRACED, reasons.UNREADABLE):
            self._runs = self._evaluations = 0
        else:
            self._runs, self._evaluations = self._runs + begins, self._evaluations + 1
        if reason in (reasons.SCHEDULED, reasons.MOVED):
            self._reached, self._moved = max(self._reached, place.step), self._moved or reason == reasons.MOVED
        elif begins:
            self._whole_runs += self._at[1] > 1
        elif reason != reasons.FIRST:
            self._whole_runs, self._reached = -1, 0  # of the run under way nothing can be said

    def _warn(self, leading: str, place: Position, why: tuple[str, str] | None = None) -> None:
        self._warned = True
        cause, remedy = why or reasons.REASONS[leading]
        if place.restarts >= _DOUBTED and leading in (reasons.FIRST, reasons.EVIDENCE):
            cause, remedy = _UP_AND_DOWN
        paths = [path for path, _ in self._changed.most_common(3)] if leading == reasons.NEW else []
        seen = f"  arguments with another value in each step: {', '.join(paths)}\n" if paths else ""
        if leading == reasons.NEW and self.needless:
            seen += f"  ignore= names what is not among the arguments: {', '.join(self.needless)}\n"
        what = f"{self._calls} calls" if self._steps < 2 else f"{self._steps} denoising steps"
        asked = "" if leading in (reasons.SCHEDULED, reasons.MOVED) else ", though the schedule asks for some"
        warn(
            f"{what} without an adaptor pass{asked}: nothing is saved\n"
            f"  most are full because: {leading}\n  cause: {cause}\n{seen}"
            f"What to do: {remedy.removeprefix('nothing; or ')}{_ignoring(paths)}",
            NoEffectWarning,
        )


def _not_reached(steps: int) -> tuple[str, str]:
    """Cause and remedy, where runs have so many steps."""
    return (
        f"runs have {steps} steps, and the schedule gives none of these to the adaptor",
        "choose steps that the runs have, as `schedule=ch.Schedule.every(2)` does. An adaptor that was tuned or "
        "calibrated elsewhere counts steps as its loop did: `wrap_pipeline` counts the scheduler's steps, `wrap` and "
        "`ch.tune` count times",
    )


def _ignoring(paths: Iterable[str]) -> str:
    """What to write where nothing within the region depends on these arguments."""
    names = "".join(f'"{path}", ' for path in paths).rstrip()
    return f"; or, if nothing in the region depends on it: ch.wrap(unet, ignore=({names}))" if names else ""


class OtherSteps:
    """Warns once of a number of steps: another one than adaptor or schedule were made for, or one that has to be known.

    Args:
        adaptor: its class, for the message.
        counts: numbers of steps that it was made for; none where it does not say.
        asks: the schedule, where it depends on the number of steps and only the run can tell it.
        names: the schedule, where it names steps, and the adaptor was made for no number of them.
    """

    def __init__(
        self, adaptor: str, counts: Collection[int], asks: Schedule | None = None, names: Schedule | None = None
    ) -> None:
        self._adaptor, self._counts, self._asks, self._names = adaptor, counts, asks, names

    def look(
        self, step: int, steps: int | None, *, own: tuple[int, int | None] | None = None, pipeline: bool = False
    ) -> None:
        """An adaptor pass at this step of a run of so many steps; None where that is not known.

        Of a pipeline it is known where its scheduler says it, and a user who passed a clock can do nothing elsewhere.
        `own` counts the steps alone in which the adaptor's region is not within one that is skipped.
        """
        if steps is None and self._asks is not None and not pipeline:
            asks, self._asks = self._asks, None
            warn(
                f"the schedule depends on the number of steps, which has to be known\n  schedule: {asks}\n"
                "  steps: not known, so spread and early run as every, and last_full has no effect\n"
                "What to do: sample within `with cw.trajectory(steps=20):`, with your own number of steps; or pass "
                f"schedule=Schedule.at(Schedule.{asks}.adaptor_steps(20))",
                OtherStepsWarning,
            )
        if steps is not None and self._names is not None and steps < self._names.last_named:
            names, self._names = self._names, None
            warn(
                "a schedule can use only steps that the run has: those after its last step have no effect\n"
                f"  schedule: {names}\n  steps of this run: {steps}\n"
                "What to do: name steps that it has; Schedule.every(2) and Schedule.spread(2) fit any number of them",
                OtherStepsWarning,
            )
        step, steps = own or (step, steps)
        if not self._counts or (steps in self._counts if steps is not None else step <= max(self._counts)):
            return
        counts, self._counts = self._counts, ()
        warn(
            f"an adaptor works best in the number of steps that it was made for: {self._adaptor} was made for "
            f"{' or '.join(map(str, counts))} steps, and this run has {steps or f'{step} or more'}\n"
            "What to do: calibrate or train one with this number of steps",
            OtherStepsWarning,
        )


class MoreSteps:
    """Warns once of a run that goes on after the number of steps that was said: a clock has nothing to say of these."""

    def __init__(self) -> None:
        self._warned = False

    def look(self, step: int, said: int | None, schedule: Schedule) -> None:
        """A step that the schedule has full; `said`: the number of steps, None where nobody has."""
        if self._warned or said is None or step <= said or not schedule.skips(step):
            return
        self._warned = True
        warn(
            "a run has more steps than were declared: those after them are full passes\n"
            f"  steps declared: {said}\n  this step: {step}\n"
            "What to do: `with cw.trajectory(steps=20):`, with your own number of steps; where a sampler evaluates "
            "between its steps, `with cw.sampler(name, sigmas):` counts for itself",
            OtherStepsWarning,
        )


class Watchers:
    """Warns once of code of others that looks at modules which adaptor passes skip."""

    def __init__(self) -> None:
        self._warned = False

    def look(self, unet: nn.Module, paths: Iterable[str], keep: Iterable[str]) -> None:
        """Look at the modules with skipped calls, and at all inside them, but for those that are kept."""
        if self._warned:
            return
        watching = watchers(unet, paths, tuple(keep))
        if watching:
            self._warned = True
            lines = [f"  {path}: {what}" for path, what in list(watching.items())[:8]]
            more = [f"  and {len(watching) - 8} more"] if len(watching) > 8 else []
            tops = [path for path in watching if not any(path.startswith(f"{other}.") for other in watching)]
            names = json.dumps(tops)  # all of them: a controller that counts needs every layer that it counts
            warn(
                "other code looks at modules that adaptor passes skip, and is not called when they are skipped\n"
                + "\n".join([*lines, *more])
                + f"\nWhat to do: if it needs every step, wrap(..., keep={names}) keeps them running; "
                "clockwork-hooks explain SkippedModuleWarning says more",
                SkippedModuleWarning,
            )


def warn_of_failure(error: Exception) -> None:
    """The recorded call of a later input signature could not be analysed: its calls are full."""
    warn(
        "calls of one input signature could not be analysed: they are full passes; all others are served as before\n"
        f"  error: {type(error).__name__}: {error}"
        + (
            "" if isinstance(error, ClockworkError) else "\nWhat to do: report it, with the UNet and the input's shapes"
        ),
        NoEffectWarning,
    )


def warn_of_dear(adaptor: str, adaptor_pass: int, full_pass: int) -> None:
    """Its passes cost more than full ones: whoever looks at pictures alone sees nothing of it."""
    warn(
        "an adaptor has to take fewer MACs than the region that it stands in for: this one makes each run dearer\n"
        f"  adaptor: {adaptor}\n  adaptor pass: {macs(adaptor_pass)}\n  full pass: {macs(full_pass)}\n"
        'What to do: a cheaper adaptor, as calibrate(..., kind="affine"), or none; or a wider region',
        NoEffectWarning,
    )


def watchers(unet: nn.Module, paths: Iterable[str], keep: tuple[str, ...] = ()) -> dict[str, str]:
    """Modules at and below these paths that code of others looks at: path → what it is."""
    watching: dict[str, str] = {}
    for top in paths:
        try:
            module = unet.get_submodule(top)
        except AttributeError:
            continue
        suspects = [
            own
            for own in map(vars, walk(module))
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "processor" in own
        ]
        if not any(map(_watcher, suspects)):
            continue  # nearly always; no path is written: 124 µs a run of the demo and not 358
        for path, inner in module.named_modules(prefix=top, remove_duplicate=False):
            what = _watcher(vars(inner))
            if what and not any(path == name or path.startswith(f"{name}.") for name in keep):
                watching[path] = what
    return watching


def _watcher(module: Mapping[str, Any]) -> str | None:
    for hooks in (module["_forward_hooks"], module["_forward_pre_hooks"]):
        for hook in hooks.values():
            if not _is_harmless(hook):
                return f"a forward hook, {_name(hook)}"
    own = module.get("forward")
    if isinstance(own, types.FunctionType) and not _is_harmless(own):
        return f"a forward of somebody else's, {_name(own)}"
    processor = module.get("processor")
    if processor is not None and not isinstance(processor, nn.Module) and _has_state(processor):
        return f"an attention processor with state, {type(processor).__name__}"
    # diffusers' registry of hooks, of which caches count their module's calls
    added = attribute(module.get("_diffusers_hook"), "hooks", {})
    counting = [type(hook).__name__ for hook in added.values() if attribute(hook, "_is_stateful", False)]
    return f"a hook of diffusers with state, {', '.join(counting)}" if counting else None


def _is_harmless(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = attribute(hook, "__module__") or type(hook).__module__
    return home.split(".")[0] in _HARMLESS and "pipelines" not in home  # pipelines hook in to look at maps


def _has_state(processor: Any) -> bool:
    """Does it hold what one call may leave for another: attributes of an object of no library's class?"""
    foreign = [
        kind
        for kind in type(processor).__mro__
        if kind is not object and not kind.__module__.startswith(("diffusers.models.", "peft.", "builtins"))
    ]
    if not foreign:
        return False
    held = [value for kind in foreign for name, value in vars(kind).items() if not name.startswith("__")]
    return bool(attribute(processor, "__dict__")) or any(not _is_code(value) for value in held)


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (staticmethod, classmethod, property))


def _name(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(attribute(hook, "__qualname__", type(hook).__name__))

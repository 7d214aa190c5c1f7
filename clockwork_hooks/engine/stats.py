"""What ran, what it cost, and why each full pass was full."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clockwork_hooks._numbers import macs, percent, quantity
from clockwork_hooks.reports.report import Report

if TYPE_CHECKING:
    from clockwork_hooks.reports.tables import Table

__all__ = ["Counts", "RunReport", "Stats", "TrajectoryStats"]


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
        trajectories: the same for each of the last 64 trajectories, newest last.

    Example:
        >>> stats = Stats(full_passes=4, adaptor_passes=4, macs_run=60, macs_plain=80)  # cw.stats
        >>> stats.macs_saved, stats.saving
        (20, 0.25)
    """

    trajectories: deque[TrajectoryStats] = field(default_factory=lambda: deque(maxlen=64))
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

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
        with self._lock:
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
        with self._lock:
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

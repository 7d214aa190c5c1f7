"""What `plan` returns: what was considered, and the region, schedule and adaptor that were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clockwork_hooks.analysis.candidates import StandIn
from clockwork_hooks.boundary import Region
from clockwork_hooks.choice import Choice
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.plots import Plot, plots
from clockwork_hooks.rendering import Report, reading
from clockwork_hooks.report import Table, percent, table
from clockwork_hooks.schedule import Schedule

__all__ = ["Option", "Plan", "Weigh"]

Weigh = Literal["MACs", "ms"]
_NAMES = ("held_out", "steps", "weigh", "choice", "fingerprint", "model", "adaptor_name", "adaptor_folder")


@dataclass(frozen=True, slots=True)
class Option:
    """One region with one adaptor and one schedule.

    Attributes:
        region: name of the region, and of the adaptor unless it is the identity.
        kind: "planned", "clock N", or "adaptive".
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

    def gain(self, weigh: Weigh) -> float:
        """What is saved, in the unit that a plan weighs."""
        return self.saved if weigh == "MACs" or self.saved_ms is None else self.saved_ms


@dataclass(frozen=True, slots=True)
class Plan(Report):
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
        found: the region itself; None after `from_json`.
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
    adaptor: StandIn = field(default=None, compare=False, repr=False)
    found: Region | None = field(default=None, compare=False, repr=False)

    @property
    def region(self) -> Region | Choice:
        """The region; after `from_json`, how `wrap` finds it at the first call."""
        return self.found or Choice(**self.choice, strict=True)

    @property
    def schedule(self) -> Schedule:
        """The adaptor at exactly the chosen steps."""
        return self.chosen.schedule

    def pareto(self) -> tuple[Option, ...]:
        """The measured options that no other one beats in both saving and error, by saving."""
        known = [option for option in self.options if option.measured is not None]
        best = [
            one
            for one in known
            if not any(
                o.gain(self.weigh) >= one.gain(self.weigh) and o.error < one.error for o in known if o is not one
            )
        ]
        return tuple(sorted(best, key=lambda option: option.gain(self.weigh)))

    def table(self) -> Table:
        """The measured options by saving; the chosen one is marked, and so is what no other beats."""
        best, chosen, timed = self.pareto(), self.chosen, self.weigh == "ms"
        rows = [
            (
                "chosen" if option == chosen else "best" if option in best else "",
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
            f"{self.model}, {self.steps} steps: {chosen.region}, adaptor at {', '.join(map(str, chosen.steps))}.",
            "Relative L2 error of the result. Saved: share of a trajectory's MACs, attention products counted"
            + ("; and of the milliseconds spent in the UNet, from medians of its passes." if timed else "."),
            f"The chosen option: predicted {percent(chosen.predicted) or '–'}, measured {percent(chosen.measured)}, "
            f"held out {percent(self.held_out)}.",
        )
        saved = (">MACs saved", ">ms saved") if timed else (">saved",)
        heads = ("", "schedule", "region", ">adaptor steps", *saved, ">predicted", ">measured")
        return table("Plan", heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """Everything but the adaptor."""
        options = [_plain(option) for option in self.options]
        return {"chosen": _plain(self.chosen), "options": options} | {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_json(cls, text: str, *, adaptor: StandIn = None) -> Plan:
        """What `to_json` wrote.

        Args:
            text: the JSON.
            adaptor: what the plan was made with, where it is neither the identity nor the folder of a saved one.

        Raises:
            ArgumentError: the text is no plan, or lacks its adaptor.
        """
        with reading(cls, text) as data:
            known = {name: data[name] for name in _NAMES}
            made = cls(chosen=_option(data["chosen"]), options=tuple(map(_option, data["options"])), **known)
        if adaptor is None and made.adaptor_folder is None and made.adaptor_name != "identity":
            raise ArgumentError(
                "a plan is used with the adaptor that it was made with",
                seen={"adaptor of the plan": made.adaptor_name, "given": "none"},
                do="pass Plan.from_json(text, adaptor=...)",
            )
        return replace(made, adaptor=made.adaptor_folder if adaptor is None else adaptor)

    def plot(self, path: str | Path) -> None:
        """Error against saving: planned schedules, clocks, adaptive ones (PNG, SVG or PDF; needs matplotlib)."""
        self._pareto().save(path)

    def figures(self) -> Sequence[Plot]:
        """Error against saving."""
        return plots(self._pareto())

    def _pareto(self) -> Plot:
        from clockwork_hooks.analysis.figures import pareto

        return Plot(lambda: pareto(self), "Error of the result against what is saved, by region and kind of schedule")


def _plain(option: Option) -> dict[str, Any]:
    return {name: getattr(option, name) for name in Option.__slots__}


def _option(data: dict[str, Any]) -> Option:
    return Option(**{**data, "steps": tuple(data["steps"])})

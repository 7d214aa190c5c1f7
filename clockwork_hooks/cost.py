"""The result of a FLOP count: one object, several views, three renderings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clockwork_hooks.boundary import Region
from clockwork_hooks.counts import MacsRow, OperatorMacs, Uncounted
from clockwork_hooks.drawing import Diagram
from clockwork_hooks.rendering import Report
from clockwork_hooks.report import Table, flops, macs, percent, shape, table
from clockwork_hooks.schedule import Schedule

__all__ = ["FlopsReport", "MacsRow", "OperatorMacs", "Uncounted"]


@dataclass(frozen=True, slots=True)
class FlopsReport(Report):
    """The cost of a UNet's passes and of a whole trajectory, with several views of one count.

    All MACs are for the batch that was traced; only the trajectory knows of guidance, which doubles the batch.

    Attributes:
        model: class name of the UNet.
        sample: shape of the traced sample, batch first.
        parameters: number of parameters of the UNet.
        attention: are attention products counted?
        norms: "fvcore" if its estimate for normalisations is added, else None.
        full_macs: one full pass.
        adaptor_macs: one call of the adaptor alone; 0 for the identity; None without a region.
        region: what adaptor passes skip; None if there is none.
        no_region: why there is none; "" otherwise.
        schedule: which steps are full.
        steps: denoising steps of a trajectory.
        guidance: classifier-free guidance: two samples a step for each one traced.
        operators: the operators that count, in the order they ran.
        uncounted: operators that may multiply and accumulate and are not counted.
        diagram: the UNet as a U, for pictures; its MACs always count attention products.
        depth: names of a module path that the view by module keeps.
    """

    SCHEMA = "flops/1"

    model: str
    sample: tuple[int, ...]
    parameters: int
    attention: bool
    norms: str | None
    full_macs: int
    adaptor_macs: int | None
    region: Region | None = field(repr=False)
    no_region: str
    schedule: Schedule
    steps: int
    guidance: bool
    operators: tuple[OperatorMacs, ...] = field(repr=False)
    uncounted: tuple[Uncounted, ...]
    diagram: Diagram | None = field(default=None, repr=False, compare=False)
    depth: int = field(default=2, repr=False, compare=False)

    @property
    def full_flops(self) -> int:
        """FLOPs of one full pass."""
        return 2 * self.full_macs

    @property
    def adaptor_pass_macs(self) -> int | None:
        """MACs of one adaptor pass, the adaptor included; None without a region."""
        if self.adaptor_macs is None:
            return None
        return self.adaptor_macs + sum(operator.macs for operator in self.operators if not operator.skipped)

    @property
    def adaptor_pass_flops(self) -> int | None:
        """FLOPs of one adaptor pass, the adaptor included; None without a region."""
        return None if self.adaptor_pass_macs is None else 2 * self.adaptor_pass_macs

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps, from 1, that run the whole UNet; of an adaptive schedule, those that do so for certain."""
        return tuple(step for step in range(1, self.steps + 1) if self.schedule.is_full(step))

    @property
    def full_trajectory_macs(self) -> int:
        """MACs of a trajectory without Clockwork: every step a full pass."""
        return self.steps * self.full_macs * (2 if self.guidance else 1)

    @property
    def full_trajectory_flops(self) -> int:
        """FLOPs of a trajectory without Clockwork."""
        return 2 * self.full_trajectory_macs

    @property
    def trajectory_macs(self) -> int | None:
        """MACs of a trajectory: full and adaptor passes as the schedule says; None without a region.

        Of an adaptive schedule the most there can be: it may find every step to be full.
        """
        return self._trajectory(self.schedule.bounds(self.steps)[1])

    @property
    def least_trajectory_macs(self) -> int | None:
        """The same, but of an adaptive schedule the least: its longest runs of adaptor steps throughout."""
        return self._trajectory(self.schedule.bounds(self.steps)[0])

    def _trajectory(self, full: int) -> int | None:
        if self.adaptor_pass_macs is None:
            return None
        each = full * self.full_macs + (self.steps - full) * self.adaptor_pass_macs
        return each * (2 if self.guidance else 1)

    @property
    def trajectory_flops(self) -> int | None:
        """FLOPs of a trajectory; None without a region."""
        return None if self.trajectory_macs is None else 2 * self.trajectory_macs

    @property
    def saved_share(self) -> float | None:
        """Share of a trajectory's MACs that Clockwork saves, 0 to 1, as `trajectory_macs`; None without a region."""
        return self._saved(self.trajectory_macs)

    def _saved(self, run: int | None) -> float | None:
        return None if run is None or not self.full_trajectory_macs else 1 - run / self.full_trajectory_macs

    @property
    def convention(self) -> str:
        """What the numbers count, in a sentence; part of every rendering."""
        products = "counted" if self.attention else "left out, as in the paper"
        norms = "fvcore's estimate for normalisations added" if self.norms else "normalisations not counted"
        return (
            f"MACs of convolutions and matrix products, attention products {products}; {norms}; 1 MAC = 2 FLOPs. "
            f"Batch as traced: {self.sample[0]}."
        )

    def by_module(self, depth: int | None = None) -> tuple[MacsRow, ...]:
        """MACs per module, in the order of first use; paths are cut off after `depth` names, the report's own."""
        depth = depth or self.depth
        return self._rows(lambda operator: ".".join(operator.module.split(".")[:depth]) or "(the UNet itself)")

    def by_operator(self) -> tuple[MacsRow, ...]:
        """MACs per operator, dearest first."""
        return tuple(sorted(self._rows(lambda operator: operator.operator), key=lambda row: -row.full_macs))

    def by_level(self) -> tuple[MacsRow, ...]:
        """MACs per resolution level, highest first; "no level" is what runs before the first spatial operator."""
        area = {shape(o.resolution): math.prod(o.resolution) for o in self.operators if o.resolution}
        rows = self._rows(lambda operator: shape(operator.resolution) or "no level")
        return tuple(sorted(rows, key=lambda row: -area.get(row.name, 0)))

    def _rows(self, name: Callable[[OperatorMacs], str]) -> tuple[MacsRow, ...]:
        found: dict[str, list[int]] = {}
        for operator in self.operators:
            sums = found.setdefault(name(operator), [0, 0, 0])
            sums[0] += operator.macs
            sums[1] += 0 if operator.skipped else operator.macs
            sums[2] += 1
        with_region = self.region is not None
        return tuple(MacsRow(key, full, kept if with_region else None, n) for key, (full, kept, n) in found.items())

    # -- renderings ---------------------------------------------------------------------------------------------------

    def tables(self) -> tuple[Table, ...]:
        """Passes, levels, operators, modules, and what was not counted."""
        views = (
            ("By resolution level", "level", self.by_level()),
            ("By operator", "operator", self.by_operator()),
            ("By module", "module", self.by_module()),
        )
        made = [self.table(), *(self._view(*view) for view in views)]
        if self.uncounted:
            rows = [(item.operator, item.calls, ", ".join(item.modules[:3])) for item in self.uncounted]
            columns = ("operator", ">calls", "first modules")
            note = "These may multiply and accumulate; nothing here can count them, so all sums are lower bounds."
            made.append(table("Not counted", columns, rows, notes=(note,)))
        return tuple(made)

    def table(self) -> Table:
        """A full pass, an adaptor pass and the trajectory."""
        rows: list[tuple[object, ...]] = [("full pass", macs(self.full_macs), flops(self.full_flops), None)]
        if self.adaptor_pass_macs is not None and self.adaptor_macs is not None:
            share = 1 - self.adaptor_pass_macs / (self.full_macs or 1)
            rows += [
                ("adaptor pass", macs(self.adaptor_pass_macs), flops(self.adaptor_pass_flops), percent(share)),
                ("of which the adaptor", macs(self.adaptor_macs), flops(2 * self.adaptor_macs), None),
            ]
        each = f"{self.steps} steps" + (" with guidance" if self.guidance else "")
        rows.append((f"{each}, all full", macs(self.full_trajectory_macs), flops(self.full_trajectory_flops), None))
        if self.trajectory_macs is not None:
            for full in dict.fromkeys(self.schedule.bounds(self.steps)):
                run, name = self._trajectory(full) or 0, f"{each}, {full} of them full"
                rows.append((name, macs(run), flops(2 * run), percent(self._saved(run))))
        title = f"{self.model}, sample {shape(self.sample)}, {self.parameters / 1e6:.2f} M parameters"
        return table(title, ("", ">MACs", ">FLOPs", ">saved"), rows, notes=self._notes())

    def _notes(self) -> list[str]:
        notes = [self.convention]
        if self.guidance:
            notes.append("Guidance doubles the batch: two samples a step for each one traced.")
        if self.region is None:
            return [*notes, f"No adaptor pass: {self.no_region}"]
        letters = "F full pass, " + ("A adaptor pass" if self.schedule.threshold is None else "? decided at run time")
        preview = f": {self.schedule.preview(self.steps)} ({letters})" if self.steps <= 16 else ""
        region = self.region
        edge = f"{shape(region.resolution)} down to {shape(region.bottleneck)}, level {region.level}, cut {region.cut}"
        return [
            *notes,
            f"Schedule {self.schedule}{preview}",
            f"Region {region.entry.path} → {region.exit.path}, {edge}",
        ]

    def _view(self, title: str, head: str, rows: tuple[MacsRow, ...]) -> Table:
        total = self.full_macs or 1
        columns = (head, ">operators", ">full pass", ">share", ">adaptor pass")
        cells = [
            (row.name, row.operators, macs(row.full_macs), percent(row.full_macs / total), macs(row.adaptor_pass_macs))
            for row in rows
        ]
        notes = ("The adaptor's own MACs are not among these.",) if self.adaptor_macs else ()
        return table(title, columns, cells, notes=notes)

    def figures(self) -> tuple[Diagram, ...]:
        """The U."""
        return () if self.diagram is None else (self.diagram,)

    @property
    def heading(self) -> str:
        """Title of the page."""
        return f"{self.model}: what passes cost, and what Clockwork saves"

    def data(self) -> dict[str, Any]:
        """The report as plain data; every key that holds a count names its unit."""
        names = (
            "model parameters attention norms full_macs full_flops adaptor_macs adaptor_pass_macs adaptor_pass_flops "
            "steps guidance full_trajectory_macs full_trajectory_flops trajectory_macs trajectory_flops saved_share "
            "least_trajectory_macs"
        )
        region = self.region
        return {
            "convention": self.convention,
            **{name: getattr(self, name) for name in names.split()},
            "sample": self.sample,
            "schedule": str(self.schedule),
            "full_steps": self.full_steps,
            "region": region
            and {"entry": region.entry.path, "exit": region.exit.path, "cut": region.cut, "level": region.level},
            "no_region": self.no_region,
            "by_level": [_plain(row) for row in self.by_level()],
            "by_operator": [_plain(row) for row in self.by_operator()],
            "by_module": [_plain(row) for row in self.by_module()],
            "uncounted": [_plain(item) for item in self.uncounted],
        }

    def __str__(self) -> str:
        return self.table().to_markdown()


def _plain(row: MacsRow | Uncounted) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}

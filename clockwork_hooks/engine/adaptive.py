"""Calls of a wrapper whose schedule decides at run time: each pass looks at the entry before the region begins.

An adaptor pass may turn into a full one up to the first skipped call: until then both run the same modules. There the
entry is at hand, and is compared with the entry of the branch's last full pass. The first call of a step that gets to
compare decides for the step, so the device is waited for once a step at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.timeline import Position
from clockwork_hooks.engine.engine import Engine, Prepared, Running
from clockwork_hooks.engine.passes import Emit, Pass
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.regions.cut import CutPlan, Kind
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["AdaptiveEngine"]


class AdaptiveEngine(Engine):
    """Runs the calls of a UNet whose schedule is `Schedule.adaptive`.

    Args:
        unet: the UNet.
        adaptor: stands in for the region.
        schedule: has a threshold.
        **options: as `Engine` takes them.
    """

    looks = True  # each pass needs its entry, whatever the adaptor is

    def __init__(self, unet: nn.Module, adaptor: Adaptor, schedule: Schedule, **options: Any) -> None:
        super().__init__(unet, adaptor, schedule, **options)
        self.threshold, self.longest = schedule.threshold or 0.0, schedule.longest

    def _install(self, region: Region) -> None:
        if "entry" not in region.cut_plan.ports:
            raise RegionNotFoundError(
                "an adaptive schedule compares the region's entry, so some module must take or return it",
                seen={"region": region.line, "entry": region.entry.path},
                do="choose another region, or another schedule",
            )
        super()._install(region)

    def _why_full(self, running: Running) -> str | None:
        """As `Engine._why_full`; and what is known of this step before the entry is."""
        found, position = super()._why_full(running), running.position
        if found is not None or position is None or position.before is None:
            return found
        step, decided = self.states.current().decided
        if step == (position.trajectory, position.step) and decided is not None:
            return decided
        if position.before.entry is None:
            return reasons.TRACED if position.before.missing == reasons.TRACED else reasons.UNSEEN
        if position.before.age >= self.longest:
            return self._decide(position, reasons.LONGEST)
        return None

    def _decide(self, position: Position, reason: str | None) -> str | None:
        """The whole step is full for this reason; or may use the adaptor."""
        self.states.current().decided = ((position.trajectory, position.step), reason)
        return reason

    def _pass(self, prepared: Prepared, region: Region, stand_in: Emit | None) -> Pass:
        kind: Kind = "adaptor" if stand_in else "full"
        running: Any = self.states.current().running[-1] if stand_in else None

        def adapts(entry: torch.Tensor | None) -> bool:
            running.reason = self._judge(running.position, entry)
            return running.reason is None

        return AdaptivePass(region.cut_plan, kind, stand_in, copies=prepared.copies, adapts=adapts)

    def _judge(self, position: Position, entry: torch.Tensor | None) -> str | None:
        """Why the pass that has come to this entry is full after all; None if the adaptor may stand in."""
        before = position.before
        assert before is not None  # else it would not be an adaptor pass
        if entry is None or before.entry is None or entry.shape != before.entry.shape:
            return reasons.UNSEEN
        if self.states.current().decided[0] == (position.trajectory, position.step):
            return None  # `_why_full` has looked at the decision
        changed = not bool(change(entry, before.entry) <= self.threshold)  # so that NaN is a change
        return self._decide(position, reasons.MOVED if changed else None)

    def _remember(self, running: Running, run: Pass, prepared: Prepared, position: Position) -> None:
        """Also keep the entry of a full pass, for the adaptor passes that follow it."""
        super()._remember(running, run, prepared, position)
        assert isinstance(run, AdaptivePass)
        call, before = position.call, position.before
        if run.kind == "full":
            call.entry, call.age = run.entry, 0
        elif before is not None:
            call.entry, call.age = before.entry, before.age + 1


class AdaptivePass(Pass):
    """A pass that looks at the entry at its first skipped call: an adaptor pass may turn into a full one there.

    Args:
        plan, kind, emit, copies: as in `Pass`.
        adapts: entry, None if it was not seen → may the adaptor stand in?

    Attributes:
        entry: a copy of a full pass's entry: code that still runs may write to the tensor itself.
    """

    def __init__(
        self,
        plan: CutPlan,
        kind: Kind,
        emit: Emit | None,
        *,
        copies: bool,
        adapts: Callable[[torch.Tensor | None], bool],
    ) -> None:
        super().__init__(plan, kind, emit, copies=copies)
        self.entry: torch.Tensor | None = None
        self._adapts, self._undecided = adapts, True

    def _decide(self) -> None:
        self._undecided = False
        entry = self.captured.get("entry")
        if self.kind == "adaptor" and not self._adapts(entry):
            self.kind, self._moves = "full", self.plan.moves("full", looks=True)
        if self.kind == "full" and entry is not None:
            self.entry = entry.detach().clone()


def change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """‖now - before‖ / ‖before‖ as a scalar on the device; nothing waits for it."""
    off: torch.Tensor = torch.linalg.vector_norm(now.detach() - before, dtype=torch.float32)
    return off.div(torch.linalg.vector_norm(before, dtype=torch.float32))

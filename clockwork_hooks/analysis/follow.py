"""Follow regions along plain trajectories: what their exits and entries do, and what an adaptor would be off by.

All candidates are followed in the same runs. Of each, what the last few steps would have left in its cache is held, and
what is compared is reduced to sums as it passes: memory does not grow with the trajectory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks.adaptors.base import needs_of
from clockwork_hooks.analysis.candidates import Candidate
from clockwork_hooks.analysis.sampling import Runs, Watch, reference
from clockwork_hooks.clock.timeline import Trail
from clockwork_hooks.engine import stand_in
from clockwork_hooks.engine.engine import UNetCall
from clockwork_hooks.engine.hooks import Installed
from clockwork_hooks.engine.passes import Active, Outcome, Pass
from clockwork_hooks.graph.tracing import module_paths

__all__ = ["Ages", "Series", "follow"]

Ages = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One candidate along the trajectories; each value is over all samples, None where there is nothing to compare.

    Attributes:
        changes: ‖r(s) - r(s-1)‖ / ‖r(s)‖ of the exit r, for each step s from 1.
        cosines: of r(s) and r(s-1).
        errors: for each age from 1: ‖r̂(s) - r(s)‖ / ‖r(s)‖, where r̂(s) is what the adaptor makes if the last full step
            was s - age. For the identity r̂(s) = r(s - age). None too where a call is full whatever the schedule says.
        entries: for each age from 1: ‖e(s) - e(s-age)‖ / ‖e(s-age)‖ of the entry e.
    """

    changes: tuple[float | None, ...]
    cosines: tuple[float | None, ...]
    errors: Ages
    entries: Ages


def follow(
    runs: Runs, pairs: Sequence[Candidate], longest: int, tell: Callable[[], object]
) -> tuple[int, dict[str, Series]]:
    """Run all trajectories once with full passes; the results stay in `runs.plain`.

    Args:
        runs: the trajectories.
        pairs: the candidates.
        longest: largest age.
        tell: called after each trajectory.

    Returns:
        Number of steps, and name → series.
    """
    followers = [_Follower(runs.unet, one, longest) for one in pairs]
    steps, runs.plain = 0, []
    with Watch(runs.unet, pairs[0].region) as watch, contextlib.ExitStack() as stack:
        for follower in followers:
            stack.enter_context(follower.at(watch))
        for run in runs.runs:
            with watch.trajectory():
                runs.plain.append(reference(runs.unet, runs.generate, *run))
            for follower in followers:
                follower.last.clear()
            steps = max(steps, watch.step)
            tell()
    return steps, {one.name: follower.series(steps) for one, follower in zip(pairs, followers, strict=True)}


@dataclass(slots=True)
class _Before:
    """What a call leaves behind for the same call of the next steps."""

    step: int
    exit: Tensor
    adapted: list[Tensor]  # after no adaptor step, after one, two, ...
    entries: list[Tensor]  # of this step, of the one before, ...
    time: Tensor | None  # the UNet's raw time, ()
    trails: list[Trail | None]  # of the full passes that each of `adapted` comes from, where the adaptor looks at them


class _Follower:
    """Picks up one candidate's boundary in every call, and sums up what it finds."""

    def __init__(self, unet: nn.Module, candidate: Candidate, longest: int) -> None:
        self.unet, self.candidate, self.longest = unet, candidate, longest
        self.active = Active()
        self.tracing: Pass | None = None
        self.last: dict[tuple[int, int], _Before] = {}
        self.sums: dict[tuple[str, int, int], list[Tensor]] = {}  # (what, step, age) → two sums, on the device
        self.placed = candidate.argument is None

    @contextlib.contextmanager
    def at(self, watch: Watch) -> Iterator[None]:
        """Follow the calls of trajectories that are watched."""
        plan = self.candidate.region.cut_plan
        installed = Installed(self)

        try:
            paths = module_paths(self.unet)
            installed.add(plan, {paths[id(module)]: module for module in self.unet.modules()})
            self._watch = watch
            with watch.observed(self):
                yield
        finally:
            self.active.pass_ = None
            installed.remove()

    def before(self, call: UNetCall) -> None:
        """Look at the boundary in the call that is about to run."""
        self.active.pass_ = pass_ = Pass(self.candidate.region.cut_plan, "full", copies=(0,), keeps_entry=True)
        pass_.enter(call.args, call.kwargs)

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """Sum up what was seen."""
        pass_, self.active.pass_ = self.active.pass_, None
        if pass_ is not None and pass_.complete():
            self.add(self._watch, pass_, call.time)

    def add(self, watch: Watch, pass_: Pass, position: Any) -> None:
        """One call, of which the pass has seen the boundary, at this time."""
        exit, entry = pass_.exit, pass_.entry
        assert exit is not None  # the pass is complete
        before = self.last.get(watch.branch)
        here = before is not None and before.step == watch.step - 1 and before.exit.shape == exit.shape
        adapted, entries = [exit], [] if entry is None else [entry]
        time = None if position is None else stand_in.scalar(position, exit.device)
        trails: list[Trail | None] = [None]
        if "trend" in needs_of(self.candidate.adaptor):
            trails = [Trail.after(before.trails[0] if before is not None and here else None, exit, time)]
        if before is not None and here:
            self._compare(watch.step, exit, before)
        if before is not None and here and watch.usable:
            captured = pass_.captured if entry is None else {**pass_.captured, "entry": entry}
            for age, (cached, trail) in enumerate(zip(before.adapted, before.trails, strict=False), 1):
                adapted.append(self._adapt(captured, cached, before, trail, position))
                trails.append(trail)
                self._sum(
                    "error", watch.step, age, (adapted[-1].float() - exit.float()).square(), exit.float().square()
                )
            for age, past in enumerate(before.entries[: self.longest], 1):
                self._sum("entry", watch.step, age, (entries[0] - past).float().square(), past.float().square())
            entries += before.entries
        last = adapted[: self.longest], entries[: self.longest], time, trails[: self.longest]
        self.last[watch.branch] = _Before(watch.step, exit, *last)

    def _adapt(
        self, captured: dict[str, Tensor], cached: Tensor, before: _Before, trail: Trail | None, position: Any
    ) -> Tensor:
        """What the adaptor makes of a cached exit; `before` is the step that it comes from, or was adapted in."""
        adaptor = self.candidate.adaptor
        if not self.placed and isinstance(self.candidate.argument, str):  # it is ours to move
            stand_in.place(adaptor, cached)
        self.placed = True
        where = {"region": self.candidate.region, "adaptor": adaptor}
        with torch.no_grad():
            past = stand_in.Past(next(iter(before.entries), None), before.time)
            if trail is not None:
                past = past._replace(trend=trail.trend, trend_positions=trail.positions)
            inputs = stand_in.inputs(captured, cached, past, position)
            return stand_in.check(stand_in.call(adaptor, inputs), cached, finite=False, where=where)

    def _compare(self, step: int, exit: Tensor, before: _Before) -> None:
        now, then = exit.float(), before.exit.float()
        self._sum("change", step, 1, (now - then).square(), now.square())
        self._sum("cosine", step, 1, now * then, now.norm() * then.norm())

    def _sum(self, what: str, step: int, age: int, above: Tensor, below: Tensor) -> None:
        sums = self.sums.setdefault((what, step, age), [above.new_zeros(()), above.new_zeros(())])
        sums[0] += above.sum()
        sums[1] += below.sum()

    def series(self, steps: int) -> Series:
        """What the sums say."""

        def value(what: str, step: int, age: int = 1) -> float | None:
            if (what, step, age) not in self.sums:
                return None
            above, below = map(float, self.sums[what, step, age])
            share = above / max(below, 1e-24)
            return share if what == "cosine" else math.sqrt(share)

        def ages(what: str) -> Ages:
            return tuple(tuple(value(what, s, a) for s in range(1, steps + 1)) for a in range(1, self.longest + 1))

        changes = tuple(value("change", s) for s in range(1, steps + 1))
        cosines = tuple(value("cosine", s) for s in range(1, steps + 1))
        return Series(changes, cosines, ages("error"), ages("entry"))

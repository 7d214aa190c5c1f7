"""The training loop: record some trajectories, learn from them, forget them, go on."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clockwork_hooks._generate import seed_of, seeded
from clockwork_hooks.errors import DistillError
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training.learner import Learner
from clockwork_hooks.training.options import Mode, TrainingOptions
from clockwork_hooks.training.recording import Noise, TrajectoryRecorder
from clockwork_hooks.training.trajectory import Buffer, Needs, Trajectory

__all__ = ["Trainer", "status"]

COMPARED = 8  # the first trajectories tell what the identity is off by


@dataclass(slots=True)
class Trainer:
    """Runs the rounds of one training run.

    A round records up to `hold` trajectories, as many as the buffer has room for; every adaptor learns from each of
    them, `reuse` times, in an order drawn anew; then they are forgotten. Between rounds nothing is held, so a
    checkpoint there, and the seed, are all that a resumed run needs to go on as if nothing had happened.

    Attributes:
        save, tell: called between rounds; `tell` also after each look at the losses.
        done: trajectories recorded so far, over all processes.
        seconds: trained so far, earlier runs included.
        reasons: why recorded calls could not have been adaptor passes, with counts.
    """

    recorder: TrajectoryRecorder
    learners: Sequence[Learner]
    generates: Sequence[Callable[[Any, int], Any]]
    prompts: Sequence[Any]
    buffer: Buffer
    accelerator: Any
    options: TrainingOptions
    mode: Mode
    noise: Noise | None
    save: Callable[[], None] = lambda: None
    tell: Callable[[], None] = lambda: None
    done: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    steps: dict[int, int] = field(default_factory=dict)
    recording_seconds: float = 0.0

    def run(self) -> None:
        """Train until the options say that it is enough."""
        last_save = time.monotonic()
        while self.share() < 1:
            started = time.monotonic()
            count = self._record()
            self.recording_seconds += time.monotonic() - started
            self._learn(count)
            self.buffer.clear()
            self.done += count * self.accelerator.num_processes
            self.seconds = self._agreed(self.seconds + time.monotonic() - started)
            if time.monotonic() - last_save >= self.options.save_every:
                self.save()
                last_save = time.monotonic()
            self.tell()
        self.save()

    def close(self) -> None:
        """Forget what is held, and leave the adaptors ready for use."""
        self.buffer.clear()
        for learner in self.learners:
            learner.finish()

    def share(self, ahead: int = 0) -> float:
        """How much of the run is done, from 0 to 1; `ahead` more trajectories counted in."""
        options = self.options
        by_number = (self.done + ahead) / options.trajectories if options.trajectories else 0.0
        by_time = self.seconds / (60 * options.minutes) if options.minutes else 0.0
        return min(max(by_number, by_time), 1.0)

    # -- recording ---------------------------------------------------------------------------------------------------

    def _record(self) -> int:
        """Fill the buffer; how many trajectories are in it, the same in every process."""
        wanted = self.options.hold
        if self.options.trajectories is not None:  # those left, rounded up
            wanted = min(wanted, -((self.done - self.options.trajectories) // self.accelerator.num_processes))
        while len(self.buffer) < wanted and not self.buffer.full():
            trajectory = self._trajectory(self._number(len(self.buffer)))
            self.reasons.update(trajectory.reasons)
            self.buffer.add(trajectory)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # once a round, for honest times
        return int(min(self._gathered(len(self.buffer))))

    def _number(self, index: int) -> int:
        """The number, over the whole run and all processes, of this process's trajectory in this round."""
        return int(self.done + index * self.accelerator.num_processes + self.accelerator.process_index)

    def _trajectory(self, number: int) -> Trajectory:
        group = number // self.accelerator.num_processes
        batch = self._batch(group)
        generate = self.generates[group % len(self.generates)]
        with seeded(self.options.seed, number):
            replace = None if self.noise is None else self._noised(batch, self.noise)
            acting = self._acting(group)
            schedule = self._schedule(acting, group, 0)
            trajectory = self.recorder.record(
                functools.partial(generate, seed=seed_of(self.options.seed, number)),
                batch,
                student=(acting.actor(), schedule) if self.mode == "on_policy" else None,
                needs=self._needs(group),
                replace=replace,
                device=self.buffer.device,
            )
        kind = group % len(self.generates)
        self.steps[kind] = max(self.steps.get(kind, 0), *(step.step for step in trajectory.steps))
        return trajectory

    def _batch(self, group: int) -> list[Any]:
        """This process's prompts: a new order of all of them each time they are used up.

        Source: arXiv 2312.08128, Algorithm 1 (a random subset of the prompts each epoch).
        """
        size, world = self.options.batch, self.accelerator.num_processes
        count = len(self.prompts)
        at = range(group * size * world, (group + 1) * size * world)
        orders = {epoch: _order(count, self.options.seed, epoch) for epoch in {k // count for k in at}}
        chosen = [orders[k // count][k % count] for k in at]
        rank = self.accelerator.process_index
        return [self.prompts[k] for k in chosen[rank * size : (rank + 1) * size]]

    def _noised(self, batch: Any, noise: Noise) -> Callable[[float], Tensor]:
        clean = noise.images(batch)
        drawn = torch.randn(clean.shape, dtype=clean.dtype).to(clean.device)  # on the CPU: the same on every device
        return lambda at: noise.add_noise(clean, drawn, at)

    def _acting(self, group: int) -> Learner:
        """Whose trajectory it is, on-policy: each adaptor's in turn."""
        return self.learners[group % len(self.learners)]

    def _schedule(self, learner: Learner, group: int, again: int) -> Schedule:
        turn = group // len(self.generates)
        if self.mode == "on_policy":
            return learner.schedule(turn // len(self.learners))  # the one that it was recorded on
        return learner.schedule(turn + again)

    def _needs(self, group: int) -> Callable[[int], Needs]:
        learning = [self._acting(group)] if self.mode == "on_policy" else self.learners
        schedules = [schedule for learner in learning for schedule in learner.schedules]
        outputs = any(learner.loss.needs_output for learner in learning)
        captured = any(not learner.loss.needs_output for learner in learning)
        before = any("entry_cached" in learner.needs for learner in learning)
        trend = any("trend" in learner.needs for learner in learning)

        def needs(step: int) -> Needs:
            adapted = any(not schedule.is_full(step) for schedule in schedules)
            feeds = any(not schedule.is_full(step + 1) for schedule in schedules)
            graphs = self.options.graphs
            return Needs(
                exit=adapted or feeds or trend,
                captured=(adapted and captured and not graphs) or (before and (adapted or feeds)),
                arguments=adapted and (outputs or graphs),
                output=adapted and outputs,
            )

        return needs

    # -- learning ----------------------------------------------------------------------------------------------------

    def _learn(self, count: int) -> None:
        device = self.accelerator.device
        trained = False
        for again in range(self.options.reuse):
            for index in _order(count, self.options.seed, self.done // self.accelerator.num_processes, 1 + again):
                self._rate(index)
                group = self._number(index) // self.accelerator.num_processes
                with seeded(self.options.seed, self._number(index), 1 + again):
                    trained |= self._learn_from(self.buffer.get(index, device), group, again)
        for learner in self.learners:
            learner.update()
            learner.look()
        if not trained:
            raise DistillError(
                "a trajectory has adaptor steps to learn from",
                seen={
                    "schedule": str(self.learners[0].schedules[0]),
                    "steps of a trajectory": max(self.steps.values(), default=0),
                    **{f"calls: {reason}": times for reason, times in self.reasons.most_common(3)},
                },
                do="sample with more steps, with another schedule, or with one call a step and the same conditions",
            )

    def _learn_from(self, trajectory: Trajectory, group: int, again: int) -> bool:
        learning = [self._acting(group)] if self.mode == "on_policy" else self.learners
        trained = False
        for learner in learning:
            schedule = self._schedule(learner, group, again)
            chains = trajectory.chains(schedule)
            if again == 0 and learner.compared < COMPARED:
                learner.compare(trajectory, schedule, self.recorder)
            for chain in chains[: int(min(self._gathered(len(chains))))]:
                learner.learn(chain, trajectory, schedule, self.recorder)
                trained = True
                if learner.pending >= self.options.log_every:
                    learner.look()
                    self.tell()
        return trained

    def _rate(self, index: int) -> None:
        share, options = self.share(index * self.accelerator.num_processes), self.options
        factor = 1.0 if options.decay == "constant" else 0.5 * (1 + math.cos(math.pi * share))
        if share < options.warmup:
            factor *= (share + 1e-3) / options.warmup
        for learner in self.learners:
            learner.set_rate(factor)

    # -- over processes ----------------------------------------------------------------------------------------------

    def _gathered(self, value: float) -> list[float]:
        """A number of each process."""
        if self.accelerator.num_processes == 1:
            return [value]
        own = torch.tensor([float(value)], device=self.accelerator.device)
        values: list[float] = self.accelerator.gather(own).tolist()
        return values

    def _agreed(self, value: float) -> float:
        """The first process's number, everywhere."""
        return self._gathered(value)[0]


@functools.lru_cache(maxsize=8)
def _order(count: int, *keys: int) -> list[int]:
    """A permutation that the keys determine."""
    return [int(k) for k in np.random.default_rng(keys).permutation(count)]


_SHOWN = 4  # steps whose error has room in a line


def status(trainer: Trainer) -> str:
    """Throughput, loss and relative error by step, in a line; only what was read from the device before."""
    parts = []
    for learner in trainer.learners[:3]:
        recent = learner.losses[-50:]
        if recent and learner.errors:
            name = f"{learner.name} " if len(trainer.learners) > 1 else ""
            errors = " ".join(_errors(learner.errors))
            parts.append(f"{name}loss {sum(recent) / len(recent):.3g}, error {errors}")
    updates = sum(learner.updates for learner in trainer.learners)
    speed = [f"{updates / trainer.seconds:.1f} steps/s"] if trainer.seconds > 0 else []
    return " · ".join(speed + parts)


def _errors(errors: Mapping[int, float]) -> list[str]:
    """Step and its relative error; of many steps a few, evenly spread, the first and the last among them."""
    steps = sorted(errors)
    last = len(steps) - 1
    shown = sorted({round(k * last / (_SHOWN - 1)) for k in range(_SHOWN)}) if last >= _SHOWN else range(len(steps))
    return [f"{steps[k]}: {errors[steps[k]]:.0%}" for k in shown]

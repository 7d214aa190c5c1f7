"""The training loop: record some trajectories, learn from them, forget them, go on.

A `Learner` is one adaptor in training: its optimizer, its loss, its schedules, and what it has done so far.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clockwork_hooks._generate import seed_of, seeded
from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.adaptors.stand_in import Adaptor, needs_of
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.timeline import Trail
from clockwork_hooks.clock.times import Told
from clockwork_hooks.errors import AdaptorError, DistillError
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training.losses import Loss, Outcome, Weights
from clockwork_hooks.training.options import Mode, TrainingOptions
from clockwork_hooks.training.trajectory import (
    Buffer,
    Needs,
    Noise,
    RecordedCall,
    StepCalls,
    Trajectory,
    TrajectoryRecorder,
)

_HALF_SCALE = 2.0**16  # gradients of a mean over a UNet's output are too small for float16, which they pass through


class Learner:
    """Trains one adaptor, a gradient step for each adaptor step of what it is shown.

    Args:
        name: for reports and files.
        module: the adaptor, on the UNet's device.
        loss: what is made small.
        schedules: one for each trajectory, in turn.
        guidance: step and time → weights of the guidance branches; None where nothing is known.
        accelerator: Hugging Face Accelerate's.
        options: how to train.
        lr: peak learning rate.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        loss: Loss,
        schedules: Sequence[Schedule],
        guidance: Callable[[int, float | None], Weights] | None,
        accelerator: Any,
        options: TrainingOptions,
        lr: float,
    ) -> None:
        self.name, self.module, self.loss, self.schedules = name, module, loss, tuple(schedules)
        self.guidance = guidance
        self.accelerator, self.options, self.lr = accelerator, options, lr
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise AdaptorError(
                "an adaptor that is trained needs parameters with requires_grad",
                seen={"adaptor": name, "class": type(module).__name__},
                do='pass adaptor="resnet", or a module of your own',
            )
        self.dtype = self.parameters[0].dtype
        fused = self.parameters[0].device.type == "cuda"
        optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=fused)
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.average: Any = None
        if options.ema is not None:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.losses: list[float] = []
        self.errors: dict[int, float] = {}
        self.identity: dict[int, tuple[float, float]] = {}  # step → squared error of the identity, squared norm
        self.compared = 0  # trajectories that tell it
        self.updates = 0
        self._waiting, self._scale = 0, 1.0
        self._pending: list[Tensor] = []
        self._sizes: dict[int, Tensor] = {}
        self._good = self._snapshot()

    def schedule(self, number: int) -> Schedule:
        """The schedule for the trajectory of that number."""
        return self.schedules[number % len(self.schedules)]

    @property
    def needs(self) -> frozenset[str]:
        """What the adaptor is called with beside the entry, the cached exit, time and text."""
        return frozenset(needs_of(self.module))

    def actor(self) -> Callable[..., Tensor]:
        """The adaptor as the student's trajectories use it."""

        def act(
            entry: Tensor | None, exit_cached: Tensor, *, time: Tensor | None, text: Tensor | None, **before: Any
        ) -> Tensor:
            names = {"entry": "entry_cached", "position": "position_cached"}
            past = stand_in.Past(**{name: before.get(names.get(name, name)) for name in stand_in.Past._fields})
            captured = {"entry": entry, "time": time, "text": text}
            return self._predict(self.module, captured, exit_cached, past=past, position=before.get("position"))

        act.needs = self.needs  # type: ignore[attr-defined]
        return act

    def learn(
        self, chain: tuple[StepCalls, ...], of: Trajectory, schedule: Schedule, recorder: TrajectoryRecorder
    ) -> None:
        """A gradient step for each step of the chain; the exit that a step is given is what the last one emitted.

        Args:
            chain: one of `of.chains(schedule)`.
            of: the trajectory.
            schedule: this learner's.
            recorder: runs recorded calls again.

        Source: arXiv 2312.08128, Sec. 4.4, Algorithm 1.
        """
        emitted: dict[int, Tensor] = {}
        widest = of.rows
        self.model.train()
        for step in chain:
            outcome = self._outcome(step, widest, schedule, recorder, emitted)
            loss, sizes = self.loss(outcome)
            half = outcome.features[0].dtype == torch.float16 and self.accelerator.scaler is None
            self._scale = _HALF_SCALE if half else 1.0
            # gradients meet over the processes in each backward pass: a round may end before `accumulate` are in
            self.accelerator.backward(loss * (self._scale / self.options.accumulate))
            self._waiting += 1
            if self._waiting == self.options.accumulate:
                self.update()
            self._pending.append(loss.detach())
            before = self._sizes.get(step.step)
            self._sizes[step.step] = sizes if before is None else before + sizes

    @torch.no_grad()
    def compare(self, trajectory: Trajectory, schedule: Schedule, recorder: TrajectoryRecorder) -> None:
        """Measure what the identity is off by on a trajectory, in what the loss looks at."""
        self.compared += 1
        for chain in trajectory.chains(schedule):
            emitted: dict[int, Tensor] = {}
            for step in chain:
                outcome = self._outcome(step, trajectory.rows, schedule, recorder, emitted, _identity)
                error, norm = self.loss(outcome)[1].tolist()
                before = self.identity.get(step.step, (0.0, 0.0))
                self.identity[step.step] = before[0] + error, before[1] + norm

    @property
    def identity_errors(self) -> dict[int, float]:
        """Step → relative error of the identity."""
        return {step: (error / norm) ** 0.5 if norm > 0 else 0.0 for step, (error, norm) in self.identity.items()}

    def update(self) -> None:
        """The optimizer's step, if any gradient waits for it."""
        if not self._waiting:
            return
        self._waiting = 0
        if self._scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self._scale)
        if self.options.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.options.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.average is not None:
            self.average.update_parameters(self.module)

    def set_rate(self, share: float) -> None:
        """The learning rate as this share of its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share

    @property
    def pending(self) -> int:
        """Losses that nobody has looked at yet."""
        return len(self._pending)

    def look(self) -> None:
        """Read the pending losses, the mean over all processes; waits for the device.

        Raises:
            DistillError: one is NaN or infinite; the weights are those of the last look.
        """
        if not self._pending:
            return
        steps = sorted(self._sizes)
        unread = torch.cat([torch.stack(self._pending), *(self._sizes[step].float() for step in steps)])
        values: list[float] = self.accelerator.reduce(unread, "mean").tolist()
        losses, sizes = values[: len(self._pending)], values[len(self._pending) :]
        wrong = [index for index, loss in enumerate(losses) if not abs(loss) < float("inf")]
        first = len(self.losses) + (wrong[0] if wrong else 0)
        self.losses += losses[: wrong[0]] if wrong else losses
        self._pending, self._sizes = [], {}
        if wrong:
            self._restore(self._good)
            raise DistillError(
                "losses must be finite",
                seen={"adaptor": self.name, "loss": losses[wrong[0]], "adaptor step": first + 1},
                do="check that the UNet itself returns finite numbers; pass a lower lr=, or precision='bf16' instead "
                "of 'fp16'; the weights before it are kept",
            )
        for step, error, size in zip(steps, sizes[::2], sizes[1::2], strict=True):
            self.errors[step] = (error / size) ** 0.5 if size > 0 else 0.0
        self._good = self._snapshot()

    def finish(self) -> None:
        """Leave the adaptor in evaluation mode, with the averaged weights if they were asked for."""
        self.optimizer.zero_grad()
        if self.average is not None and self.updates:
            self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()

    def _weights(self, step: StepCalls, widest: int) -> Weights:
        """The weights of the branches in a step.

        None where guidance is off: with fewer rows than a step of all branches has, one branch alone was called.

        Source: Kynkäänniemi et al., arXiv 2404.07724 (guidance in an interval of the noise levels).
        """
        weights = self.guidance(step.step, step.calls[0].time) if self.guidance is not None else None
        alone = weights is not None and len(weights) > 1 and step.rows * len(weights) <= widest
        return None if alone else weights

    def _outcome(
        self,
        step: StepCalls,
        widest: int,
        schedule: Schedule,
        recorder: TrajectoryRecorder,
        emitted: dict[int, Tensor],
        predict: Callable[..., Tensor] | None = None,
    ) -> Outcome:
        """What the loss looks at, with the adaptor's predictions, or with those of `predict`."""
        predict = predict or functools.partial(self._predict, self.model)
        features, outputs = [], []
        adapted = {id(call) for call in step.adapted(schedule)}
        predictions: list[Tensor] = []
        for call in step.calls:
            if id(call) not in adapted:
                features.append(call.exit)
                outputs.append(call.output)
                continue
            assert call.source is not None  # that is what adapted means
            cached = emitted.get(id(call.source), call.source.exit)
            earlier = {"past": self._past(call, schedule), "position": _tensor(call.time, cached)}

            def emit(captured: Mapping[str, Tensor | None], cached: Any = cached, earlier: Any = earlier) -> Tensor:
                predictions.append(predict(captured, cached, **earlier))
                return predictions[-1]

            if self.loss.needs_output or not call.captured:
                outputs.append(recorder.again(call, emit))
            else:
                emit(call.captured)
            features.append(predictions[-1])
            emitted[id(call)] = predictions[-1].detach()
        return Outcome(
            features=_present(features),
            exits=_present([call.exit for call in step.calls]),
            outputs=_present(outputs) if self.loss.needs_output else [],
            true_outputs=_present([call.output for call in step.calls]),
            branches=[call.branch for call in step.calls],
            weights=self._weights(step, widest),
        )

    def _past(self, call: RecordedCall, schedule: Schedule) -> stand_in.Past:
        """What an adaptor is given of the steps before a recorded call."""
        source = next(call.sources())  # it serves an adapted call
        past = stand_in.Past(source.captured.get("entry"), _tensor(source.time, source.exit))
        full = [one for one in call.sources() if schedule.is_full(one.step)][:2] if "trend" in self.needs else []
        exits = [(one.exit, _told(one.time)) for one in full if one.exit is not None]
        if len(exits) < 2:
            return past
        trail = Trail.after(Trail.after(None, *exits[1]), *exits[0])
        return past._replace(trend=trail.trend, trend_positions=trail.positions)

    def _predict(
        self,
        model: Adaptor,
        captured: Mapping[str, Tensor | None],
        cached: Tensor,
        *,
        past: stand_in.Past = stand_in.Past(),  # noqa: B008 - a tuple
        position: Tensor | None = None,
    ) -> Tensor:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor.to(self.dtype) if tensor is not None and tensor.is_floating_point() else tensor

        past = past._replace(entry=cast(past.entry), trend=cast(past.trend))
        arguments = stand_in.inputs(captured, cached.to(self.dtype), past, position)
        arguments = arguments._replace(
            entry=cast(arguments.entry), time=cast(arguments.time), text=cast(arguments.text)
        )
        with torch.autocast(cached.device.type, enabled=False), self.accelerator.autocast():  # ours, not the sampler's
            exit: Tensor = stand_in.call(model, arguments)
        if exit.shape != cached.shape:
            raise AdaptorError(
                "an adaptor must return a tensor like the region's exit",
                seen={"adaptor": self.name, "exit": tuple(cached.shape), "returned": tuple(exit.shape)},
                do="make the adaptor's output fit Region.exit",
            )
        return exit.to(cached.dtype)

    # -- state -------------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.module} | ({} if self.average is None else {"average": self.average})

    def _snapshot(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in self._modules().items()
        }

    def _restore(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(snapshot[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training goes on from: tensors by name, and numbers."""
        tensors = {
            f"{name}.{key}": value for name, weights in self._snapshot().items() for key, value in weights.items()
        }
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        numbers: dict[str, Any] = {"updates": self.updates, "errors": {str(k): v for k, v in self.errors.items()}}
        numbers |= {"identity": {str(k): v for k, v in self.identity.items()}, "compared": self.compared}
        if self.accelerator.scaler is not None:
            numbers["scaler"] = self.accelerator.scaler.state_dict()
        return tensors, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._restore({name: _under(tensors, f"{name}.") for name in self._modules()})
        groups = self.optimizer.state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.losses = tensors["losses"].tolist()
        self.updates = numbers["updates"]
        self.errors = {int(step): error for step, error in numbers["errors"].items()}
        self.identity = {int(step): (error, norm) for step, (error, norm) in numbers.get("identity", {}).items()}
        self.compared = numbers.get("compared", 0)
        if self.accelerator.scaler is not None and "scaler" in numbers:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        self._good = self._snapshot()


def _identity(captured: Mapping[str, Tensor | None], cached: Tensor, **before: Any) -> Tensor:
    return cached


def _told(time: float | None) -> Told | None:
    return None if time is None else Told(time, time)


def _tensor(time: float | None, like: Tensor | None) -> Tensor | None:
    told = _told(time)
    return None if told is None or like is None else told.tensor(like.device)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


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
            self.seconds = self._gathered(self.seconds + time.monotonic() - started)[
                0
            ]  # the first process's, everywhere
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
                student=False,
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
            do = "sample with more steps, with another schedule, or with one call a step and the same conditions"
            if self.reasons[reasons.NO_TIME]:
                do = 'name the time input of the UNet: time="..."'
            raise DistillError(
                "a trajectory must have adaptor steps to learn from",
                seen={
                    "schedule": str(self.learners[0].schedules[0]),
                    "steps of a trajectory": max(self.steps.values(), default=0),
                    **{f"calls: {reason}": times for reason, times in self.reasons.most_common(3)},
                },
                do=do + ("; docs/timeline.md says what a reason means" if self.reasons else ""),
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

"""What is recorded of a sampler: calls of the UNet, grouped into steps, steps into a trajectory.

`TrajectoryRecorder` records what crosses the region's edge at every step of whatever `generate(batch)` runs. Calls
are placed in steps and branches by the very engine that serves a wrapped UNet, so what is recorded as an adaptor step
is what will be one in use. The teacher's trajectories are full passes; the student's run the adaptor on its schedule,
and each adaptor pass is followed by the full pass that labels it. For forward-noise training the UNet is given noised
images in the place of the sampler's own sample; times, conditions and branches are still the sampler's.

Trajectories wait in a `Buffer` until they are trained on: bounded, on the UNet's device, in memory or on disk.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clockwork_hooks._tree import Leaf, map_leaves, tensors, version
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.loops import TrajectoryBlock
from clockwork_hooks.engine.chain import ClockedRegion
from clockwork_hooks.engine.cuda_graphs import Captured
from clockwork_hooks.engine.engine import Engine, UNetCall
from clockwork_hooks.engine.passes import Emit, Outcome, Pass
from clockwork_hooks.errors import ArgumentError, DistillError, Enough, RegionNotFoundError
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Needs:
    """What of the calls of one step is kept.

    Attributes:
        exit: what the region emits.
        captured: what flows into it.
        arguments: of the call, to call the UNet again.
        output: what the UNet returns.
        student: what the student emitted, and what the UNet returned with it.
    """

    exit: bool = True
    captured: bool = True
    arguments: bool = True
    output: bool = True
    student: bool = True


@dataclass(slots=True, eq=False)
class RecordedCall:
    """One recorded call of the UNet.

    Attributes:
        trajectory: number of the trajectory that it belongs to.
        step: its denoising step, from 1.
        time: as the UNet was told it; None where it was told none, or another one for each row.
        rows: of the sample.
        branch: number of its branch: equal for calls that share their conditions (all inputs but sample and time).
        args, kwargs: as given; copies.
        reason: why an adaptor pass could not serve it; None where one could.
        autocast: the dtype of automatic casts around it.
        source: the call of the step before whose exit is this call's cached one.
        captured: "entry", "time", "text", where they can be picked up.
        exit: the region's true exit.
        output: the first tensor that the UNet returns in a full pass.
        student_exit: what the student emitted, in a student's trajectory; None in a full pass.
        student_output: what the UNet returned with it.
    """

    trajectory: int
    step: int
    branch: int
    reason: str | None
    autocast: torch.dtype | None
    time: float | None = None
    rows: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: RecordedCall | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    exit: Tensor | None = None
    output: Tensor | None = None
    student_exit: Tensor | None = None
    student_output: Tensor | None = None
    region: Region | None = None

    def sources(self) -> Iterator[RecordedCall]:
        """The same call of the steps before, the last one first."""
        source = self.source
        while source is not None:
            yield source
            source = source.source


TENSORS = ("args", "kwargs", "captured", "exit", "output", "student_exit", "student_output")
"""Fields of a `RecordedCall` that hold tensors."""


@dataclass(frozen=True, slots=True)
class StepCalls:
    """The calls of one denoising step: one, or one a guidance branch.

    Attributes:
        step: from 1.
        calls: in order.
    """

    step: int
    calls: tuple[RecordedCall, ...]

    @property
    def rows(self) -> int:
        """Rows that the UNet was called with, over all calls."""
        return sum(call.rows for call in self.calls)

    def adapted(self, schedule: Schedule) -> tuple[RecordedCall, ...]:
        """The calls that the adaptor serves on this schedule."""
        if schedule.is_full(self.step):
            return ()
        return tuple(call for call in self.calls if call.reason is None and call.source is not None)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What one run of `generate` did to the UNet.

    Attributes:
        steps: in order; more than one trajectory, if `generate` samples more than once.
        reasons: why calls could not have been adaptor passes, with counts.
    """

    steps: tuple[StepCalls, ...]
    reasons: Mapping[str, int]

    def chains(self, schedule: Schedule) -> list[tuple[StepCalls, ...]]:
        """Runs of adaptor steps between two full ones: one training signal each step.

        Source: arXiv 2312.08128, Sec. 4.4, Algorithm 1 (the steps with C(t) = 1).
        """
        chains: list[list[StepCalls]] = []
        before: StepCalls | None = None
        for now in self.steps:
            if now.adapted(schedule):
                goes_on = before is not None and now.step == before.step + 1 and before.adapted(schedule)
                chains.append([*chains.pop(), now] if goes_on else [now])
            before = now
        return [tuple(chain) for chain in chains]

    @property
    def rows(self) -> int:
        """Most rows of any step: those of a step with all guidance branches."""
        return max((step.rows for step in self.steps), default=0)

    def tensors(self) -> list[Tensor]:
        """All that it holds, each tensor once."""
        held: dict[int, Tensor] = {}
        for step in self.steps:
            for call in step.calls:
                held |= {id(tensor): tensor for tensor in tensors([getattr(call, name) for name in TENSORS])}
        return list(held.values())

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors())


def steps_of(calls: Iterable[RecordedCall]) -> Iterator[StepCalls]:
    """Group calls that follow each other within one step."""
    for (_, step), group in itertools.groupby(calls, lambda call: (call.trajectory, call.step)):
        yield StepCalls(step, tuple(group))


GB = 1e9


class Buffer:
    """Holds trajectories up to a number of bytes.

    Args:
        where: "device" (of the UNet), "ram", or a folder, in which it makes one of its own, gone when it is cleared.
        gigabytes: bound, in 10⁹ bytes.

    Attributes:
        limit: the bound in bytes.
        used: bytes held now.
        peak: most bytes ever held.
    """

    def __init__(self, where: str | Path, gigabytes: float) -> None:
        self.where, self.limit = where, int(gigabytes * GB)
        self.used = self.peak = 0
        self._held: list[Trajectory] = []
        self._home = Path(where) if where not in ("device", "ram") else None
        self._folder: Path | None = None

    @property
    def device(self) -> torch.device | None:
        """Where recorded tensors go first; None: where they are."""
        return None if self.where == "device" else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._held)

    def add(self, trajectory: Trajectory) -> None:
        """Hold a trajectory.

        Raises:
            ArgumentError: not even this one fits.
            DistillError: the disk is full.
        """
        size = trajectory.nbytes
        if size > self.limit:
            raise ArgumentError(
                "the buffer must be large enough for one trajectory",
                seen={"buffer_gb": self.limit / GB, "one trajectory": f"{size / GB:.3g} GB"},
                do=f"pass buffer_gb={1.1 * size / GB:.2g} or more, a smaller batch=, or fewer steps",
            )
        if self._home is not None:
            trajectory = self._write(trajectory, self._home)
        self._held.append(trajectory)
        self.used += size
        self.peak = max(self.peak, self.used)

    def full(self) -> bool:
        """Would another one as large as the mean so far be too much?"""
        return bool(self._held) and self.used + self.used / len(self._held) > self.limit

    def get(self, index: int, device: torch.device) -> Trajectory:
        """A trajectory, its tensors on the device."""
        if self._folder is None:
            return self._held[index] if self.where == "device" else _mapped(self._held[index], _to(device))
        place = "cpu" if device.type == "cpu" else str(device)  # of several processes on CPU each one's is "cpu:0"
        tensors = safetensors.torch.load_file(self._folder / f"{index}.safetensors", device=place)
        return _mapped(self._held[index], lambda leaf: tensors[leaf.name] if isinstance(leaf, _Stored) else leaf)

    def clear(self) -> None:
        """Forget all; a folder's files go too."""
        self._held, self.used = [], 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _write(self, trajectory: Trajectory, home: Path) -> Trajectory:
        names = {id(tensor): str(index) for index, tensor in enumerate(trajectory.tensors())}
        try:
            if self._folder is None:  # of its own: other processes, and what the user has there, are left alone
                home.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="trajectories-", dir=home))
            path = self._folder / f"{len(self._held)}.safetensors"
            safetensors.torch.save_file(
                {names[id(tensor)]: tensor.contiguous() for tensor in trajectory.tensors()}, path
            )
        except (OSError, SafetensorError) as error:
            raise DistillError(
                "the buffer's folder must be writable: a trajectory could not be saved",
                seen={"folder": home, "error": error, "held": f"{self.used / GB:.3g} of {self.limit / GB:g} GB"},
                do='free some space, pass a smaller buffer_gb=, or buffer="ram"',
            ) from error
        return _mapped(trajectory, lambda leaf: _Stored(names[id(leaf)]) if isinstance(leaf, Tensor) else leaf)


@dataclass(frozen=True, slots=True)
class _Stored(Leaf):
    """Stands for a tensor that is in the file."""

    name: str


def _to(device: torch.device) -> Callable[[Any], Any]:
    moved: dict[int, Tensor] = {}

    def to(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in moved:
            moved[id(leaf)] = leaf.to(device, non_blocking=True)
        return moved[id(leaf)]

    return to


def _mapped(trajectory: Trajectory, fn: Callable[[Any], Any]) -> Trajectory:
    """A copy of a trajectory with `fn` on every leaf; sources point into the copy."""
    twins: dict[int, RecordedCall] = {}

    def copied(call: RecordedCall) -> RecordedCall:
        twin = copy.copy(call)
        for name in TENSORS:
            setattr(twin, name, map_leaves(fn, getattr(call, name)))
        if call.source is not None:
            twin.source = twins[id(call.source)]
        twins[id(call)] = twin
        return twin

    steps = tuple(StepCalls(step.step, tuple(copied(call) for call in step.calls)) for step in trajectory.steps)
    return replace(trajectory, steps=steps)


class Copies:
    """Copies tensors for one trajectory.

    Args:
        where: the device that copies go to; None leaves them where their originals are.
    """

    def __init__(self, where: torch.device | str | None = None) -> None:
        self._where = torch.device(where) if where is not None else None
        self._copies: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def copy(self, tensor: Any) -> Any:
        """An ordinary tensor of its own, without gradient; what is no tensor, as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        with torch.inference_mode(False):
            where = self._where or tensor.device
            detached = tensor.detach()
            return detached.clone() if where == detached.device else detached.to(where)

    def share(self, leaf: Any) -> Any:
        """A copy made once a trajectory: conditions are the same objects at every step."""
        if not isinstance(leaf, Tensor):
            return leaf
        key = (id(leaf), version(leaf), leaf.device)
        if key not in self._copies:
            self._copies[key] = (leaf, self.copy(leaf))
        return self._copies[key][1]

    def keep(
        self, call: RecordedCall, needs: Needs, unet_call: UNetCall, full: Outcome, moving: Collection[Any]
    ) -> None:
        """Put into a call what is needed of it.

        Args:
            call: to be filled.
            needs: what of it.
            unet_call: what the UNet was given.
            full: what the full pass has led to.
            moving: those arguments that differ from step to step; the others are shared by the steps.
        """
        if needs.exit:
            call.exit = self.copy(full.exits[0].exit)
        if needs.arguments:
            call.args, call.kwargs = map_leaves(
                lambda leaf: self.copy(leaf) if any(leaf is one for one in moving) else self.share(leaf),
                (unet_call.args, unet_call.kwargs),
            )
        if needs.captured:
            call.captured = {
                name: self.copy(tensor) if name == "entry" else self.share(tensor)
                for name, tensor in full.captured.items()
            }
        if needs.output:
            call.output = self.copy(tensors(full.output)[0])


@dataclass(frozen=True, slots=True)
class Noise:
    """What forward-noise training needs: images, and how they are noised.

    Attributes:
        images: batch of prompts → (B, ...) clean samples, in the space that the sampler diffuses.
        add_noise: (clean samples, noise of their shape, time as the UNet is told it) → the UNet's input.
    """

    images: Callable[[Any], Tensor]
    add_noise: Callable[[Tensor, Tensor, float], Tensor]


_ALWAYS = Schedule.where(lambda step: True)


class TrajectoryRecorder:
    """Records the calls of one UNet; made once for a training run, asleep between trajectories.

    Args:
        unet: the UNet, in evaluation mode.
        region: to record, or how to choose it at the first call; None for the one below the highest level.
        time: name of the time input, where it cannot be told.
        graphs: the teacher's passes are replayed as CUDA graphs; what flows into the region is not picked up then.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks.training.trajectory import TrajectoryRecorder
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> recorder = TrajectoryRecorder(unet)
        >>> def generate(batch):
        ...     sample = torch.randn(len(batch), 3, 16, 16)
        ...     for t in (900, 600, 300, 0):
        ...         sample = sample - 0.1 * unet(sample, t).sample
        >>> trajectory = recorder.record(generate, ["a", "b"])
        >>> [(step.step, tuple(step.calls[0].exit.shape)) for step in trajectory.steps]
        [(1, (2, 32, 16, 16)), (2, (2, 32, 16, 16)), (3, (2, 32, 16, 16)), (4, (2, 32, 16, 16))]
        >>> recorder.remove()
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        region: Region | Choice | None = None,
        time: str | None = None,
        graphs: bool = False,
    ) -> None:
        self.unet = unet
        self._identity = IdentityAdaptor()
        self._clocked = ClockedRegion(region or Choice(), _ALWAYS, self._identity)
        self.engine = Engine(unet, [self._clocked], time=time)
        self.engine.looks = self.engine.records_first = True  # what flows into the region is what adaptors learn from
        self.engine.static = Captured(self.engine) if graphs else None
        self.engine.enabled = False
        self.engine.observers.append(self)
        self.engine.attach(self)
        self._probing = False
        self._needs: Callable[[int], Needs] = lambda step: Needs()
        self._replace: Callable[[float], Tensor] | None = None
        self._calls: list[RecordedCall] = []
        self._by_exit: dict[int, tuple[Tensor, RecordedCall]] = {}
        self._copies = Copies()

    # -- one trajectory ------------------------------------------------------------------------------------------

    def record(
        self,
        generate: Callable[[Any], Any],
        batch: Any,
        *,
        student: tuple[Adaptor, Schedule] | None = None,
        needs: Callable[[int], Needs] | None = None,
        replace: Callable[[float], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Trajectory:
        """Run `generate(batch)` and record its calls of the UNet.

        Args:
            generate: anything that calls the UNet.
            batch: what it is given.
            student: adaptor and schedule; None for the teacher, whose passes are all full.
            needs: step → what is kept of its calls; None keeps everything.
            replace: time → the sample that the UNet is given at that time, in the place of the sampler's own.
            device: where what is kept goes; None leaves it where it is.

        Raises:
            DistillError: `generate` never calls the UNet.
        """
        self.engine.teaches = student is None
        self._clocked.take(*(student or (self._identity, _ALWAYS)))
        self._needs = needs or (lambda step: Needs())
        self._replace, self._copies = replace, Copies(device)
        self.engine.states.forget()
        self.engine.enabled = True
        try:
            with torch.no_grad(), TrajectoryBlock(self.engine.states, None, self.unet):
                generate(batch)
            calls = self._calls
        finally:
            self.engine.enabled = False
            self.engine.states.forget()
            self._calls, self._by_exit, self._copies = [], {}, Copies()
        if not calls:
            raise DistillError(
                "generate(batch, seed) must call the UNet that is distilled",
                seen={"calls of the UNet": 0, "unet": type(self.unet).__name__},
                do="let it call this very UNet object, not a copy or a compiled one",
            )
        return Trajectory(tuple(steps_of(calls)), Counter(call.reason for call in calls if call.reason is not None))

    def probe(self, generate: Callable[[Any], Any], batch: Any) -> Region:
        """Find the region from the first call of `generate(batch)`, which goes no further.

        Raises:
            DistillError: `generate` never calls the UNet.
            RegionNotFoundError: nothing can be skipped.
        """
        self._probing = True
        try:
            self.record(generate, batch)
        except Enough:
            pass
        finally:
            self._probing = False
        wanted, region = self._clocked.wanted, self._clocked.region
        if region is None:
            raise RegionNotFoundError(
                "the region must belong to the UNet that generate(batch, seed) calls",
                seen={
                    "region": wanted.line if isinstance(wanted, Region) else wanted,
                    "unet": type(self.unet).__name__,
                },
                do="pass region=ch.find_region(unet, *args), found for this UNet, or leave it out",
            )
        self._clocked.wanted = region
        return region

    def again(self, call: RecordedCall, emit: Emit) -> Tensor:
        """The UNet's output for a recorded call, with what `emit` returns in the exit's place.

        The skipped part does not run. Gradients flow from the output to what `emit` returns, through the frozen rest.

        Args:
            call: recorded with its inputs.
            emit: captured boundary tensors → exit.
        """
        assert call.region is not None  # calls without one have a reason, and are not trained on
        pass_ = Pass(call.region.cut_plan, "adaptor", emit)
        kind = next((tensor.device.type for tensor in tensors([call.args, call.kwargs])), "cpu")
        self.engine.install(call.region.cut_plan)
        pass_.enter(call.args, call.kwargs)
        self.engine.active.pass_ = pass_
        try:
            with torch.autocast(kind, call.autocast, enabled=call.autocast is not None):
                output = self.unet(*call.args, **call.kwargs)
        finally:
            self.engine.active.pass_ = None
        if not pass_.complete():
            raise DistillError(
                "a recorded call must give the same result when it runs again",
                seen={"step": call.step, "region": call.region.line},
                do="let the UNet's forward depend on its arguments only",
            )
        return tensors(output)[0]

    def remove(self) -> None:
        """Take everything off the UNet."""
        self.engine.installed.close()
        self.engine.states.forget()

    # -- what the engine shows -----------------------------------------------------------------------------------

    def before(self, call: UNetCall) -> None:
        """Put the noised images in the place of the sample."""
        if self._probing:
            raise Enough
        if self._replace is not None:
            call.args, call.kwargs = self._with_sample(call, self._replace)

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """Keep what is needed of the call."""
        place, signature, decision = call.place, call.signature, call.decision
        if place is None or signature is None or decision is None:
            return  # a call of another transform: none of the loop's
        recorded = RecordedCall(
            place.trajectory,
            place.step,
            place.branch.number,
            reason=decision.reason,
            autocast=call.key[2],
            time=self._time(call),
            rows=len(call.arguments.get(signature.sample)),
            region=signature.regions[0].region if signature.regions else None,
        )
        self._calls.append(recorded)
        if not outcome.watched:
            return
        cached = None if decision.feature is None else decision.feature.exit
        if cached is not None and id(cached) in self._by_exit:
            recorded.source = self._by_exit[id(cached)][1]
        full = self.engine.full_pass(call) if outcome.reason is None else outcome
        if not full.complete:
            recorded.reason = recorded.reason or reasons.DIFFERED
            return
        emitted = outcome.exits[0].exit
        # only the next step's calls ask for it
        self._by_exit = {k: v for k, v in self._by_exit.items() if v[1].step >= recorded.step - 1}
        kept = place.call.feature
        if kept is not None and full is outcome:
            self._by_exit[id(kept.exit)] = (kept.exit, recorded)
        moving = [call.arguments.get(path) for path in (signature.sample, signature.time) if path]
        needs = self._needs(place.step)
        self._copies.keep(recorded, needs, call, full, moving)
        if needs.student and full is not outcome:
            recorded.student_exit = self._copies.copy(emitted)
            recorded.student_output = self._copies.copy(tensors(outcome.output)[0])

    def _time(self, call: UNetCall) -> float | None:
        """The call's time as a number; None where it has none, or several."""
        return None if call.time is None else self.engine.states.current().reader.read(call.time)[0]

    def _with_sample(
        self, call: UNetCall, replace: Callable[[float], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with another sample.

        Args:
            call: the call.
            replace: time → sample, (B, ...); repeated where the call holds several branches of B rows.

        Raises:
            DistillError: the call has no one time, or a sample of another shape.

        Source: arXiv 2312.08128, Sec. 5.4 and Fig. 7 ("regular distillation").
        """
        assert call.signature is not None  # the engine has placed the call
        path, time = call.signature.sample, self._time(call)
        sample = call.arguments.get(path)
        if time is None:
            raise DistillError(
                "forward noise needs the time of every call, one for all rows",
                seen={"time input": call.signature.time},
                do='use mode="unrolled", or pass time=',
            )
        noised = replace(time)
        if sample.shape[1:] != noised.shape[1:] or sample.shape[0] % noised.shape[0]:
            raise DistillError(
                "noised images must have the shape of the sample that the UNet is called with",
                seen={"sample": tuple(sample.shape), "noised images": tuple(noised.shape)},
                do="make images(batch) return what the sampler diffuses, latents for a latent model",
            )
        noised = noised.to(sample).repeat(sample.shape[0] // noised.shape[0], *[1] * (noised.ndim - 1))
        at = list(call.arguments.values).index(path)
        if at < len(call.args):
            return (*call.args[:at], noised, *call.args[at + 1 :]), call.kwargs
        return call.args, {**call.kwargs, path: noised}

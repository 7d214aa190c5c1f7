"""Watch a sampler: record what crosses the region's edge at every step of whatever `generate(batch)` runs.

`Capture` places calls in steps and branches with the very engine that serves a wrapped UNet, so what is recorded as
an adaptor step is what will be one in use. The teacher's trajectories are full passes; the student's run the adaptor
on its schedule, and each adaptor pass is followed by the full pass that labels it.

Copies of what a call of the UNet was given and gave, which nobody writes to.

Forward-noise training: the UNet is given noised images in the place of what the sampler has.

The sampler still decides at which times, with which conditions and in which branches the UNet is called.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks._tree import map_leaves, tensors, version
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.clock.times import TimeReader
from clockwork_hooks.engine.cuda_graphs import Captured
from clockwork_hooks.engine.engine import Engine, Prepared, Running
from clockwork_hooks.engine.hooks import RootHook
from clockwork_hooks.engine.passes import Emit, Pass
from clockwork_hooks.errors import DistillError, RegionNotFoundError
from clockwork_hooks.graph.tracing import record
from clockwork_hooks.regions.choice import Choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training.trajectory import Call, Needs, Trajectory, steps_of

__all__ = ["Capture", "Copies", "Given", "Noise", "with_sample"]

Given = tuple[tuple[Any, ...], dict[str, Any]]


class Copies:
    """Copies tensors for one trajectory.

    Args:
        where: the device that copies go to; None leaves them where their originals are.
    """

    def __init__(self, where: torch.device | str | None = None) -> None:
        self._where = torch.device(where) if where is not None else None
        self._kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def copy(self, tensor: Any) -> Any:
        """An ordinary tensor of its own, without gradient; what is no tensor, as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        with torch.inference_mode(False):
            where = self._where or tensor.device
            made = tensor.detach()
            return made.clone() if where == made.device else made.to(where)

    def share(self, leaf: Any) -> Any:
        """A copy made once a trajectory: conditions are the same objects at every step."""
        if not isinstance(leaf, Tensor):
            return leaf
        key = (id(leaf), version(leaf), leaf.device)
        if key not in self._kept:
            self._kept[key] = (leaf, self.copy(leaf))
        return self._kept[key][1]

    def keep(self, call: Call, needs: Needs, run: Pass, given: Given, output: Any, moving: Collection[Any]) -> None:
        """Put into a call what is needed of it.

        Args:
            call: to be filled.
            needs: what of it.
            run: the full pass that served it.
            given: its arguments.
            output: what the UNet returned.
            moving: those arguments that differ from step to step; the others are shared by the steps.
        """
        if needs.exit:
            call.exit = self.copy(run.exit)
        if needs.arguments:
            call.args, call.kwargs = map_leaves(
                lambda leaf: self.copy(leaf) if any(leaf is one for one in moving) else self.share(leaf), given
            )
        if needs.captured:
            call.captured = {
                name: self.copy(tensor) if name == "entry" else self.share(tensor)
                for name, tensor in run.captured.items()
            }
        if needs.output:
            call.output = self.copy(tensors(output)[0])


@dataclass(frozen=True, slots=True)
class Noise:
    """What forward-noise training needs: images, and how they are noised.

    Attributes:
        images: batch of prompts → (B, ...) clean samples, in the space that the sampler diffuses.
        add_noise: (clean samples, noise of their shape, time as the UNet is told it) → the UNet's input.
    """

    images: Callable[[Any], Tensor]
    add_noise: Callable[[Tensor, Tensor, float], Tensor]


def with_sample(
    running: Running,
    clock: TimeReader,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    replace: Callable[[float], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another sample.

    Args:
        running: the call.
        clock: reads its time.
        args, kwargs: as given.
        replace: time → sample, (B, ...); repeated where the call holds several branches of B rows.

    Raises:
        DistillError: the call has no one time, or a sample of another shape.

    Source: arXiv 2312.08128, Sec. 5.4 and Fig. 7 ("regular distillation").
    """
    prepared, arguments = running.prepared, running.arguments
    assert prepared is not None  # the engine has placed the call
    time, _ = clock.read(arguments.get(prepared.time)) if prepared.time else (None, None)
    sample = arguments.get(prepared.sample)
    if time is None:
        raise DistillError(
            "forward noise needs the time of every call, one for all rows",
            seen={"time input": prepared.time},
            do='use mode="unrolled", or pass time=',
        )
    made = replace(time)
    if sample.shape[1:] != made.shape[1:] or sample.shape[0] % made.shape[0]:
        raise DistillError(
            "noised images are shaped like the sample that the UNet is called with",
            seen={"sample": tuple(sample.shape), "noised images": tuple(made.shape)},
            do="make images(batch) return what the sampler diffuses, latents for a latent model",
        )
    made = made.to(sample).repeat(sample.shape[0] // made.shape[0], *[1] * (made.ndim - 1))
    at = list(arguments.values).index(prepared.sample)
    if at < len(args):
        return (*args[:at], made, *args[at + 1 :]), kwargs
    return args, {**kwargs, prepared.sample: made}


class _Enough(BaseException):
    """Leaves a sampling loop, through whatever it catches."""


_ALWAYS = Schedule.where(lambda step: True)


class Capture(Engine):
    """Records the calls of one UNet; made once for a training run, asleep between trajectories.

    Args:
        unet: the UNet, in evaluation mode.
        region: to record, or how to choose it at the first call; None for the one below the highest level.
        time: name of the time input, where it cannot be told.
        graphs: the teacher's passes are replayed as CUDA graphs; what flows into the region is not picked up then.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks.training.recording import Capture
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> capture = Capture(unet)
        >>> def generate(batch):
        ...     sample = torch.randn(len(batch), 3, 16, 16)
        ...     for t in (900, 600, 300, 0):
        ...         sample = sample - 0.1 * unet(sample, t).sample
        >>> trajectory = capture.record(generate, ["a", "b"])
        >>> [(step.step, tuple(step.calls[0].exit.shape)) for step in trajectory.steps]
        [(1, (2, 32, 16, 16)), (2, (2, 32, 16, 16)), (3, (2, 32, 16, 16)), (4, (2, 32, 16, 16))]
        >>> capture.remove()
    """

    _above = 3  # frames above `begin`: `_open`'s too
    looks = True  # what flows into the region is what adaptors learn from

    def __init__(
        self,
        unet: nn.Module,
        *,
        region: Region | Choice | None = None,
        time: str | None = None,
        graphs: bool = False,
    ) -> None:
        super().__init__(unet, IdentityAdaptor(), _ALWAYS, region=region or Choice(), time=time, check_finite=False)
        self._identity = self.adaptor
        replayed = Captured(self) if graphs else None
        self.enabled = False
        self._teacher, self._probing = True, False
        self._needs: Callable[[int], Needs] = lambda step: Needs()
        self._replace: Callable[[float], Tensor] | None = None
        self._call: Given = ((), {})
        self._seen: tuple[str | None, Tensor | None] = (None, None)
        self._calls: list[Call] = []
        self._by_exit: dict[int, tuple[Tensor, Call]] = {}
        self._copies = Copies()
        self._handles = [
            unet.register_forward_pre_hook(RootHook(self, self._open), with_kwargs=True),
            unet.register_forward_hook(RootHook(self, self.end), prepend=True, with_kwargs=True, always_call=True),
        ]
        self.installed.run_eagerly(unet)
        if replayed is not None:
            self.installed.front(unet, replayed)

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
        self._teacher = student is None
        self.adaptor, self.schedule = student or (self._identity, _ALWAYS)
        self._needs = needs or (lambda step: Needs())
        self._replace, self._copies = replace, Copies(device)
        self.states.forget()
        self.enabled = True
        try:
            with torch.no_grad():
                generate(batch)
            calls = self._calls
        finally:
            self.enabled = False
            self.clean(self.states.current())
            self._calls, self._by_exit, self._copies = [], {}, Copies()
        if not calls:
            raise DistillError(
                "generate(batch) samples with the UNet that is distilled",
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
        except _Enough:
            pass
        finally:
            self._probing = False
        if self.region is None:
            raise RegionNotFoundError(
                "the region is one of the UNet that generate(batch) calls",
                seen={
                    "region": self.wanted.line if isinstance(self.wanted, Region) else self.wanted,
                    "unet": type(self.unet).__name__,
                },
                do="pass region=ch.find_region(unet, *args), found for this UNet, or leave it out",
            )
        self.wanted = self.region
        return self.region

    def again(self, call: Call, emit: Emit) -> Tensor:
        """The UNet's output for a recorded call, with what `emit` returns in the exit's place.

        The skipped part does not run. Gradients flow from the output to what `emit` made, through the frozen rest.

        Args:
            call: recorded with its inputs.
            emit: captured boundary tensors → exit.
        """
        assert call.region is not None  # calls without one have a reason, and are not trained on
        run = Pass(call.region.cut_plan, "adaptor", emit)
        kind = next((tensor.device.type for tensor in tensors([call.args, call.kwargs])), "cpu")
        if not self.installed.intact(call.region.cut_plan):
            self._install(call.region)
        run.enter(call.args, call.kwargs)
        self.active.run = run
        try:
            with torch.autocast(kind, call.autocast, enabled=call.autocast is not None):
                output = self.unet(*call.args, **call.kwargs)
        finally:
            self.active.run = None
        if not run.complete():
            raise DistillError(
                "a recorded call runs again as it ran",
                seen={"step": call.step, "region": call.region.line},
                do="make the UNet's forward depend on its arguments alone",
            )
        return tensors(output)[0]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self.clean(self.states.current())
        self.installed.remove()

    # -- the engine's seams --------------------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return None
        state = self.states.current()
        outermost = not state.running
        if outermost:
            self._call = (args, kwargs)
        self.begin(module, args, kwargs)
        if outermost and self._probing:
            raise _Enough
        if outermost and self._replace is not None:
            self._call = with_sample(state.running[-1], state.clock, args, kwargs, self._replace)
            return self._call
        return None

    def _adopt(self, running: Running) -> Prepared | None:
        """Trace at once instead of recording the call as it runs: the first call is recorded like the others."""
        known = super()._adopt(running)
        if known is None:
            trace = record(self.unet, *self._call, time=self.time)
            known = self._prepared[running.key] = self._prepare(trace)
        return known

    def _why_full(self, running: Running) -> str | None:
        reason = super()._why_full(running)
        position = running.position
        before = position.before if position is not None else None
        self._seen = (reason, before.kept.exit if before is not None and before.kept is not None else None)
        return (reason or "teacher") if self._teacher else reason

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a call: let the engine finish it, then keep what was seen."""
        state = self.states.current()
        running: Running | None = state.running[-1] if state.running else None
        failed = running is not None and sys.exc_info()[1] is not running.error
        replaced = super().end(module, args, kwargs, output)
        if running is not None and not failed and self.enabled:
            self._record_call(module, running, output if replaced is None else replaced)
        return replaced

    def _record_call(self, module: nn.Module, running: Running, output: Any) -> None:
        run, position, prepared = running.run, running.position, running.prepared
        assert position is not None  # every call is prepared before it runs
        assert prepared is not None
        reason, cached = self._seen
        args, kwargs = self._call
        needs, copies = self._needs(position.step), self._copies
        call = Call(
            position.trajectory,
            position.step,
            position.branch.number,
            reason=reason,
            autocast=running.key[2],
            time=self._time(running, prepared),
            rows=len(running.arguments.get(prepared.sample)),
            region=prepared.region,
        )
        self._calls.append(call)
        if run is None:
            return
        if cached is not None and id(cached) in self._by_exit:
            call.source = self._by_exit[id(cached)][1]
        true, truth = run, output
        if run.kind == "adaptor" and running.reason is None:
            true = Pass(run.plan, "full", copies=prepared.copies)
            true.enter(args, kwargs)
            self.active.run = true
            try:
                truth = module.forward(*args, **kwargs)
            finally:
                self.active.run = None
        if not true.complete() or true.exit is None:
            call.reason = call.reason or "calls differed from the traced ones"
            return
        emitted = run.exit
        if emitted is not None:  # only the next step's calls ask for it
            self._by_exit = {k: v for k, v in self._by_exit.items() if v[1].step >= call.step - 1}
            self._by_exit[id(emitted)] = (emitted, call)
        moving = [running.arguments.get(path) for path in (prepared.sample, prepared.time) if path]
        copies.keep(call, needs, true, (args, kwargs), truth, moving)
        if true is not run and emitted is not None:
            call.made, call.cached = copies.copy(emitted), copies.copy(cached)
            call.made_output = copies.copy(tensors(output)[0])

    def _time(self, running: Running, prepared: Prepared) -> float | None:
        """The call's time as a number."""
        if prepared.time is None:
            return None
        return self.states.current().clock.read(running.arguments.get(prepared.time))[0]

"""Watch a sampler: record what crosses the region's edge at every step of whatever `generate(batch)` runs.

Calls are placed in steps and branches by the very engine that serves a wrapped UNet, so what is recorded as an adaptor
step is what will be one in use. The teacher's trajectories are full passes; the student's run the adaptor on its
schedule, and each adaptor pass is followed by the full pass that labels it. For forward-noise training the UNet is
given noised images in the place of the sampler's own sample; times, conditions and branches are still the sampler's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks._tree import map_leaves, tensors, version
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.loops import TrajectoryBlock
from clockwork_hooks.engine.chain import ClockedRegion
from clockwork_hooks.engine.cuda_graphs import Captured
from clockwork_hooks.engine.engine import Engine, UNetCall
from clockwork_hooks.engine.passes import Emit, Outcome, Pass
from clockwork_hooks.errors import DistillError, Enough, RegionNotFoundError
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training.trajectory import Needs, RecordedCall, Trajectory, steps_of

__all__ = ["Copies", "Noise", "TrajectoryRecorder"]


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
        >>> from clockwork_hooks.training.recording import TrajectoryRecorder
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
                "generate(batch, seed) samples with the UNet that is distilled",
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
                "the region is one of the UNet that generate(batch, seed) calls",
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
                "a recorded call runs again as it ran",
                seen={"step": call.step, "region": call.region.line},
                do="make the UNet's forward depend on its arguments alone",
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
        self._by_exit[id(emitted)] = (emitted, recorded)
        moving = [call.arguments.get(path) for path in (signature.sample, signature.time) if path]
        self._copies.keep(recorded, self._needs(place.step), call, full, moving)
        if full is not outcome:
            recorded.student_exit, recorded.cached = self._copies.copy(emitted), self._copies.copy(cached)
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
                "noised images are shaped like the sample that the UNet is called with",
                seen={"sample": tuple(sample.shape), "noised images": tuple(noised.shape)},
                do="make images(batch) return what the sampler diffuses, latents for a latent model",
            )
        noised = noised.to(sample).repeat(sample.shape[0] // noised.shape[0], *[1] * (noised.ndim - 1))
        at = list(call.arguments.values).index(path)
        if at < len(call.args):
            return (*call.args[:at], noised, *call.args[at + 1 :]), call.kwargs
        return call.args, {**call.kwargs, path: noised}

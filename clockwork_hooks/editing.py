"""Edit a picture by its text: Plug-and-Play on any diffusers UNet, with Clockwork in both of its loops.

The source is taken to noise by DDIM inversion, and back by DDIM under the target's text. On the way back each call has
three rows: the source as it was at that time of the inversion, the negative text, the target's text; features and
self-attention of the first row take the place of the others', which keeps the source's layout.

Injection happens in full passes only. On an adaptor pass nothing is injected: the cached exit already holds what was
injected in the full pass before, and the layers that receive injection are, by default, among those skipped.

Source: Tumanyan et al., "Plug-and-Play Diffusion Features", arXiv 2211.12572; arXiv 2312.08128, Sec. 5.3 and App. D.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph import record
from clockwork_hooks.injection import Injection, find_injection, injected
from clockwork_hooks.passes import active_pass
from clockwork_hooks.progress import progress
from clockwork_hooks.regions import choose
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.stats import Counts
from clockwork_hooks.tree import map_leaves, tensors
from clockwork_hooks.wrapper import ClockworkWrapper, wrap

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Edit", "Inversion", "edit", "edit_macs", "invert"]

Conditions = Tensor | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inversion:
    """The way of a source to noise.

    Attributes:
        latents: time → (B, C, ...) latents at that time's noise level, times ascending.
        conditions: what the UNet was told about the source.
        passes: what ran.
    """

    latents: Mapping[int, Tensor] = field(repr=False)
    conditions: Mapping[str, Any] = field(repr=False)
    passes: Counts

    @property
    def noise(self) -> Tensor:
        """(B, C, ...) latents at the last time: where editing starts from."""
        return self.latents[max(self.latents)]

    def at(self, time: int) -> Tensor:
        """The latents at the nearest time that there is."""
        return self.latents[min(self.latents, key=lambda known: abs(known - time))]


@dataclass(frozen=True, slots=True)
class Edit:
    """An edited picture, and what it took.

    Attributes:
        latents: (B, C, ...) float32 edited latents.
        inversion: the source's way to noise; pass it on to edit the same source again.
        passes: what ran on the way back, in calls of 3B rows.
        injection: what was injected.
    """

    latents: Tensor = field(repr=False)
    inversion: Inversion
    passes: Counts
    injection: Injection

    @property
    def macs(self) -> int:
        """MACs of both loops; convolutions and matrix products, attention products counted."""
        return self.inversion.passes.macs_run + self.passes.macs_run

    @property
    def macs_plain(self) -> int:
        """What both loops cost without Clockwork."""
        return self.inversion.passes.macs_plain + self.passes.macs_plain

    @property
    def saving(self) -> float:
        """Share of the MACs that did not run, 0 to 1."""
        return 1 - self.macs / self.macs_plain if self.macs_plain else 0.0


def edit_macs(
    full: int, adaptor_pass: int, *, inversion_steps: int, steps: int, clock: int, inversion_clock: int | None = None
) -> int:
    """What an edit costs, from what passes cost: N/C of the passes, rounded up, are full, as the first one always is.

    Args:
        full: MACs of a full pass of the source's batch.
        adaptor_pass: MACs of an adaptor pass of that batch, the adaptor included.
        inversion_steps: N of the inversion.
        steps: N of the way back, whose calls have three times the rows.
        clock, inversion_clock: of the way back, and of the inversion (None: the same).

    Returns:
        MACs of both loops.

    Example:
        >>> 1 - edit_macs(100, 20, inversion_steps=1000, steps=50, clock=2) / (100 * (1000 + 3 * 50))
        0.4

    Source: arXiv 2312.08128, App. D, Eq. 4 to 6.
    """

    def loop(count: int, ticks: int) -> int:
        fulls = Schedule.every(ticks).full_steps(count)
        return fulls * full + (count - fulls) * adaptor_pass

    return loop(inversion_steps, clock if inversion_clock is None else inversion_clock) + 3 * loop(steps, clock)


@torch.no_grad()
def invert(
    unet: nn.Module,
    scheduler: Any,
    source: Tensor,
    conditions: Conditions,
    *,
    steps: int = 100,
    clock: int = 1,
    region: Region | None = None,
    adaptor: Adaptor | str | None = None,
    console: Console | None = None,
) -> Inversion:
    """Take a source to noise by DDIM inversion: the deterministic sampler run backwards, times ascending.

    Args:
        unet: any diffusers UNet; not wrapped.
        scheduler: a diffusers scheduler with betas (its `alphas_cumprod`, spacing and prediction type are read).
        source: (B, C, ...) latents without noise.
        conditions: what the UNet is told about the source: hidden states (B, L, D), or keyword arguments of its call.
        steps: N, of the inversion.
        clock: one full pass every `clock` steps.
        region, adaptor: as in `wrap`.
        console: where the progress bar goes; None for standard error.

    Returns:
        The latents at every time.

    Raises:
        ArgumentError: an option is outside its rule.

    Source: arXiv 2312.08128, App. D, Eq. 4 (cost).
    """
    path = _Path(scheduler, steps, source.device)
    told = _told(conditions)
    x, kept, level = source.float(), {}, path.clean
    with _clocked(unet, clock, region, adaptor) as cw, progress(console) as bar:
        task = bar.add_task("inversion", total=steps)
        for k in reversed(range(steps)):
            cw.step()
            x = path.move(_call(cw, x, path.times[k], told), x, level, path.levels[k])
            kept[path.numbers[k]], level = x, path.levels[k]
            bar.advance(task)
    return Inversion(kept, told, _counts(cw))


@torch.no_grad()
def edit(
    unet: nn.Module,
    scheduler: Any,
    source: Tensor | Inversion,
    conditions: Conditions | None = None,
    *,
    target: Conditions,
    negative: Conditions,
    steps: int = 50,
    inversion_steps: int = 100,
    guidance: float = 7.5,
    clock: int = 2,
    inversion_clock: int | None = None,
    injection: Injection | None = None,
    region: Region | None = None,
    adaptor: Adaptor | str | None = None,
    console: Console | None = None,
) -> Edit:
    """Edit a source into what the target's text says, keeping its layout.

    Args:
        unet: any diffusers UNet; not wrapped, and the same as before when this returns or raises.
        scheduler: a diffusers scheduler with betas, as in `invert`.
        source: (B, C, ...) latents without noise, or an `Inversion` of before.
        conditions: what the UNet is told about the source, as in `invert`; an inversion has it.
        target: likewise, about what is wanted.
        negative: likewise, about what guidance leads away from: the empty text, or the source's own.
        steps: N of the way back.
        inversion_steps: N of the inversion; times of the way back that it has not are served by the nearest.
        guidance: negative + guidance · (target - negative). The paper's is 15.
        clock: of the way back; 1 switches Clockwork off.
        inversion_clock: of the inversion; None for the same.
        injection: what is injected, and how long; None for `find_injection`'s choice; `Injection()` for nothing.
        region, adaptor: as in `wrap`, for both loops.
        console: where the progress bars go; None for standard error.

    Returns:
        The edited latents and the counts of both loops.

    Raises:
        ArgumentError: an option is outside its rule, or the injection names a module that the UNet has not.
        RegionNotFoundError: nothing of the UNet can be skipped.

    Source: arXiv 2312.08128, Sec. 5.3 and App. D (τ_f = 0.8, τ_A = 0.5, identity adaptor, clock 2 in both loops).
    """
    check_clock(clock)
    path = _Path(scheduler, steps, (source.noise if isinstance(source, Inversion) else source).device)
    if not isinstance(source, Inversion):
        if conditions is None:
            raise ArgumentError("an inversion is told about the source", seen={"conditions": None}, do="pass its text")
        source = invert(
            unet,
            scheduler,
            source,
            conditions,
            steps=inversion_steps,
            clock=clock if inversion_clock is None else inversion_clock,
            region=region,
            adaptor=adaptor,
            console=console,
        )
    told = _rows(source.conditions, _told(negative), _told(target))
    if injection is None or region is None:
        x = source.noise.to(_dtype(unet))
        trace = record(unet, (x, path.times[0]), dict(source.conditions))
        region = region or choose(trace, unet)
        injection = injection or find_injection(trace)
    injection.check(unet)
    x = source.noise
    with _clocked(unet, clock, region, adaptor) as cw, progress(console) as bar, injected(unet, injection) as inject:
        inject.silent = lambda: _adapts(cw)
        task = bar.add_task("editing", total=steps)
        for k in range(steps):
            cw.step()
            inject.at(k / steps)
            made = _call(cw, torch.cat([source.at(path.numbers[k]), x, x]), path.times[k], told)
            _, away, wanted = made.chunk(3)
            then = path.levels[k + 1] if k + 1 < steps else path.clean
            x = path.move(away + guidance * (wanted - away), x, path.levels[k], then)
            bar.advance(task)
    return Edit(x, source, _counts(cw), injection)


class _Path:
    """The times of a DDIM run and what lies between them.

    Attributes:
        numbers: the times, descending.
        times: the same on the device, one tensor.
        levels: ᾱ at each.
        clean: ᾱ of a picture without noise.
    """

    def __init__(self, scheduler: Any, steps: int, device: torch.device) -> None:
        from diffusers import DDIMScheduler

        if not hasattr(scheduler, "alphas_cumprod"):
            raise ArgumentError(
                "DDIM inversion reads alphas_cumprod off a diffusers scheduler",
                seen={"scheduler": type(scheduler).__name__},
                do="pass a DDIMScheduler with the model's betas",
            )
        most = scheduler.config.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise ArgumentError(f"steps are an int from 1 to {most}", seen={"steps": repr(steps)}, do="pass steps=50")
        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(steps)
        self.numbers: list[int] = ddim.timesteps.tolist()
        self.times = ddim.timesteps.to(device)
        self.levels: list[float] = ddim.alphas_cumprod[ddim.timesteps].tolist()
        self.clean = float(ddim.final_alpha_cumprod)
        self._predicts = str(ddim.config.prediction_type)
        if self._predicts not in ("epsilon", "v_prediction"):
            raise ArgumentError(
                "a UNet that is inverted predicts noise or v: a picture alone does not tell the noise of none",
                seen={"prediction_type": self._predicts},
                do="edit with another model",
            )

    def move(self, made: Tensor, x: Tensor, now: float, then: float) -> Tensor:
        """From the noise level ᾱ = now to ᾱ = then along DDIM's deterministic path, in either direction.

        Source: arXiv 2010.02502, Eq. 12 with σ = 0.
        """
        signal, sigma = math.sqrt(now), math.sqrt(1 - now)
        if self._predicts == "v_prediction":
            clean, noise = signal * x - sigma * made, signal * made + sigma * x
        else:
            clean, noise = (x - sigma * made) / max(signal, 1e-6), made
        return math.sqrt(then) * clean + math.sqrt(1 - then) * noise


@contextlib.contextmanager
def _clocked(
    unet: nn.Module, clock: int, region: Region | None, adaptor: Adaptor | str | None
) -> Iterator[ClockworkWrapper]:
    check_clock(clock)
    with wrap(unet, adaptor, schedule=Schedule.every(clock), region=region) as cw, cw.trajectory():
        yield cw


def _adapts(cw: ClockworkWrapper) -> bool:
    run = active_pass(cw._engine)
    return run is not None and run.kind == "adaptor"


def _call(unet: Any, x: Tensor, time: Tensor, told: Mapping[str, Any]) -> Tensor:
    made: Tensor = unet(x.to(_dtype(unet.unet)), time, **told).sample.float()
    return made


def _dtype(unet: nn.Module) -> torch.dtype:
    return next((p.dtype for p in unet.parameters() if p.is_floating_point()), torch.float32)


def _told(conditions: Conditions) -> dict[str, Any]:
    return {"encoder_hidden_states": conditions} if isinstance(conditions, Tensor) else dict(conditions)


def _rows(*told: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the three, their tensors one below the other."""
    first, *others = told
    if any(other.keys() != first.keys() for other in others):
        raise ArgumentError(
            "source, negative and target are told in the same way",
            seen={"keys": [sorted(one) for one in told]},
            do="pass the same keyword arguments, or hidden states, for each",
        )
    return {name: _stacked([one[name] for one in told]) for name in first}


def _stacked(values: list[Any]) -> Any:
    parts = [iter(tensors(value)) for value in values]
    return map_leaves(lambda leaf: torch.cat([next(p) for p in parts]) if isinstance(leaf, Tensor) else leaf, values[0])


def _counts(cw: ClockworkWrapper) -> Counts:
    stats = cw.stats
    return Counts(
        stats.full_passes,
        stats.adaptor_passes,
        stats.reasons.copy(),
        stats.regions.copy(),
        stats.macs_run,
        stats.macs_plain,
    )

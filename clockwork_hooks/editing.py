"""Edit a picture by its text: Plug-and-Play on any diffusers UNet, with Clockwork in both of its loops.

The source is taken to noise by DDIM inversion, and back by DDIM under the target's text. On the way back each call has
three rows: the source as it was at that time of the inversion, the negative text, the target's text; features and
self-attention of the first row take the place of the others', which keeps the source's layout.

Injection happens in full passes only. On an adaptor pass nothing is injected: the cached exit already holds what was
injected in the full pass before, and the layers that receive injection are, by default, among those skipped.

Source: Tumanyan et al., "Plug-and-Play Diffusion Features", arXiv 2211.12572; arXiv 2312.08128, Sec. 5.3 and App. D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clockwork_hooks.acceptance import check_unet
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.ddim import Path
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph import record
from clockwork_hooks.injection import Injection, find_injection, injected
from clockwork_hooks.inversion import (
    Conditions,
    Inversion,
    Steps,
    call,
    check_source,
    clocked,
    counts,
    dtype_of,
    invert,
    told,
)
from clockwork_hooks.progress import progress
from clockwork_hooks.report import shape
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.stats import Counts
from clockwork_hooks.tree import leaves, map_leaves, tensors
from clockwork_hooks.wrapper import ClockworkWrapper

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Edit", "Inversion", "edit", "edit_macs", "invert"]


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
    full: int,
    adaptor_pass: int,
    *,
    inversion_steps: int,
    steps: int,
    clock: int = 2,
    inversion_clock: int | None = None,
    schedule: Steps | None = None,
    inversion_schedule: Steps | None = None,
) -> int:
    """What an edit costs, from what passes cost: N/C of the passes, rounded up, are full, as the first one always is.

    Args:
        full: MACs of a full pass of the source's batch.
        adaptor_pass: MACs of an adaptor pass of that batch, the adaptor included.
        inversion_steps: N of the inversion.
        steps: N of the way back, whose calls have three times the rows.
        clock, inversion_clock: of the way back, and of the inversion (None: the same).
        schedule, inversion_schedule: in the place of the clocks, as in `edit`.

    Returns:
        MACs of both loops.

    Raises:
        ArgumentError: a clock or a schedule is outside its rule.

    Example:
        >>> 1 - edit_macs(100, 20, inversion_steps=1000, steps=50, clock=2) / (100 * (1000 + 3 * 50))
        0.4

    Source: arXiv 2312.08128, App. D, Eq. 4 to 6.
    """

    def loop(count: int, ticks: int, chosen: Steps | None) -> int:
        check_clock(ticks)
        fulls = (Schedule.every(ticks) if chosen is None else Schedule.of(chosen)).full_steps(count)
        return fulls * full + (count - fulls) * adaptor_pass

    forth = loop(inversion_steps, clock if inversion_clock is None else inversion_clock, inversion_schedule)
    return forth + 3 * loop(steps, clock, schedule)


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
    schedule: Steps | None = None,
    inversion_schedule: Steps | None = None,
    injection: Injection | None = None,
    region: Region | None = None,
    adaptor: Adaptor | str | None = None,
    console: Console | None = None,
) -> Edit:
    """Edit a source into what the target's text says, keeping its layout.

    Args:
        unet: any diffusers UNet; not wrapped, and the same as before when this returns or raises.
        scheduler: a diffusers scheduler with betas, as in `invert`.
        source: (B, C, ...) floating latents without noise, or an `Inversion` of before.
        conditions: what the UNet is told about the source, as in `invert`; an inversion has it.
        target: likewise, about what is wanted.
        negative: likewise, about what guidance leads away from: the empty text, or the source's own.
        steps: N of the way back.
        inversion_steps: N of the inversion; times of the way back that it has not are served by the nearest.
        guidance: negative + guidance · (target - negative). The paper's is 15.
        clock: of the way back; 1 switches Clockwork off.
        inversion_clock: of the inversion; None for the same.
        schedule: of the way back in the place of its clock, as in `wrap`: `Schedule.every(2, warmup=15)`.
        inversion_schedule: likewise of the inversion, whose first step is the one at the least noise.
        injection: what is injected, and how long; None for `find_injection`'s choice; `Injection()` for nothing.
        region, adaptor: as in `wrap`, for both loops.
        console: where the progress bars go; None for standard error.

    Returns:
        The edited latents and the counts of both loops.

    Raises:
        ArgumentError: an option is outside its rule, the source or what is told is not of the UNet's shape, or the
            injection names a module that the UNet has not.
        RegionNotFoundError: nothing of the UNet can be skipped.

    Example:
        >>> from clockwork_hooks.demo import load_demo, render
        >>> from clockwork_hooks.demo.model import to_images, to_latents
        >>> from clockwork_hooks.demo.scenes import draw_scenes
        >>> demo, picture = load_demo(), render(draw_scenes(1, seed=4))
        >>> old, new = demo.encode_prompts(["a red circle", "a blue square"], guided=False).split(1)
        >>> options = {"target": new, "negative": old, "inversion_steps": 4, "steps": 4}
        >>> made = edit(demo.unet, demo.scheduler("ddim"), to_latents(picture), old, **options)
        >>> to_images(made.latents).shape, made.passes.full_passes, f"{made.saving:.0%}"
        (torch.Size([1, 3, 64, 64]), 2, '40%')

    Source: arXiv 2312.08128, Sec. 5.3 and App. D (τ_f = 0.8, τ_A = 0.5, identity adaptor, clock 2 in both loops).
    """
    check_unet(unet)
    check_clock(clock)
    check_clock(clock if inversion_clock is None else inversion_clock)
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
        raise ArgumentError("guidance is a finite number", seen={"guidance": repr(guidance)}, do="pass guidance=7.5")
    if injection is not None:
        injection.check(unet)
    latents, given = _source(unet, source, conditions)
    path = Path(scheduler, steps, latents.device)
    if not isinstance(source, Inversion):
        Path(scheduler, inversion_steps, latents.device)  # steps that are none are told now
    rows = _rows(given, told(negative, len(latents)), told(target, len(latents)))
    if injection is None:  # before the inversion, which takes long: a UNet may have no place for any
        injection = find_injection(record(unet, (latents.to(dtype_of(unet)), path.times[0]), given))
    if not isinstance(source, Inversion):
        source = invert(
            unet,
            scheduler,
            source,
            given,
            steps=inversion_steps,
            clock=clock if inversion_clock is None else inversion_clock,
            schedule=inversion_schedule,
            region=region,
            adaptor=adaptor,
            console=console,
        )
    x = source.noise
    with (
        clocked(unet, clock, schedule, region, adaptor) as cw,
        progress(console) as bar,
        injected(unet, injection) as inject,
    ):
        inject.silent = lambda: _adapts(cw)
        task = bar.add_task("editing", total=steps)
        for k in range(steps):
            cw.step()
            inject.at(k / steps)
            made = call(cw, torch.cat([source.at(path.numbers[k]), x, x]), path.times[k], rows)
            _, away, wanted = made.chunk(3)
            then = path.levels[k + 1] if k + 1 < steps else path.clean
            x = path.move(away + guidance * (wanted - away), x, path.levels[k], then)
            bar.advance(task)
    return Edit(x, source, counts(cw), injection)


def _source(
    unet: nn.Module, source: Tensor | Inversion, conditions: Conditions | None
) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and what the UNet is told about the source."""
    if isinstance(source, Inversion) and conditions is None:
        return source.noise, dict(source.conditions)
    if isinstance(source, Inversion) or conditions is None:
        raise ArgumentError(
            "the inversion, and it alone, is told about the source",
            seen={"source": type(source).__name__, "conditions": type(conditions).__name__},
            do="pass its text as conditions with latents, and none with an Inversion",
        )
    check_source(unet, source)
    return source, told(conditions, len(source))


def _adapts(cw: ClockworkWrapper) -> bool:
    run = cw._engine.active.run
    return run is not None and run.kind == "adaptor"


def _rows(*told: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the three, their tensors one below the other."""
    first, *others = told
    if any(other.keys() != first.keys() for other in others):
        raise ArgumentError(
            "source, negative and target are told in the same way",
            seen={"keys": [sorted(one) for one in told]},
            do="pass the same keyword arguments, or hidden states, for each",
        )
    shapes = [{path: shape(leaf.shape[1:]) for path, leaf in leaves(one) if isinstance(leaf, Tensor)} for one in told]
    if any(other != shapes[0] for other in shapes):
        raise ArgumentError(
            "source, negative and target are told in tensors of one shape, but for the rows",
            seen=dict(zip(("source", "negative", "target"), shapes, strict=True)),
            do="pad the texts to one length",
        )
    return {name: _stacked([one[name] for one in told]) for name in first}


def _stacked(values: list[Any]) -> Any:
    parts = [iter(tensors(value)) for value in values]
    return map_leaves(lambda leaf: torch.cat([next(p) for p in parts]) if isinstance(leaf, Tensor) else leaf, values[0])

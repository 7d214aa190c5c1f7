"""Edit a picture by its text: Plug-and-Play on any diffusers UNet, with Clockwork in both of its loops.

`invert` takes the source to noise by DDIM inversion, the deterministic sampler run backwards. `edit` takes it back by
DDIM under the target's text. On the way back each call has three rows for each picture: the source as it was at that
time of the inversion, the negative text, the target's text; features and self-attention of the first row take the place
of the others', which keeps the source's layout.

`find_injection` reads off the graph where that happens. The way up has blocks that take in a skip; Plug-and-Play
replaces the output of the second of three at one level above the bottleneck, and the queries and keys of all
self-attention that follows. Equal queries and keys are equal attention maps, so nothing of an attention layer's inside
needs to be known. Native hooks do it, in full passes only: the cached exit of an adaptor pass already holds what was
injected in the full pass before, and the layers that receive injection are, by default, among those skipped.

Source: Tumanyan et al., "Plug-and-Play Diffusion Features", arXiv 2211.12572; arXiv 2312.08128, Sec. 5.3 and App. D.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx, nn

from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import leaves, map_leaves, tensors
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.stats import Counts
from clockwork_hooks.engine.wrapper import ClockworkWrapper, check_unet
from clockwork_hooks.errors import ArgumentError, NoEffectWarning, is_number, is_whole, share
from clockwork_hooks.graph.operators import operator_name
from clockwork_hooks.graph.recorder import ModuleCall, specs_in
from clockwork_hooks.graph.tracing import Trace, module_paths, record
from clockwork_hooks.regions.flow import Levels
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.schedule import Schedule, check_clock

__all__ = ["Edit", "Injection", "Inversion", "edit", "edit_macs", "find_injection", "invert"]

ROWS = 3  # of each call on the way back, for each picture: source, negative, target
Conditions = Tensor | Mapping[str, Any]
Steps = Schedule | Iterable[int] | Callable[[int], bool]


class DDIMPath:
    """The times of a DDIM run and what lies between them.

    Attributes:
        numbers: the times, descending.
        times: the same on the device, one tensor.
        levels: ᾱ at each.
        clean: ᾱ of a picture without noise.

    Args:
        scheduler: a diffusers scheduler with betas (its `alphas_cumprod`, spacing and prediction type are read).
        steps: how many times.
        device: where the UNet wants them.

    Raises:
        ArgumentError: the scheduler has no betas, its model predicts pictures, or steps are outside their rule.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> DDIMPath(DDIMScheduler(timestep_spacing="trailing"), 4, torch.device("cpu")).numbers
        [999, 749, 499, 249]

    Source: arXiv 2010.02502, Sec. 4.1.
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
        if not is_whole(steps, 1, most):
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
                "inversion needs a UNet that predicts noise or v: without noise, the noise cannot be computed from "
                "the picture",
                seen={"prediction_type": self._predicts},
                do="edit with another model",
            )

    def move(self, output: Tensor, x: Tensor, now: float, then: float) -> Tensor:
        """From the noise level ᾱ = now to ᾱ = then along DDIM's deterministic path, in either direction.

        Args:
            output: (B, C, ...) the UNet's, at x.
            x: (B, C, ...) latents at `now`.
            now, then: ᾱ, in (0, 1].

        Returns:
            (B, C, ...) latents at `then`.

        Source: arXiv 2010.02502, Eq. 12 with σ = 0.
        """
        signal, sigma = math.sqrt(now), math.sqrt(1 - now)
        if self._predicts == "v_prediction":
            clean, noise = signal * x - sigma * output, signal * output + sigma * x
        else:
            clean, noise = (x - sigma * output) / max(signal, 1e-6), output
        return math.sqrt(then) * clean + math.sqrt(1 - then) * noise


@dataclass(frozen=True, slots=True)
class Inversion:
    """The way of a source to noise.

    Attributes:
        latents: time → (B, C, ...) float32 latents at that time's noise level, times ascending.
        conditions: of the source: keyword arguments of the UNet's call.
        passes: what ran.
    """

    latents: Mapping[int, Tensor] = field(repr=False)
    conditions: Mapping[str, Any] = field(repr=False)
    passes: Counts

    @property
    def noise(self) -> Tensor:
        """(B, C, ...) float32 latents at the last time: where editing starts from."""
        return self.latents[max(self.latents)]

    def at(self, time: int) -> Tensor:
        """(B, C, ...) latents at the nearest time that there is."""
        return self.latents[min(self.latents, key=lambda other: abs(other - time))]


@torch.no_grad()
def invert(
    unet: nn.Module,
    scheduler: Any,
    source: Tensor,
    conditions: Conditions,
    *,
    steps: int = 100,
    clock: int = 1,
    schedule: Steps | None = None,
    region: Region | None = None,
    adaptor: Adaptor | str | None = None,
    console: Console | None = None,
) -> Inversion:
    """Take a source to noise by DDIM inversion: the deterministic sampler run backwards, times ascending.

    Args:
        unet: any diffusers UNet; not wrapped, and the same as before when this returns or raises.
        scheduler: a diffusers scheduler with betas (its `alphas_cumprod`, spacing and prediction type are read).
        source: (B, C, ...) floating latents without noise, on the UNet's device.
        conditions: what the UNet is told about the source: hidden states (B, L, D), or keyword arguments of its call,
            whose tensors have B rows.
        steps: N, of the inversion.
        clock: one full pass every `clock` steps.
        schedule: in the place of a clock, as in `wrap`; its first step is the one at the least noise.
        region, adaptor: as in `wrap`.
        console: where the progress bar goes; None for standard error.

    Returns:
        The latents at every time.

    Raises:
        ArgumentError: an option is outside its rule, or the source is not of the UNet's shape.
        RegionNotFoundError: nothing of the UNet can be skipped.

    Example:
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> unet = UNet2DModel(
        ...     8,
        ...     block_out_channels=(8, 16),
        ...     norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2,
        ...     up_block_types=("UpBlock2D",) * 2,
        ... ).eval()
        >>> way = invert(unet, DDIMScheduler(), torch.zeros(1, 3, 8, 8), {}, steps=6, clock=3)
        >>> way.noise.shape, way.passes.full_passes, way.passes.adaptor_passes
        (torch.Size([1, 3, 8, 8]), 2, 4)

    Source: arXiv 2312.08128, App. D, Eq. 4 (cost).
    """
    check_unet(unet)
    check_source(unet, source)
    path, arguments = DDIMPath(scheduler, steps, source.device), unet_arguments(conditions, len(source))
    x, latents, level = source.float(), {}, path.clean
    with clocked(unet, steps, clock, schedule, region, adaptor) as cw, ProgressBar(console) as bar:
        task = bar.add_task("inversion", total=steps)
        for k in reversed(range(steps)):
            cw.step()
            x = path.move(predicted(cw, x, path.times[k], arguments), x, level, path.levels[k])
            latents[path.numbers[k]], level = x, path.levels[k]
            bar.advance(task)
    return Inversion(latents, arguments, counts(cw))


def check_source(unet: Any, source: Any) -> None:
    """Raise `ArgumentError` if the source is no batch of latents of the UNet's."""
    channels = getattr(getattr(unet, "config", None), "in_channels", None)
    if not isinstance(source, Tensor) or not source.is_floating_point() or source.ndim < 3 or not len(source):
        seen = {
            "source": f"{source.dtype}, {shape(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        }
        raise ArgumentError(
            "a source is a batch of floating latents (B, C, ...)", seen=seen, do="encode the picture with the VAE"
        )
    if channels is not None and source.shape[1] != channels:
        raise ArgumentError(
            "a source must have as many channels as the UNet's sample",
            seen={"source": shape(source.shape), "the UNet's in_channels": channels},
            do="pass latents (B, C, ...): encode the picture with the model's own VAE",
        )


def unet_arguments(conditions: Conditions, rows: int) -> dict[str, Any]:
    """Keyword arguments of the UNet's call, each tensor with as many rows as the source.

    Raises:
        ArgumentError: a tensor has other rows, or it is neither a tensor nor a mapping.
    """
    if not isinstance(conditions, (Tensor, Mapping)):
        raise ArgumentError(
            "conditions are a tensor of hidden states, or the keyword arguments of the UNet's call",
            seen={"got": repr(conditions)[:80]},
            do="encode the text: pipe.encode_prompt(text, ...)[0]",
        )
    arguments = {"encoder_hidden_states": conditions} if isinstance(conditions, Tensor) else dict(conditions)
    wrong = {
        path: shape(leaf.shape) or "no rows"
        for path, leaf in leaves(arguments)
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (rows,)
    }
    if wrong:
        raise ArgumentError(
            "every tensor among the conditions needs one row for each picture",
            seen={"pictures": rows, **wrong},
            do=f"expand it to {rows} row{'s' * (rows != 1)}",
        )
    return arguments


@contextlib.contextmanager
def clocked(
    unet: nn.Module,
    steps: int,
    clock: int,
    schedule: Steps | None,
    region: Region | None,
    adaptor: Adaptor | str | None,
) -> Iterator[ClockworkWrapper]:
    """The UNet wrapped for one loop of so many steps; clock 1 is the plain loop, and warns of nothing."""
    check_clock(clock)
    ticks = Schedule.every(clock) if schedule is None else schedule
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        cw = wrap(unet, adaptor, schedule=ticks, region=region)
    with cw, cw.trajectory(steps=steps):
        yield cw


def predicted(cw: ClockworkWrapper, x: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The UNet's output in float32, made in its own type.

    Raises:
        ArgumentError: it has another shape than x.
    """
    output = cw(x.to(dtype_of(cw.unet)), time, **arguments)
    sample: Tensor = output if isinstance(output, Tensor) else output.sample
    if sample.shape != x.shape:
        raise ArgumentError(
            "inversion needs a UNet that predicts as many channels as its sample has, and no variance",
            seen={"given": shape(x.shape), "predicted": shape(sample.shape)},
            do="edit with another model",
        )
    return sample.float()


def dtype_of(unet: nn.Module) -> torch.dtype:
    """The type that the UNet's parameters have."""
    return next((p.dtype for p in unet.parameters() if p.is_floating_point()), torch.float32)


def counts(cw: ClockworkWrapper) -> Counts:
    """A copy of what ran, that stays when the wrapper goes."""
    return Counts(*(copy.copy(getattr(cw.stats, one.name)) for one in fields(Counts)))


@dataclass(frozen=True, slots=True)
class Injection:
    """What is injected, and for how long.

    Attributes:
        features: paths of modules whose output is a feature to inject.
        attention: paths of the projections to queries and to keys of self-attention.
        until_features: τ_f, the share of the steps in which features are injected.
        until_attention: τ_A, likewise for self-attention.

    Example:
        >>> Injection(features=("up_blocks.1.resnets.1",), until_features=0.5).attention
        ()
    """

    features: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    until_features: float = 0.8
    until_attention: float = 0.5

    def __post_init__(self) -> None:
        for name in ("until_features", "until_attention"):
            share(name, getattr(self, name), rule=f"{name} is a share of the steps, 0 to 1")

    def check(self, unet: nn.Module) -> None:
        """Raise `ArgumentError` if a path is no module's."""
        paths = set(module_paths(unet).values())
        missing = [path for path in (*self.features, *self.attention) if path not in paths]
        if missing:
            raise ArgumentError(
                "an injection names modules of the UNet",
                seen={"no such module": ", ".join(missing)},
                do='pass dotted paths, as in features=("up_blocks.1.resnets.1",)',
            )


def find_injection(trace: Trace, *, until_features: float = 0.8, until_attention: float = 0.5) -> Injection:
    """Where Plug-and-Play injects, on any UNet.

    Args:
        trace: of a call of the UNet.
        until_features, until_attention: τ_f and τ_A; with τ_A = 0 none is asked for, and none has to be there.

    Returns:
        Of the blocks on the way up that take in a skip one level above the bottleneck, the middle one; and queries and
        keys of all self-attention after it.

    Raises:
        ArgumentError: no such block, or no such self-attention, is found; name the modules yourself.

    Example:
        >>> from clockwork_hooks.graph import trace
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")
        >>> injection = find_injection(trace(unet, *args, **kwargs))
        >>> injection.features, len(injection.attention)
        (('up_blocks.1.resnets.1',), 16)

    Source: arXiv 2211.12572, Sec. 4 (its layers 4, and 4 to 11).
    """
    blocks = _joins(trace)
    sizes = sorted({positions for positions, _ in blocks})
    if not blocks:
        raise ArgumentError(
            "features are injected where the way up takes in a skip by concatenation",
            seen={"model": trace.model, "such blocks": 0},
            do="pass injection=Injection(features=(...), attention=(...)) with paths of modules",
        )
    wanted = sizes[min(1, len(sizes) - 1)]
    level = [call for positions, call in blocks if positions == wanted]
    chosen = level[len(level) // 2]
    attention = [path for node in trace.nodes if node.meta["index"] >= chosen.first for path in _projections(node)]
    if until_attention and not attention:
        raise ArgumentError(
            "self-attention is injected where two linear layers make queries and keys of one tensor",
            seen={"model": trace.model, "features are injected at": chosen.path, "such attention after it": 0},
            do="pass injection=find_injection(trace, until_attention=0) to inject features alone, or name the layers "
            "with Injection(features=(...), attention=(...))",
        )
    return Injection((str(chosen.path),), tuple(dict.fromkeys(attention)), until_features, until_attention)


def _joins(trace: Trace) -> list[tuple[int, ModuleCall]]:
    """Calls that are given a concatenation of two maps along the channels, with their positions, in order."""
    levels, blocks = Levels(trace), []
    carrying = trace.carrying
    joined = {
        node
        for node in trace.nodes
        if operator_name(node) == "cat"
        and levels.resolution(node)
        and sum(source in carrying for source in node.all_input_nodes) > 1
    }
    for call in trace.calls:
        whole = next((spec.node for spec in specs_in(call.inputs) if spec.node in joined), None)
        if whole is not None and call.path:
            joined.discard(whole)  # the outermost call that takes it in; what is inside of it comes later
            blocks.append((levels.positions(whole) or 0, call))
    return blocks


def _projections(node: fx.Node) -> tuple[str, ...]:
    """Paths of the linear layers that make an attention's queries and keys, if both come from one tensor."""
    if node.op != "call_function" or "dot_product" not in operator_name(node):
        return ()
    query, key = (_linear(argument) if isinstance(argument, fx.Node) else None for argument in node.args[:2])
    if query is None or key is None or query is key or query.args[0] is not key.args[0]:
        return ()
    return query.meta["module"], key.meta["module"]


def _linear(node: fx.Node) -> fx.Node | None:
    """The linear layer that a tensor comes from, through views alone."""
    for _ in range(12):
        if node.op != "call_function":
            return None
        if operator_name(node) in ("linear", "addmm", "mm", "matmul"):
            return node
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


class Injecting:
    """The hooks of an injection while they are attached.

    Attributes:
        silent: nothing is injected in a call for which this is true.
    """

    def __init__(self, unet: nn.Module, injection: Injection) -> None:
        self.silent: Callable[[], bool] = lambda: False
        self._injection = injection
        self._on = {"features": False, "attention": False}
        self._handles = [
            unet.get_submodule(path).register_forward_hook(self._hook(kind))
            for kind, paths in (("features", injection.features), ("attention", injection.attention))
            for path in paths
        ]

    def at(self, progress: float) -> None:
        """A step begins, at this share of the steps: 0 for the first."""
        self._on["features"] = progress < self._injection.until_features
        self._on["attention"] = progress < self._injection.until_attention

    def remove(self) -> None:
        """Take the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, kind: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._on[kind] or self.silent():
                return None
            return map_leaves(lambda leaf: _first_rows(leaf) if isinstance(leaf, Tensor) else leaf, output)

        return hook


@contextlib.contextmanager
def injected(unet: nn.Module, injection: Injection) -> Iterator[Injecting]:
    """The injection's hooks are on the UNet inside, and off after it, also after an exception."""
    attached = Injecting(unet, injection)
    try:
        yield attached
    finally:
        attached.remove()


def _first_rows(leaf: Tensor) -> Tensor:
    """The first third of the rows in the place of all thirds."""
    first = leaf[: leaf.shape[0] // ROWS]
    return torch.cat([first] * ROWS)


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
    inversion_steps: int | None = None,
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
        conditions: of the source, as in `invert`; an inversion has them.
        target: likewise, of what is wanted.
        negative: likewise, of what guidance leads away from: the empty text, or the source's own.
        steps: N of the way back.
        inversion_steps: N of the inversion, None for 100; times of the way back that it has not are served by the
            nearest.
        guidance: negative + guidance · (target - negative). The paper's is 15.
        clock: of the way back; 1 switches Clockwork off.
        inversion_clock: of the inversion; None for the same.
        schedule: of the way back in the place of its clock, as in `wrap`: `Schedule.every(2, warmup=15)`.
        inversion_schedule: likewise of the inversion, whose first step is the one at the least noise. An `Inversion`
            of before has its steps and passes: none of the three is passed with it.
        injection: what is injected, and how long; None for `find_injection`'s choice; `Injection()` for nothing.
        region, adaptor: as in `wrap`, for both loops.
        console: where the progress bars go; None for standard error.

    Returns:
        The edited latents and the counts of both loops.

    Raises:
        ArgumentError: an option is outside its rule, the source or the conditions are not of the UNet's shape, or the
            injection names a module that the UNet has not; or an option of the inversion comes with an `Inversion`.
        RegionNotFoundError: nothing of the UNet can be skipped.

    Example:
        >>> from clockwork_hooks.demo import load_demo, render
        >>> from clockwork_hooks.demo.model import to_images, to_latents
        >>> from clockwork_hooks.demo.scenes import draw_scenes
        >>> demo, picture = load_demo(), render(draw_scenes(1, seed=4))
        >>> old, new = demo.encode_prompts(["a red circle", "a blue square"], guided=False).split(1)
        >>> options = {"target": new, "negative": old, "inversion_steps": 4, "steps": 4}
        >>> edited = edit(demo.unet, demo.scheduler("ddim"), to_latents(picture), old, **options)
        >>> to_images(edited.latents).shape, edited.passes.full_passes, f"{edited.saving:.0%}"
        (torch.Size([1, 3, 64, 64]), 2, '40%')

    Source: arXiv 2312.08128, Sec. 5.3 and App. D (τ_f = 0.8, τ_A = 0.5, identity adaptor, clock 2 in both loops).
    """
    check_unet(unet)
    check_clock(clock)
    check_clock(clock if inversion_clock is None else inversion_clock)
    if not is_number(guidance):
        raise ArgumentError("guidance is a finite number", seen={"guidance": repr(guidance)}, do="pass guidance=7.5")
    if injection is not None:
        injection.check(unet)
    latents, arguments = _source(unet, source, conditions)
    path = DDIMPath(scheduler, steps, latents.device)
    forth = 100 if inversion_steps is None else inversion_steps
    if isinstance(source, Inversion):
        _check_inverted(steps=inversion_steps, clock=inversion_clock, schedule=inversion_schedule)
    else:
        DDIMPath(scheduler, forth, latents.device)  # steps that are none are refused now
    rows = _rows(arguments, unet_arguments(negative, len(latents)), unet_arguments(target, len(latents)))
    if injection is None:  # before the inversion, which takes long: a UNet may have no place for any
        injection = find_injection(record(unet, (latents.to(dtype_of(unet)), path.times[0]), arguments))
    if not isinstance(source, Inversion):
        source = invert(
            unet,
            scheduler,
            source,
            arguments,
            steps=forth,
            clock=clock if inversion_clock is None else inversion_clock,
            schedule=inversion_schedule,
            region=region,
            adaptor=adaptor,
            console=console,
        )
    x = source.noise
    with (
        clocked(unet, steps, clock, schedule, region, adaptor) as cw,
        ProgressBar(console) as bar,
        injected(unet, injection) as inject,
    ):
        inject.silent = lambda: cw.pass_kind == "adaptor"
        task = bar.add_task("editing", total=steps)
        for k in range(steps):
            cw.step()
            inject.at(k / steps)
            outputs = predicted(cw, torch.cat([source.at(path.numbers[k]), x, x]), path.times[k], rows)
            _, away, wanted = outputs.chunk(ROWS)
            then = path.levels[k + 1] if k + 1 < steps else path.clean
            x = path.move(away + guidance * (wanted - away), x, path.levels[k], then)
            bar.advance(task)
    return Edit(x, source, counts(cw), injection)


def _source(
    unet: nn.Module, source: Tensor | Inversion, conditions: Conditions | None
) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and the arguments of the UNet's call that are the source's conditions."""
    if isinstance(source, Inversion) and conditions is None:
        return source.noise, dict(source.conditions)
    if isinstance(source, Inversion) or conditions is None:
        raise ArgumentError(
            "the source's conditions belong to the inversion: pass them with latents, and not with an Inversion",
            seen={"source": type(source).__name__, "conditions": type(conditions).__name__},
            do="pass conditions= with latents, or an Inversion without",
        )
    check_source(unet, source)
    return source, unet_arguments(conditions, len(source))


def _check_inverted(**options: object) -> None:
    given = {f"inversion_{name}": repr(value) for name, value in options.items() if value is not None}
    if given:
        raise ArgumentError(
            "an Inversion has its steps and passes already",
            seen=given,
            do="leave these out, or pass latents instead of the Inversion",
        )


def _rows(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of source, negative and target, their tensors one below the other."""
    first, *others = conditions
    if any(other.keys() != first.keys() for other in others):
        raise ArgumentError(
            "source, negative and target must have the same form",
            seen={"keys": [sorted(one) for one in conditions]},
            do="pass the same keyword arguments, or hidden states, for each",
        )
    shapes = [
        {path: shape(leaf.shape[1:]) for path, leaf in leaves(one) if isinstance(leaf, Tensor)} for one in conditions
    ]
    if any(other != shapes[0] for other in shapes):
        raise ArgumentError(
            "the tensors of source, negative and target must have the same shape, except for the rows",
            seen=dict(zip(("source", "negative", "target"), shapes, strict=True)),
            do="pad the texts to one length",
        )
    return {name: _stacked([one[name] for one in conditions]) for name in first}


def _stacked(values: list[Any]) -> Any:
    parts = [iter(tensors(value)) for value in values]
    return map_leaves(lambda leaf: torch.cat([next(p) for p in parts]) if isinstance(leaf, Tensor) else leaf, values[0])

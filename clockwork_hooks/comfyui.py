"""A ComfyUI node: a MODEL goes in, and a clone comes out whose low-resolution part runs on a slow clock.

`examples/comfyui/` is the folder for `custom_nodes`. ComfyUI hands over what this file needs, so nothing of ComfyUI is
imported, and the file can be read, type-checked and imported without it. Per sampling run: before the sampler begins,
Clockwork is put on the diffusion model that all clones share; it serves the calls of this clone alone; after the run it
is taken off. Whatever goes wrong with Clockwork itself costs full passes and one line in the log, never the picture.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.adaptors.stand_in import Adaptor, resolve_adaptor
from clockwork_hooks.clock.samplers import find_sampler
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.wrapper import ClockworkWrapper
from clockwork_hooks.errors import ArgumentError, ClockworkError, NoEffectWarning, SkippedModuleWarning
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.schedule import Schedule, check_clock

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "ClockworkNode", "Options", "Run", "evaluations_of"]

log = logging.getLogger("clockwork_hooks")

_KEY = "clockwork"  # of our wrappers in a model patcher
_NOTHING_TOLD = ("transformer_options",)  # what is in there steers Python; the node names the calls itself


# -- what the node's widgets say --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """What a user chooses on the node; checked when the node runs, before any picture begins.

    Attributes:
        clock: one full step every `clock` steps; 1 leaves the model as it is.
        start, end: of the sampling, from 0 to 1: outside of it every step is full. The clock begins to tick at `start`.
        schedule: in the place of a clock: numbers of the steps that use the adaptor, "2, 4, 5", or what
            `Schedule.parse` reads: "spread(2)", "every(3, first_full=2, last_full=1)", "adaptive(0.2)".
        region: empty for the one below the highest resolution, or words: "level 2", "share 0.5", "resolution 32",
            "cut paper"; several with commas.
        adaptor: empty for the feature of the step before, or the folder of a calibrated or trained one.

    Raises:
        ArgumentError: a value is outside its rule.

    Example:
        >>> options = Options(clock=3, region="level 2, cut paper")
        >>> options.choice.level, options.choice.cut
        (2, 'paper')
        >>> print(options.steps().preview(8))
        F A A F A A F A
    """

    clock: int = 2
    start: float = 0.0
    end: float = 1.0
    schedule: str = ""
    region: str = ""
    adaptor: str = ""

    def __post_init__(self) -> None:
        check_clock(self.clock)
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ArgumentError(
                "start and end are shares of the sampling, from 0 to 1, start first",
                seen={"start": self.start, "end": self.end},
                do="set start below end",
            )
        _ = self.choice, self.steps()

    @property
    def choice(self) -> Choice:
        """The region that the words mean."""
        return Choice(**dict(map(_option, filter(None, map(str.strip, self.region.split(","))))))

    @property
    def does_nothing(self) -> bool:
        """Is every step full, whatever the model?"""
        return self.steps().never_skips

    def steps(self, first: int = 1) -> Schedule:
        """Which steps use the adaptor, where the clock begins to tick at this one."""
        text = self.schedule.strip()
        if not text:
            return Schedule.every(self.clock, start=first)
        numbers = text.replace(",", " ").split()
        return Schedule.at(map(int, numbers)) if all(map(str.isdecimal, numbers)) else Schedule.parse(text)

    def load_adaptor(self) -> Adaptor:
        """The adaptor of the folder, or the identity.

        Raises:
            AdaptorError: there is none that can be loaded.
        """
        return resolve_adaptor(self.adaptor.strip() or None)


_WORDS: dict[str, Callable[[str], Any]] = {
    "level": int,
    "share": float,
    "resolution": int,
    "cut": str,
    "entry": str,
    "exit": str,
    "modules": str,
}


def _option(text: str) -> tuple[str, Any]:
    """("level", 2) from "level 2"."""
    name, _, value = text.replace("=", " ").partition(" ")
    try:
        return name, _WORDS[name](value.strip())
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            "a region is chosen by words: " + ", ".join(_WORDS),
            seen={"region": repr(text)},
            do='write "level 2", "share 0.5", or nothing for the region below the highest resolution',
        ) from error


# -- the evaluations of a step ----------

_NAMES = {"unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}  # of functions that are called otherwise than their samplers


def evaluations_of(sampler: str, sigmas: Sequence[float]) -> Iterator[int] | None:
    """How often a sampler evaluates the model in each of its steps; None for one that is not known.

    Args:
        sampler: its name, as ComfyUI and k-diffusion have it.
        sigmas: its noise levels, one more than steps.

    Returns:
        A number for each step, which may have no end; or None.

    Example:
        >>> list(evaluations_of("heun", [14.6, 2.3, 0.6, 0.0]))
        [2, 2, 1]
        >>> list(evaluations_of("dpm_fast", [14.6, 2.3, 1.2, 0.6, 0.2, 0.0]))
        [3, 2]
        >>> evaluations_of("my_own", [1.0, 0.0]) is None
        True
    """
    if sampler == "dpm_adaptive":
        return iter(lambda: 3, None)  # as many as its tolerance asks for
    if sampler == "sa_solver_pece":  # the second is at the same sigma
        return iter([1, *[2] * (len(sigmas) - 2)])
    evaluations = find_sampler(_NAMES.get(sampler, sampler))
    return None if evaluations is None else iter(evaluations.steps(sigmas))


def _name_of(sampler: Any) -> str:
    """The name of a ComfyUI sampler object."""
    function = getattr(sampler, "sampler_function", sampler)
    name = str(getattr(function, "__name__", type(function).__name__))
    return name.removeprefix("sample_").removesuffix("_function")


# -- a sampling run ----------


@dataclass(slots=True)
class Run:
    """One sampling run: which step and which evaluation of it the model is asked for, and what the calls are called.

    Args:
        options: of the node.
        sampler: its name.
        sigmas: noise levels, one more than steps; none where they are not known.
        window: highest and lowest sigma of the steps that may use the adaptor.
        each: is each evaluation a step of the clock, the first two of the run full? As `cw.sampler` has it.
        size: of the sampler's batch.

    Attributes:
        step: number of the sampler's step, from 1; 0 before the first.
        ticks: how many steps the clock has counted: the sampler's, or its evaluations.
        declared: are steps counted by the sampler's evaluations? Else the times of the calls tell.
        asked: has the sampler asked for an evaluation since its last callback?
    """

    options: Options
    sampler: str
    sigmas: Sequence[float]
    window: tuple[float, float]
    each: bool = False
    size: tuple[int, ...] = ()
    step: int = 0
    ticks: int = 0
    declared: bool = True
    asked: bool = False
    _left: int = 0
    _evaluation: int = 0
    _calls: Counter[Any] = field(default_factory=Counter)
    _pictures: int = 0
    _step_of: list[int] = field(default_factory=list)
    _evaluations: Iterator[int] | None = None
    _schedule: Schedule | None = None
    _steps: int | None = None
    _inside: bool = True

    def __post_init__(self) -> None:
        self._evaluations = evaluations_of(self.sampler, self.sigmas)
        self.declared = self._evaluations is not None
        self.each = self.each and self.declared
        if self.declared and self.sampler != "dpm_adaptive":
            counts = tuple(evaluations_of(self.sampler, self.sigmas) or ())
            self._steps = len(counts)
            self._step_of = [step for step, count in enumerate(counts, 1) for _ in range(count if self.each else 1)]
        first = next((step for step, sigma in enumerate(self.sigmas[:-1], 1) if self._within(sigma)), 1)
        if self.each:  # the clock ticks from the step's second evaluation on
            first = sum(step < first for step in self._step_of) + 2
        self._schedule = self.options.steps(first)

    @property
    def name(self) -> str:
        """Of its calls' trajectory, in whatever thread they are made."""
        return f"ComfyUI run {id(self)}"

    @property
    def gated(self) -> bool:
        """Are there steps that are full whatever the clock says?"""
        return self.options.start > 0 or self.options.end < 1

    @property
    def _listed(self) -> bool:
        """Does each step begin at the next of the noise levels?"""
        return self._steps == len(self.sigmas) - 1

    def _within(self, sigma: float) -> bool:
        high, low = self.window
        return not self.gated or low <= sigma <= high

    def uses_adaptor(self, tick: int) -> bool:
        """The schedule of the run: the clock's, within start and end."""
        total = len(self._step_of) or None
        if self._schedule is None or not self._schedule.skips(tick, total):
            return False
        if tick == self.ticks or not self.gated:
            return self._inside
        step = self._step_of[tick - 1] if tick <= len(self._step_of) else tick
        return not (self._listed and step <= len(self.sigmas)) or self._within(self.sigmas[step - 1])

    def evaluate(self, sigma: Callable[[], float], pictures: int = 0) -> bool:
        """The sampler asks for one evaluation: does a step of the clock begin with it?

        Args:
            sigma: of the evaluation.
            pictures: rows of the sampler's batch, each of which is a row for each condition; 0 where not known.
        """
        self.asked = True
        self._calls.clear()
        self._pictures = pictures
        self._evaluation += self.declared  # times tell steps: evaluations at one time are told by their order
        begins = self.declared and self._left == 0
        if begins:
            self.step, self._evaluation = self.step + 1, 0
            self._left = next(self._evaluations or iter(()), 1)
        self._left -= self.declared
        if self.gated and (begins or not self.declared):
            self._inside = self._within(self.sigmas[self.step - 1] if self._listed else sigma())
        ticks = begins or (self.each and self.declared)
        self.ticks += ticks
        self._evaluation = 0 if ticks else self._evaluation
        return ticks

    def was_answered(self, step: int) -> bool:
        """At the sampler's callback of this step, from 0: has another cache answered, so that nobody was asked?"""
        return not self.asked and self._left == 0 and self.step == step > 0

    def names(self, transformer_options: Any, x: Any, hooks: Any = None) -> tuple[str, list[str]]:
        """Names of the next call of the model, and of the rows of its batch: unlike all others of the step.

        A condition is told by its index, its uuid, its window, the patches of its call alone, and how strong its hooks
        are; one that comes more than once in an evaluation, as under guidance that calls the model again, by its number
        too. So the names are the same in each step, also where memory decides how many conditions are one batch.

        Args:
            transformer_options: of the call.
            x: its batch. ComfyUI's is chunks of the sampler's batch, one for each condition.
            hooks: ComfyUI's `HookGroup` of the call, whose keyframes change weights past their counters.

        Returns:
            The call's name, and its rows' names: none where they cannot be told (tiles, windows, no uuids).
        """
        options = transformer_options if isinstance(transformer_options, dict) else {}
        conds, uuids = options.get("cond_or_uncond"), options.get("uuids")
        told = isinstance(conds, list) and isinstance(uuids, list) and 0 < len(conds) == len(uuids)
        window = getattr(options.get("context_window"), "index_list", options.get("context_window"))
        strengths = [getattr(hook, "strength", None) for hook in getattr(hooks, "hooks", ())]
        where = f"{window} {_patches(options)} {strengths}"
        chunks = []
        for cond, uuid in zip(conds or (), uuids or (), strict=True) if told else [(conds, uuids)]:
            chunk = f"{self._evaluation} {cond} {uuid} {where}"
            self._calls[chunk] += 1
            chunks.append(f"{chunk} {self._calls[chunk]}")
        whole = isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == len(chunks) * self._pictures
        rows = chunks if told and whole and window is None else ()
        return " | ".join(chunks), [f"{chunk} {picture}" for chunk in rows for picture in range(self._pictures)]


def _patches(options: Mapping[str, Any]) -> str:
    """What is patched in a call of the model, and by what: by name, as some patches are made anew for each call."""
    texts = []
    for kinds in (options.get("patches"), options.get("patches_replace")):
        for kind, ones in kinds.items() if isinstance(kinds, Mapping) else ():
            places = ones.items() if isinstance(ones, Mapping) else enumerate(ones) if isinstance(ones, list) else ()
            texts += [f"{kind} {at} {getattr(one, '__qualname__', type(one).__qualname__)}" for at, one in places]
    return " ".join(sorted(texts))


class Clockwork:
    """What the node puts into a clone: ComfyUI's wrappers around a run, an evaluation and a call of the model.

    One object serves a clone and the clones made of it. It keeps what was learned of the model's calls, so that only
    the first run with a size of picture records them.

    Args:
        options: of the node.
        adaptor: stands in for the region.
    """

    def __init__(self, options: Options, adaptor: Adaptor | None = None) -> None:
        self.options, self.adaptor = options, adaptor
        self.wrapper: ClockworkWrapper | None = None
        self._run: Run | None = None
        self._messages: set[str] = set()
        self._given_up: set[tuple[int, ...]] = set()  # sizes at which Clockwork cannot serve this model

    def put_into(self, patcher: Any) -> Any:
        """A clone of the model patcher that samples with Clockwork; the patcher itself stays as it is.

        Args:
            patcher: ComfyUI's `ModelPatcher`.
        """
        clone = patcher.clone()
        wrappers = {"sampler_sample": self.sample, "predict_noise": self.predict_noise, "apply_model": self.apply_model}
        for kind, around in wrappers.items():  # the names are those of comfy.patcher_extension.WrappersMP
            clone.remove_wrappers_with_key(kind, _KEY)
            clone.add_wrapper_with_key(kind, _KEY, around)
        return clone

    # -- ComfyUI's wrappers ----------------------------------------------------------------------------------------

    def sample(
        self, executor: Any, guider: Any, sigmas: Any, extra: Any, callback: Any, *rest: Any, **options: Any
    ) -> Any:
        """A sampler runs, its models are loaded: put Clockwork on the diffusion model, and take it off afterwards."""
        patcher = guider.model_patcher
        outer, wrapper = self._run, None
        self._run = self._begin(patcher, executor.class_obj, sigmas, rest[0] if rest else None)
        try:
            with warnings.catch_warnings():
                for kind in (NoEffectWarning, SkippedModuleWarning):  # the line at the end says how many were skipped
                    warnings.simplefilter("ignore", kind)
                wrapper = self._attach(patcher.model.diffusion_model, self._run.size)
                if wrapper is None:
                    return executor(guider, sigmas, extra, callback, *rest, **options)
                with wrapper.trajectory(self._run.name), wrapper.serving(False):  # other clones call the same model
                    return executor(guider, sigmas, extra, self._checked(callback), *rest, **options)
        finally:
            self._run = outer
            if wrapper is not None and outer is None:
                self._tell(wrapper)
                wrapper.remove()

    def predict_noise(self, executor: Any, x: Any, timestep: Any, *rest: Any, **options: Any) -> Any:
        """The sampler asks for one evaluation of the model: perhaps a step begins."""
        self._evaluate(lambda: float(timestep.max()), x.shape[0] if isinstance(x, Tensor) and x.ndim else 0)
        return executor(x, timestep, *rest, **options)

    def apply_model(self, executor: Any, *args: Any, **options: Any) -> Any:
        """One call of the model, of this clone: let Clockwork serve it; in full, if it cannot."""
        run, wrapper = self._run, self.wrapper
        own = wrapper is not None and getattr(executor.class_obj, "diffusion_model", None) is wrapper.unet
        if run is None or wrapper is None or not wrapper.attached or not own:  # or another GPU's copy of the model
            return executor(*args, **options)
        model_options = options.get("transformer_options", args[5] if len(args) > 5 else args[-1] if args else None)
        hooks = getattr(getattr(executor.class_obj, "current_patcher", None), "current_hooks", None)
        name, rows = run.names(model_options, args[0] if args else None, hooks)
        named = wrapper.rows(rows, exact=False) if rows else nullcontext()
        try:
            with wrapper.trajectory(run.name), wrapper.branch(name), named, wrapper.serving():  # in whatever thread
                return executor(*args, **options)
        except Exception as error:
            if wrapper.attached and not _is_ours(error):  # the model's own error, or an interrupt
                raise
            wrapper.remove()
            if isinstance(error, ClockworkError):  # it would be the same in each run
                self._given_up.add(run.size)
            self._log_once(f"every step is full: {error}")
            return executor(*args, **options)

    # -- the model --------------------------------------------------------------------------------------------------

    def _begin(self, patcher: Any, sampler: Any, sigmas: Any, batch: Any) -> Run:
        sampling = patcher.get_model_object("model_sampling")
        high, low = (float(sampling.percent_to_sigma(share)) for share in (self.options.start, self.options.end))
        name = _name_of(sampler)
        evaluations = find_sampler(_NAMES.get(name, name))
        plain = self.options.steps().is_clock and not (self.adaptor and stand_in.schedules_of(self.adaptor)[0])
        each = plain and evaluations is not None and evaluations.each
        size = tuple(batch.shape) if isinstance(batch, Tensor) else ()
        return Run(self.options, name, [float(sigma) for sigma in sigmas.tolist()], (high, low), each, size)

    def _attach(self, unet: nn.Module, size: tuple[int, ...]) -> ClockworkWrapper | None:
        """Put Clockwork on the diffusion model; None, with one line in the log, where it cannot be."""
        try:
            if self.wrapper is not None and self.wrapper.unet is not unet:  # another checkpoint in the same clone
                self.wrapper.remove()
                self.wrapper = None
                self._given_up.clear()
            if size in self._given_up:
                return None
            if self.wrapper is None:
                steps = self.options.steps()
                self.wrapper = wrap(
                    unet,
                    self.adaptor,
                    schedule=Schedule(self._uses_adaptor, str(steps), steps.threshold, steps.longest),
                    region=self.options.choice,
                    ignore=_NOTHING_TOLD,
                )
            elif not self.wrapper.attached:
                self.wrapper.attach()
            self.wrapper.stats.clear()
        except Exception as error:
            self._log_once(f"every step is full: {error}")
            return None
        return self.wrapper

    def _evaluate(self, sigma: Callable[[], float], pictures: int = 0) -> None:
        run = self._run
        if run is not None and run.evaluate(sigma, pictures) and self.wrapper is not None:
            self.wrapper.step(ordered=not run.each)

    def _checked(self, callback: Any) -> Any:
        """ComfyUI's callback, once a step; where it comes at other evaluations than foretold, the times tell steps.

        Where nothing was asked for in the step (LazyCache answers whole evaluations), nothing may serve the next one.
        """
        run, wrapper = self._run, self.wrapper

        def checked(step: int, *rest: Any) -> Any:
            if run is not None and wrapper is not None:
                if run.declared and run.was_answered(step):
                    self._evaluate(lambda: run.sigmas[step])
                if run.declared and run.step != step + 1:
                    run.declared = False
                    wrapper.reset()
                    self._log_once(
                        f"{run.sampler} evaluates the model in another way than foretold: times tell its steps"
                    )
                elif not run.declared and not run.asked:
                    wrapper.reset()
                run.asked = False
            return None if callback is None else callback(step, *rest)

        return checked

    def _uses_adaptor(self, step: int) -> bool:
        return self._run is not None and self._run.uses_adaptor(step)

    def _tell(self, wrapper: ClockworkWrapper) -> None:
        stats = wrapper.stats
        why = "" if stats.adaptor_passes else "; full because: " + ", ".join(stats.reasons)
        if stats.full_passes:
            log.info(
                "Clockwork: %d full, %d adaptor passes, %.0f%% of the MACs saved%s",
                stats.full_passes,
                stats.adaptor_passes,
                100 * stats.saving,
                why,
            )

    def _log_once(self, line: str) -> None:
        if line not in self._messages:
            self._messages.add(line)
            log.warning("Clockwork: %s", line)


def _is_ours(error: Exception) -> bool:
    """Is it an error of Clockwork, or has an adaptor raised it?"""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return isinstance(error, ClockworkError) or stand_in.call.__code__ in codes


# -- the node ----------


class ClockworkNode:
    """The node, as ComfyUI asks for it."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = (
        "Runs the low-resolution part of the UNet only every few steps (Clockwork Diffusion, arXiv 2312.08128)."
    )
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("A clone of the model that samples with Clockwork.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's widgets."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to sample with; it stays as it is."}),
                "clock": ("INT", {"default": 2, "min": 1, "max": 16, "tooltip": "One full step every so many steps."}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": "Before it every step is full."}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "After it every step is full."}),
            },
            "optional": {
                "schedule": (
                    "STRING",
                    {"default": "", "tooltip": "In place of the clock: spread(2), or steps: 2, 4, 6"},
                ),
                "region": ("STRING", {"default": "", "tooltip": "What to skip: level 2, share 0.5, resolution 32"}),
                "adaptor": ("STRING", {"default": "", "tooltip": "Folder of a calibrated or trained adaptor."}),
            },
        }

    def apply(
        self,
        model: Any,
        clock: int = 2,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        schedule: str = "",
        region: str = "",
        adaptor: str = "",
    ) -> tuple[Any]:
        """A clone of the model with Clockwork in it.

        Args:
            model: ComfyUI's `ModelPatcher`.
            clock, start_percent, end_percent, schedule, region, adaptor: see `Options`; without a schedule, an adaptor
                brings the one that it was made for.

        Raises:
            ArgumentError: a value is outside its rule.
            AdaptorError: the adaptor cannot be loaded.
        """
        options = Options(clock, start_percent, end_percent, schedule, region, adaptor)
        loaded = options.load_adaptor()
        own, _ = stand_in.schedule_of(loaded)
        if own is not None and not schedule.strip():
            options = replace(options, schedule=str(own))
        return (model if options.does_nothing else Clockwork(options, loaded).put_into(model),)


NODE_CLASS_MAPPINGS = {"ClockworkHooks": ClockworkNode}
NODE_DISPLAY_NAME_MAPPINGS = {"ClockworkHooks": "Clockwork (faster UNet)"}

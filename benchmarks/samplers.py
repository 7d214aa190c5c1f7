"""Which passes does each scheduler of diffusers get at clock 2? Writes the table of docs/samplers.md.

    python -m benchmarks.samplers            # measure, and write the table
    python -m benchmarks.samplers --check    # exit with 1 if the table in docs/ is another one

The UNet has the demo model's architecture and inputs, narrower, with random weights: patterns of passes do not depend
on them. Each scheduler takes eight denoising steps in a plain loop: under `wrap`, under `wrap_pipeline`, and with
`cw.step()` before each step.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.demo.model import new_unet
from clockwork_hooks.diffusers import wrap_pipeline
from clockwork_hooks.reports.tables import Table, table

STEPS, CLOCK = 8, 2
SHAPE, TEXT = (1, 12, 8, 8), (1, 18, 128)
PAGE = Path(__file__).parents[1] / "docs" / "samplers.md"
MARKS = ("<!-- table: python -m benchmarks.samplers -->", "<!-- end of table -->")

Model = Callable[[Tensor, Any], Tensor]
Loop = Callable[[Model, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How a scheduler is run.

    Attributes:
        name: in the table.
        kind: class name in diffusers.
        options: of the scheduler.
        evaluations: of each denoising step, by the solver's definition.
        loop: (model, scheduler, noise) → sample.
        restarts: denoising steps that begin a trajectory of their own.
        note: what there is to know.
        undeclared: why the passes of a plain `wrap` are others; empty where they are not.
        by_time: its times are no entries of a scheduler's list, so `wrap_pipeline` does not see its steps.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: tuple[int, ...] = (1,) * STEPS
    loop: Loop | None = None
    restarts: tuple[int, ...] = ()
    note: str = ""
    undeclared: str = ""
    by_time: bool = False

    def scheduler(self) -> Any:
        import diffusers

        return getattr(diffusers, self.kind)(**self.options)

    def run(self, model: Model, scheduler: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
        """One trajectory, the same every time."""
        torch.manual_seed(0)
        with torch.no_grad():
            return (self.loop or plain_loop)(model, scheduler, torch.randn(shape))

    def told(self, model: Model, begin: Callable[[], None]) -> Model:
        """The model, with `begin` called before the first evaluation of each denoising step."""
        firsts = {0, *itertools.accumulate(self.evaluations)}
        numbers = itertools.count()

        def told(sample: Tensor, t: Any) -> Tensor:
            if next(numbers) in firsts:
                begin()
            return model(sample, t)

        return told

    def expected(self) -> str:
        """The schedule's passes, a group of letters for each denoising step."""
        groups, since, before = [], 0, 0
        for step, count in enumerate(self.evaluations):
            since = 0 if step in self.restarts else since
            full = since % CLOCK == 0
            groups.append("F" * count if full else "A" * min(count, before) + "F" * max(0, count - before))
            since, before = since + 1, count
        return " ".join(groups)


# -- loops --------------------------------------------------------------------------------------------------------


def plain_loop(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """What every pipeline does."""
    scheduler.set_timesteps(STEPS)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # those of flow models have none
    for t in scheduler.timesteps:
        sample = scheduler.step(model(scale(sample, t), t), t, sample).prev_sample
    return sample


def scm(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """More than its two steps."""
    scheduler.set_timesteps(STEPS, intermediate_timesteps=None)
    for t in scheduler.timesteps[:-1]:
        sample = scheduler.step(model(sample, t), t, sample).prev_sample
    return sample


def wuerstchen(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """Times from 1 to 0, a row of them, the last one left out."""
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[:-1]:
        ratio = t.expand(len(sample))
        sample = scheduler.step(model(sample, ratio), ratio, sample).prev_sample
    return sample


def cogvideox_dpm(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS)
    before, last = None, None
    for t in scheduler.timesteps:
        made = scheduler.step(model(sample, t), before, t, last, sample, return_dict=False)
        (sample, before), last = made, t
    return sample


def repaint(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """Four steps down, two up again with noise, as RePaintPipeline does it."""
    scheduler.set_timesteps(STEPS, jump_length=2, jump_n_sample=2)
    image, mask, last = torch.zeros_like(sample), torch.zeros_like(sample), scheduler.timesteps[0] + 1
    mask[..., : sample.shape[-1] // 2] = 1  # the half that is known
    for t in scheduler.timesteps:
        if t < last:
            sample = scheduler.step(model(sample, t), t, sample, image, mask).prev_sample
        else:
            sample = scheduler.undo_step(sample, last)
        last = t
    return sample


def karras_ve(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """EDM's stochastic sampler: noise is added before each step, a Heun correction follows."""
    scheduler.set_timesteps(STEPS)
    sample = sample * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sigma = scheduler.schedule[t]
        then = scheduler.schedule[t - 1] if t > 0 else torch.zeros(())
        noisy, sigma_hat = scheduler.add_noise_to_input(sample, sigma)
        output = (sigma_hat / 2) * model((noisy + 1) / 2, sigma_hat / 2)
        made = scheduler.step(output, sigma_hat, then, noisy)
        if then != 0:
            output = (then / 2) * model((made.prev_sample + 1) / 2, then / 2)
            made = scheduler.step_correct(output, sigma_hat, then, noisy, made.prev_sample, made.derivative)
        sample = made.prev_sample
    return sample


def score_sde(model: Model, scheduler: Any, sample: Tensor) -> Tensor:
    """A corrector and a predictor at each noise level, as ScoreSdeVePipeline does it."""
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    sample = sample * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k] * torch.ones(len(sample))
        for _ in range(scheduler.config.correct_steps):
            sample = scheduler.step_correct(model(sample, sigma), sample).prev_sample
        sample = scheduler.step_pred(model(sample, sigma), t, sample).prev_sample
    return sample


# -- schedulers ---------------------------------------------------------------------------------------------------

TWICE = (*(2,) * (STEPS - 1), 1)
BETWEEN = "evaluates between the steps' times: each evaluation looks like a step"
NEXT = "a step's second evaluation has the time of the next step's first, and counts as one of that step"
SINGLE = "an evaluation between the steps' times looks like a step"
REGULAR = "a corrector and a predictor at one time: known to be regular from the third step on"
FLOW = "made for flow models, which the demo model is none of"

SPECIAL: dict[str, tuple[Sampler, ...]] = {
    "HeunDiscreteScheduler": (Sampler("Heun", "HeunDiscreteScheduler", evaluations=TWICE, undeclared=NEXT),),
    "FlowMatchHeunDiscreteScheduler": (
        Sampler("FlowMatchHeun", "FlowMatchHeunDiscreteScheduler", evaluations=TWICE, undeclared=NEXT, note=FLOW),
    ),
    "KDPM2DiscreteScheduler": (Sampler("KDPM2", "KDPM2DiscreteScheduler", evaluations=TWICE, undeclared=BETWEEN),),
    "KDPM2AncestralDiscreteScheduler": (
        Sampler("KDPM2Ancestral", "KDPM2AncestralDiscreteScheduler", evaluations=TWICE, undeclared=BETWEEN),
    ),
    "DPMSolverSDEScheduler": (
        Sampler(
            "DPMSolverSDE", "DPMSolverSDEScheduler", {"noise_sampler_seed": 0}, evaluations=TWICE, undeclared=BETWEEN
        ),
    ),
    "DPMSolverSinglestepScheduler": (
        Sampler(
            "DPMSolverSinglestep, order 2",
            "DPMSolverSinglestepScheduler",
            {"solver_order": 2, "lower_order_final": True},
            evaluations=(2, 2, 2, 1, 1),
            undeclared=SINGLE,
            note="its eight evaluations are five steps",
        ),
        Sampler(
            "DPMSolverSinglestep, order 3",
            "DPMSolverSinglestepScheduler",
            {"solver_order": 3, "lower_order_final": True},
            evaluations=(3, 3, 1, 1),
            undeclared=SINGLE,
            note="its eight evaluations are four steps",
        ),
    ),
    "PNDMScheduler": (
        Sampler(
            "PNDM, skip_prk_steps",
            "PNDMScheduler",
            {"skip_prk_steps": True},
            evaluations=(2, *(1,) * (STEPS - 1)),
            undeclared="the time of the first step's second evaluation is that of the second step",
        ),
        Sampler(
            "PNDM, Runge-Kutta warm-up",
            "PNDMScheduler",
            evaluations=(4, 4, 4, *(1,) * (STEPS - 3)),
            undeclared="its warm-up evaluates between the steps' times",
        ),
    ),
    "DDPMWuerstchenScheduler": (Sampler("DDPMWuerstchen", "DDPMWuerstchenScheduler", loop=wuerstchen),),
    "CogVideoXDPMScheduler": (Sampler("CogVideoXDPM", "CogVideoXDPMScheduler", loop=cogvideox_dpm),),
    "RePaintScheduler": (
        Sampler(
            "RePaint",
            "RePaintScheduler",
            evaluations=(1,) * 14,
            restarts=(2, 6, 10),
            loop=repaint,
            note="where noise was added again the schedule begins anew: the features before belong to less noise",
        ),
    ),
    "KarrasVeScheduler": (
        Sampler(
            "KarrasVe",
            "KarrasVeScheduler",
            evaluations=TWICE,
            loop=karras_ve,
            undeclared="adds noise before each step, so times go up and down: each evaluation looks like a trajectory",
            by_time=True,
        ),
    ),
    "ScoreSdeVeScheduler": (
        Sampler(
            "ScoreSdeVe",
            "ScoreSdeVeScheduler",
            evaluations=(2,) * STEPS,
            loop=score_sde,
            undeclared=REGULAR,
            by_time=True,
        ),
    ),
    "EulerDiscreteScheduler": (
        Sampler("EulerDiscrete", "EulerDiscreteScheduler"),
        Sampler("EulerDiscrete, Karras sigmas", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ),
    "DPMSolverMultistepScheduler": (
        Sampler("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        Sampler(
            "DPMSolverMultistep, Karras sigmas, SDE",
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        ),
    ),
    "SCMScheduler": (Sampler("SCM", "SCMScheduler", loop=scm),),
    "MiniMaxH3Scheduler": (Sampler("MiniMaxH3", "MiniMaxH3Scheduler", evaluations=(1,) * (STEPS - 1), note=FLOW),),
}

TOKENS = "denoises tokens, not numbers"
UNFIT = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "VQDiffusionScheduler": TOKENS,
    "HeliosScheduler": "changes the resolution of a video between stages",
    "HeliosDMDScheduler": "changes the resolution of a video between stages",
    "PiflowScheduler": "its model returns a policy for many steps, not one velocity",
    "RFD4ProteinaScheduler": "moves the atoms of proteins",
}


def scheduler_names() -> list[str]:
    """Every scheduler class that diffusers exports."""
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    return [name for name in names if isinstance(getattr(diffusers, name), type)]


def samplers() -> Iterator[Sampler]:
    """Each way of running each scheduler that fits the UNet."""
    for name in scheduler_names():
        short = name.removesuffix("Scheduler").removesuffix("Discrete")
        if name not in UNFIT:
            flow = FLOW if name.startswith(("FlowMatch", "FlowMap", "LTX")) else ""
            yield from SPECIAL.get(name, (Sampler(short, name, note=flow),))


# -- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What a sampler's passes were.

    Attributes:
        sampler: which.
        plain: letters of the passes under `wrap`, grouped by denoising step.
        pipeline: the same under `wrap_pipeline`.
        declared: the same under `wrap`, with `cw.step()` before each denoising step.
    """

    sampler: Sampler
    plain: str
    pipeline: str
    declared: str


def small_unet() -> Any:
    """The demo's architecture, a quarter as wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_unet(sample_size=SHAPE[-1], block_out_channels=(8, 32, 32), norm_num_groups=8).eval()


def as_model(unet: Any, seen: list[str] | None = None, cw: Any = None) -> Model:
    """The UNet with its text; notes the kind of each pass."""
    text = torch.randn(TEXT, generator=torch.Generator().manual_seed(1))

    def model(sample: Tensor, t: Any) -> Tensor:
        before = cw.stats.adaptor_passes if cw is not None else 0
        output: Tensor = unet(sample, t, encoder_hidden_states=text).sample
        if seen is not None and cw is not None:
            seen.append("A" if cw.stats.adaptor_passes > before else "F")
        return output

    return model


def grouped(letters: Sequence[str], evaluations: Sequence[int]) -> str:
    left = iter(letters)
    groups = ["".join(next(left, "?") for _ in range(count)) for count in evaluations]
    return " ".join([*groups, *(f"{letter}?" for letter in left)])


def measure(unet: Any, sampler: Sampler) -> Row:
    """Run a sampler under `wrap`, under `wrap_pipeline`, and with its steps declared by hand."""
    found = {}
    for way in ("plain", "pipeline", "declared"):
        seen: list[str] = []
        pipe = SimpleNamespace(unet=unet, scheduler=sampler.scheduler())
        with (
            wrap_pipeline(pipe, schedule=ch.Schedule.every(CLOCK))
            if way == "pipeline"
            else ch.wrap(unet, clock=CLOCK) as cw
        ):
            model = as_model(unet, seen, cw.wrappers["unet"] if way == "pipeline" else cw)
            sampler.run(sampler.told(model, cw.step) if way == "declared" else model, pipe.scheduler)
        found[way] = grouped(seen, sampler.evaluations)
    return Row(sampler, **found)


def rows() -> list[Row]:
    unet = small_unet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' deprecations, numpy's
        return [measure(unet, sampler) for sampler in samplers()]


def as_scheduled(row: Row) -> bool:
    """One evaluation a step, the passes of the schedule in all three ways, and no note: it needs no row."""
    sampler = row.sampler
    if sampler.evaluations != (1,) * STEPS or sampler.note or sampler.undeclared or sampler.by_time:
        return False
    return {row.plain, row.pipeline, row.declared} == {sampler.expected()}


def ordinary(found: Sequence[Row]) -> str:
    """The sentence that names those without a row."""
    names = ", ".join(row.sampler.name for row in found if as_scheduled(row))
    patterns = {row.sampler.expected() for row in found if as_scheduled(row)}
    return f"`{patterns.pop()}` in all three ways: {names}."


def to_table(found: Sequence[Row]) -> Table:
    """One row for each sampler that needs one, then those that do not fit."""
    cells = []
    for row in (row for row in found if not as_scheduled(row)):
        expected = row.sampler.expected()
        made = ["the same" if one == expected else one for one in (row.plain, row.pipeline, row.declared)]
        why = row.sampler.undeclared and f"`wrap`: {row.sampler.undeclared}"
        declare = "its times are no items of a list: declare its steps" if row.sampler.by_time else ""
        notes = [why, declare, row.sampler.note]
        cells.append((row.sampler.name, expected, *made, "; ".join(note for note in notes if note)))
    unfit = [(name, why) for name, why in UNFIT.items() if name in scheduler_names()]
    cells += [(name.removesuffix("Scheduler"), "–", "–", "–", "–", f"does not fit: {why}") for name, why in unfit]
    heads = ("scheduler", "passes of the schedule", "`wrap`", "`wrap_pipeline`", "`cw.step()`", "note")
    return table(f"{STEPS} steps at clock {CLOCK}: F a full pass, A an adaptor pass", heads, cells, notes=(version(),))


def version() -> str:
    """What the table was measured with."""
    import diffusers

    return f"diffusers {diffusers.__version__}."


def page(text: str, found: Sequence[Row]) -> str:
    """The page with the table between its marks."""
    head, _, rest = text.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    return f"{head}{MARKS[0]}\n{ordinary(found)}\n\n{to_table(found).to_markdown()}\n{MARKS[1]}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page would change")
    options = parser.parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    after = page(before, rows())
    if not options.check:
        PAGE.write_text(after, encoding="utf-8")
    return int(options.check and before != after)


if __name__ == "__main__":
    sys.exit(main())

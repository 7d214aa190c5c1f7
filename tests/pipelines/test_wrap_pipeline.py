"""`wrap_pipeline`: every UNet of a pipeline under one handle, and steps as the pipeline's own solver counts them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SkipLayerGuidance, StableDiffusionXLAutoBlocks
from diffusers.hooks import LayerSkipConfig
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.diffusers import wrap_pipeline
from tests.oracle import Judge
from tests.pipelines import parts
from tests.pipelines.oracle import every, letters, replay
from tests.small_unet import Tiny
from tests.snapshot import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy on tensors, in diffusers

EXIT = "up_blocks.0"
TEXT = {"prompt": "a red cat", "height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}
EDIT = {"prompt": "a red cat", "guidance_scale": 3.0, "output_type": "latent"}


def run(pipe: Any, steps: int = 6, **options: Any) -> Tensor:
    pictures = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **({**TEXT, **options}))
    return torch.as_tensor(pictures.images)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return parts.text_to_image()


def counts(passes: Sequence[tuple[str, int]]) -> tuple[int, int]:
    return letters(passes).count("F"), letters(passes).count("A")


SOLVERS = {
    "HeunDiscreteScheduler": [2, 2, 2, 2, 2, 1],
    "KDPM2DiscreteScheduler": [2, 2, 2, 2, 2, 1],
    "DPMSolverSinglestepScheduler": [2, 2, 1, 1],
    "PNDMScheduler": [2, 1, 1, 1, 1, 1],
    "EulerDiscreteScheduler": [1] * 6,
}
OPTIONS = {"DPMSolverSinglestepScheduler": {"lower_order_final": True}, "PNDMScheduler": {"skip_prk_steps": True}}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("kind", SOLVERS)
def test_a_step_is_the_solvers(pipe: Any, kind: str) -> None:
    """Both ways round: the scheduler was there, or comes later; it stays untouched."""
    before, scheduler = pipe.scheduler, parts.scheduler(kind, **OPTIONS.get(kind, {}))
    passes = every(2, SOLVERS[kind])
    with wrap_pipeline(pipe) as cw:
        run(pipe)
        cw.wrappers["unet"].stats.clear()
        pipe.scheduler = scheduler
        pictures = run(pipe)
        assert torch.equal(run(pipe), pictures)
        stats = cw.wrappers["unet"].stats
        assert (stats.full_passes, stats.adaptor_passes) == tuple(2 * count for count in counts(passes)), cw.report()
        assert set(stats.reasons) == {"first step", "scheduled"}
    assert type(scheduler).step is getattr(scheduler.step, "__func__", None)
    assert not any(callable(value) for value in vars(scheduler).values() if not isinstance(value, torch.Tensor))
    expected = replay(pipe.unet, EXIT, passes, lambda: run(pipe))
    pipe.scheduler = before
    assert torch.equal(pictures, expected)


def test_img2img_may_enter_a_singlestep_solver_in_the_middle_of_a_step() -> None:
    """Of orders 1 2 1 2 1 1 the last five remain; the solver then begins with two steps of one evaluation."""
    scheduler = parts.scheduler("DPMSolverSinglestepScheduler", lower_order_final=True)
    pipe = parts.text_to_image("StableDiffusionImg2ImgPipeline", scheduler=scheduler)
    options = {**EDIT, "image": parts.picture(size=16), "strength": 0.85, "height": None, "width": None}
    options = {name: value for name, value in options.items() if value is not None}

    def once() -> Tensor:
        pictures: Tensor = pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(0), **options).images
        return pictures

    expected = replay(pipe.unet, EXIT, every(2, [1, 2, 1, 1]), once)
    with wrap_pipeline(pipe) as cw:
        assert torch.equal(once(), expected)
        assert cw.wrappers["unet"].stats.adaptor_passes == 2, cw.report()  # the second of two has nothing before it


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize(
    ("skip_prk_steps", "steps", "strength", "evaluations"),
    [(True, 8, 0.75, [2, 1, 1, 1, 1, 1]), (False, 8, 0.8, [4, 4, 4, 1, 1, 1]), (False, 9, 0.5, [4, 4, 4, 1])],
)
def test_pndm_warms_up_wherever_in_its_list_it_begins(
    skip_prk_steps: bool, steps: int, strength: float, evaluations: list[int]
) -> None:
    """The number of steps is right, so the last one is full, as `last_full` says."""
    scheduler = parts.scheduler("PNDMScheduler", skip_prk_steps=skip_prk_steps, steps_offset=1)
    pipe = parts.text_to_image("StableDiffusionImg2ImgPipeline", scheduler=scheduler)

    def once() -> Tensor:
        inputs = {**EDIT, "image": parts.picture(size=16), "strength": strength, "num_inference_steps": steps}
        pictures: Tensor = pipe(generator=torch.Generator().manual_seed(0), **inputs).images
        return pictures

    passes = every(2, evaluations)
    passes[-1] = ("F", passes[-1][1])
    expected = replay(pipe.unet, EXIT, passes, once)
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2, last_full=1)) as cw:
        assert torch.equal(once(), expected)
        stats = cw.wrappers["unet"].stats
        assert (stats.full_passes, stats.adaptor_passes) == counts(passes), cw.report()


def test_the_unets_place_in_the_pipeline_does_not_matter(pipe: Any) -> None:
    unet = pipe.unet
    with wrap_pipeline(pipe) as cw:
        expected = run(pipe)
        pipe.unet = cw.wrappers["unet"]
        try:
            assert torch.equal(run(pipe), expected)
        finally:
            pipe.unet = unet


def test_aborted_runs_and_other_lengths_leave_nothing(pipe: Any) -> None:
    before, pipe.scheduler = pipe.scheduler, parts.scheduler("HeunDiscreteScheduler")
    try:
        expected = {
            steps: replay(pipe.unet, EXIT, every(2, [2] * (steps - 1) + [1]), lambda n=steps: run(pipe, n))
            for steps in (4, 6)
        }

        def stop(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
            if step == 2:
                raise KeyboardInterrupt
            return kwargs

        with wrap_pipeline(pipe):
            for steps in (6, 4, 6):
                assert torch.equal(run(pipe, steps), expected[steps])
                with pytest.raises(KeyboardInterrupt):
                    run(pipe, callback_on_step_end=stop)
    finally:
        pipe.scheduler = before


def test_a_run_goes_on_though_its_scheduler_is_exchanged_in_the_middle(pipe: Any) -> None:
    """The loop goes on with the old one's times, which name its steps as before."""
    before = pipe.scheduler

    def swap(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        if step == 1:
            pipe.scheduler = parts.scheduler(steps_offset=1)
            pipe.scheduler.set_timesteps(3)
        return kwargs

    seen: list[str] = []
    with wrap_pipeline(pipe) as cw:
        stats = cw.wrappers["unet"].stats

        def note(*_: Any) -> None:
            seen.append("FA"[stats.adaptor_passes > seen.count("A")])

        handle = pipe.unet.register_forward_hook(note)
        run(pipe, callback_on_step_end=swap)
        handle.remove()
        pipe.scheduler = before
        again = run(pipe)
    assert "".join(seen) == "FAFAFA"
    with wrap_pipeline(pipe):
        assert torch.equal(run(pipe), again)


# -- pipelines that share a UNet ----------------------------------------------------------------------------------


def test_pipelines_that_share_the_unet_are_followed(pipe: Any) -> None:
    """Image to image begins within its own scheduler's list, of a solver with two evaluations a step."""
    other = parts.text_to_image(
        "StableDiffusionImg2ImgPipeline", scheduler=parts.scheduler("HeunDiscreteScheduler", steps_offset=1)
    )
    other.unet = pipe.unet
    options = {**EDIT, "image": parts.picture(size=16), "strength": 0.7}

    def edit() -> Tensor:
        pictures: Tensor = other(num_inference_steps=6, generator=torch.Generator().manual_seed(0), **options).images
        return pictures

    passes = every(2, [2, 2, 2, 1])
    expected, wanted = (
        replay(pipe.unet, EXIT, passes, edit),
        replay(pipe.unet, EXIT, every(2, [1] * 6), lambda: run(pipe)),
    )
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        assert cw.follow(other) is cw.follow(other, pipe) is cw
        for _ in range(2):
            assert torch.equal(edit(), expected)
            assert torch.equal(run(pipe), wanted)
        assert set(cw.wrappers["unet"].stats.reasons) == {"first step", "scheduled"}
        with pytest.raises(ch.ArgumentError, match="shares a wrapped UNet"):
            cw.follow(parts.text_to_image())


def test_on_and_off(pipe: Any) -> None:
    plain = run(pipe)
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        clocked = run(pipe)
        assert cw.enabled
        cw.enabled = False
        assert not cw.enabled
        assert torch.equal(run(pipe), plain)
        cw.enabled = True
        assert torch.equal(run(pipe), clocked)


def test_what_each_unet_has_is_asked_of_its_wrapper(pipe: Any) -> None:
    with wrap_pipeline(pipe) as cw:
        with pytest.raises(AttributeError, match=r'its own stats; write: cw.wrappers\["unet"\].stats'):
            cw.stats  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'statistics'"):
            cw.statistics  # noqa: B018
        assert not hasattr(copy.copy(cw), "stats")


def test_all_unets_are_compiled(pipe: Any) -> None:
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        eager = run(pipe)
        assert cw.compile(backend="eager") is cw
        assert torch.equal(run(pipe), eager)
        assert torch.equal(run(pipe), eager)
        with pytest.raises(ch.ArgumentError, match="a mode is one of"):
            cw.compile("no such mode")


# -- own loops ----------------------------------------------------------------------------------------------------


def holder(kind: str) -> Any:
    return SimpleNamespace(model=UNetOfMine(), scheduler=parts.scheduler(kind))


class UNetOfMine(Tiny):
    """Found by its class name, as diffusers' are."""


def loop(pipe: Any, *, steps: int = 5, between: Any = None, declare: Any = None) -> Tensor:
    """Guidance in two calls per evaluation."""
    generator = torch.Generator().manual_seed(0)
    sample, texts = torch.randn(1, 2, 8, 8, generator=generator), (torch.zeros(1, 3), torch.ones(1, 3))
    pipe.scheduler.set_timesteps(steps)
    for k, t in enumerate(pipe.scheduler.timesteps):
        if declare is not None:
            declare(k)
        scaled = pipe.scheduler.scale_model_input(sample, t)
        plain, guided = (pipe.model(scaled, t, text) for text in texts)
        sample = pipe.scheduler.step(plain + 2 * (guided - plain), t, sample).prev_sample
        if between is not None:
            between(k)
    return sample


@torch.no_grad()
def test_guidance_in_two_calls_within_a_step_of_two_evaluations() -> None:
    pipe = holder("HeunDiscreteScheduler")
    expected = replay(pipe.model, "up", every(2, [2, 2, 2, 2, 1], branches=2), lambda: loop(pipe))
    with wrap_pipeline(pipe) as cw:
        assert torch.equal(loop(pipe), expected)
        assert cw.wrappers["model"].stats.adaptor_passes == 8


@torch.no_grad()
def test_guidance_that_begins_between_two_evaluations_of_a_step() -> None:
    """Its first call is a second evaluation, and does not serve the first one of the step after."""
    pipe = holder("HeunDiscreteScheduler")
    judge, texts, x = Judge(pipe.model), (torch.zeros(1, 3), torch.ones(1, 3)), torch.randn(1, 2, 8, 8)
    pipe.scheduler.set_timesteps(6)
    with wrap_pipeline(pipe) as cw:
        for k, t in enumerate(pipe.scheduler.timesteps):
            scaled = pipe.scheduler.scale_model_input(x, t)
            outputs = [
                judge.call(scaled, t, c, step=k // 2 + 1, branch=(b, k % 2))
                for b, c in enumerate(texts)
                if not b or k > 4
            ]
            x = pipe.scheduler.step(sum(outputs), t, x).prev_sample
        assert judge.letters == "FF" + "AA" + "FFF" + "AFAF" + "FFFF" + "AA"
        assert cw.wrappers["model"].stats.reasons["another place in the list of times than in the step before"] == 1


@torch.no_grad()
@pytest.mark.parametrize("after", [1, 2])
def test_a_preview_between_two_evaluations_of_a_step(after: int) -> None:
    """The second evaluation begins a trajectory then, and does not serve the first one of the step after."""
    pipe = holder("HeunDiscreteScheduler")
    judge, c, x = Judge(pipe.model), torch.ones(1, 3), torch.randn(1, 2, 8, 8)
    pipe.scheduler.set_timesteps(6)
    with wrap_pipeline(pipe):
        for k, t in enumerate(pipe.scheduler.timesteps):
            scaled = pipe.scheduler.scale_model_input(x, t)
            output = judge.call(scaled, t, c, step=k // 2 + 1, branch=k % 2)
            x = pipe.scheduler.step(output, t, x).prev_sample
            if k == after:
                judge.begin()
                judge.unet(x, 0.5, c)
        assert judge.letters == {1: "FF" + "FFAAFFAAF", 2: "FFA" + "F" + "FFFFAAF"}[after]


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
def test_windows_whose_number_changes() -> None:
    """Four in one step and three others in the next: the scheduler tells the steps, and nothing of their calls."""
    pipe = holder("DDIMScheduler")
    judge, c = Judge(pipe.model), torch.ones(1, 3)
    pipe.scheduler.set_timesteps(6)
    with wrap_pipeline(pipe):
        for step, t in enumerate(pipe.scheduler.timesteps, 1):
            for at in range(0, 16, 4) if step % 2 else range(2, 14, 4):
                judge.call(torch.randn(1, 2, 8, 8), t, c, step=step, branch=at)
        assert judge.letters == "F" * (4 + 3) * 3


@torch.no_grad()
def test_another_loop_on_the_unet_in_between_is_placed_by_its_own_times() -> None:
    """A preview of three steps in the middle of a trajectory: both get passes, and no feature of each other."""
    pipe = holder("HeunDiscreteScheduler")
    x = torch.randn(1, 2, 8, 8)
    kinds: list[int] = []

    def preview(k: int) -> None:
        if k == 3:
            start = cw.wrappers["model"].stats.adaptor_passes
            for t in torch.tensor([30.0, 20.0, 10.0]):
                pipe.model(x, t)
            kinds.append(cw.wrappers["model"].stats.adaptor_passes - start)

    with wrap_pipeline(pipe) as cw:
        outputs = loop(pipe, between=preview)
    assert kinds == [1]
    # evaluations 0..3 as scheduled, then a trajectory from the fifth evaluation on: FF AA | FF AA F
    expected = replay(
        pipe.model, "up", every(2, [2, 2], branches=2) + every(2, [2, 2, 1], branches=2), lambda: loop(pipe)
    )
    assert torch.equal(outputs, expected)


@torch.no_grad()
def test_times_that_are_no_views_of_the_list_are_left_to_inference() -> None:
    pipe = holder("DDIMScheduler")
    with wrap_pipeline(pipe) as cw:
        pipe.scheduler.set_timesteps(6)
        with cw.wrappers["model"].trajectory():
            for t in pipe.scheduler.timesteps.tolist():
                pipe.model(torch.randn(1, 2, 8, 8), t)
        for t in reversed(range(6)):  # and views in the other direction: inversion
            pipe.model(torch.randn(1, 2, 8, 8), pipe.scheduler.timesteps[t])
        assert cw.wrappers["model"].stats.adaptor_passes == 6, cw.report()


@torch.no_grad()
def test_who_declares_steps_is_not_overruled() -> None:
    """Pairs of evaluations as one step, in a loop that the scheduler would count one by one."""
    pipe = holder("DDIMScheduler")
    pairs, singles = (
        replay(pipe.model, "up", every(2, evaluations, branches=2), lambda: loop(pipe, steps=8))
        for evaluations in ([2] * 4, [1] * 8)
    )
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        inner = cw.wrappers["model"]
        assert torch.equal(loop(pipe, steps=8, declare=lambda k: inner.step() if k % 2 == 0 else None), pairs)
        cw.reset()
        assert torch.equal(loop(pipe, steps=8), singles)


@torch.no_grad()
@pytest.mark.parametrize(
    ("steps", "expected"),
    [(4, "FAFA"), (6, "FAFAFA"), (7, "FFAFAAF"), (8, "FFAAFAAF"), (20, "FFAFAFAFAFAFAFAAFAAF")],
)
def test_a_clock_is_spread_over_the_schedulers_steps(steps: int, expected: str) -> None:
    """As many full steps as the plain clock has; the first two and the last are among them."""
    pipe = holder("DDIMScheduler")
    with wrap_pipeline(pipe, clock=2) as cw:
        loop(pipe, steps=steps)
        stats = cw.wrappers["model"].stats
        assert (stats.full_passes, stats.adaptor_passes) == (2 * expected.count("F"), 2 * expected.count("A"))
    passes = [(letter, branch) for letter in expected for branch in (0, 1)]
    plain = replay(pipe.model, "up", passes, lambda: loop(pipe, steps=steps))
    with wrap_pipeline(pipe, clock=2):
        assert torch.equal(loop(pipe, steps=steps), plain)
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)):
        assert steps < 7 or not torch.equal(loop(pipe, steps=steps), plain)


# -- several UNets ------------------------------------------------------------------------------------------------


def cascade() -> Any:
    """Stable Cascade's decoder: a UNet of another class and name, given a row of views of its scheduler's times."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import CLIPTextModelWithProjection

    blocks = ["SDCascadeResBlock", "SDCascadeTimestepBlock"]
    decoder = parts.seeded(StableCascadeUNet)(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=[16, 32],
        num_attention_heads=[-1, 2],
        down_num_layers_per_block=[1, 1],
        up_num_layers_per_block=[1, 1],
        down_blocks_repeat_mappers=[1, 1],
        up_blocks_repeat_mappers=[1, 1],
        block_types_per_layer=[blocks, [*blocks, "SDCascadeAttnBlock"]],
        clip_text_pooled_in_channels=parts.WIDTH,
        dropout=[0.1, 0.1],
        effnet_in_channels=16,
        patch_size=1,
        timestep_ratio_embedding_dim=8,
        timestep_conditioning_type=["sca"],
    )
    return parts.quiet(
        StableCascadeDecoderPipeline(
            decoder=decoder,
            tokenizer=parts.tokenizer(),
            text_encoder=parts.text_encoder(CLIPTextModelWithProjection),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=parts.seeded(PaellaVQModel)(bottleneck_blocks=1, num_vq_embeddings=2),
        )
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stable_cascade() -> None:
    pipe = cascade()
    options = {"prompt": "a cat", "image_embeddings": torch.ones(1, 16, 2, 2), "guidance_scale": 2.0}

    def once() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        pictures: Tensor = pipe(num_inference_steps=6, generator=generator, output_type="latent", **options).images
        return pictures

    expected = replay(pipe.decoder, "up_upscalers.0", every(2, [1] * 6), once)
    with wrap_pipeline(pipe) as cw:
        decoder = cw.wrappers["decoder"]
        once()  # recorded; its exit is not among the tensors that are kept alive
        decoder.stats.clear()
        for _ in range(2):
            with decoder.trajectory():  # its times are numbers of its own, made from the scheduler's
                assert torch.equal(once(), expected)
        assert decoder.stats.adaptor_passes == 6


class BaseAndRefiner:
    def __init__(self) -> None:
        self.base = parts.sdxl()
        self.refiner = parts.sdxl("StableDiffusionXLImg2ImgPipeline", unet=parts.unet(**sdxl_options(seed_width=16)))

    def __call__(self) -> Tensor:
        image = self.base(
            num_inference_steps=6, denoising_end=0.7, generator=torch.Generator().manual_seed(0), **TEXT
        ).images
        pictures: Tensor = self.refiner(
            num_inference_steps=6, denoising_start=0.7, generator=torch.Generator().manual_seed(0), image=image, **EDIT
        ).images
        return pictures


def sdxl_options(seed_width: int) -> dict[str, Any]:
    return {**parts.ADDED, "block_out_channels": (8, 2 * seed_width)}


def test_a_base_and_its_refiner_under_one_handle() -> None:
    both = BaseAndRefiner()
    plain = both()
    before = [snapshot(pipe.unet) for pipe in (both.base, both.refiner)]
    with wrap_pipeline(both) as cw:
        assert list(cw.wrappers) == ["base.unet", "refiner.unet"]
        pictures = both()
        assert torch.equal(both(), pictures)
        assert not torch.equal(pictures, plain)
        passes = {name: (w.stats.full_passes, w.stats.adaptor_passes) for name, w in cw.wrappers.items()}
        assert passes == {"base.unet": (4, 4), "refiner.unet": (2, 2)}  # four steps of the one, two of the other
        report = cw.report()
        assert str(report).startswith("base.unet: Clockwork on UNet2DConditionModel\n")
        assert json.loads(report.to_json())["unets"]["refiner.unet"]["adaptor_passes"] == 2
        assert "| refiner.unet | passes" in report.to_markdown()
        assert repr(cw) == "WrappedPipeline(BaseAndRefiner: base.unet, refiner.unet)"
    assert [snapshot(pipe.unet) for pipe in (both.base, both.refiner)] == before
    assert torch.equal(both(), plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_modular_pipeline_whose_guider_hooks_into_layers_between_the_calls_of_a_step() -> None:
    """Skip-layer guidance calls the UNet a third time, with the first call's conditions, and with layers cut short."""
    skipped = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")
    guider = SkipLayerGuidance(
        3.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=skipped
    )
    modular = StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**{name: one for name, one in parts.sdxl().components.items() if one is not None})
    modular.update_components(guider=guider)
    parts.quiet(modular)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"prompt": "a cat", "negative_prompt": "a", "height": 32, "width": 32, "num_inference_steps": 8}
        result: Tensor = modular(**options, generator=generator, output_type="latent", output="latents")
        return result

    kinds = (
        "FF FFF FAF AAA FFF AAA FFF AAA"  # the third begins in the second step: in doubt with the first in the third
    )
    passes = [(kind, slot) for step in kinds.split() for slot, kind in enumerate(step)]
    expected = replay(modular.unet, EXIT, passes, sample)
    with wrap_pipeline(modular, schedule=ch.Schedule.at({3, 4, 6, 8})) as cw:
        for _ in range(2):
            assert torch.equal(sample(), expected)
        stats = cw.wrappers["unet"].stats
        assert (stats.full_passes, stats.adaptor_passes) == (26, 20), cw.report()


def test_some_of_them_and_options_for_each() -> None:
    both = BaseAndRefiner()
    with wrap_pipeline(both, unets=["refiner.unet"], clock=3) as cw:
        assert list(cw.wrappers) == ["refiner.unet"]
    options = {"base.unet": {2, 3}, "refiner.unet": {2}}
    with wrap_pipeline(both, {"base.unet": ch.IdentityAdaptor()}, schedule=options) as cw:
        assert [str(w.schedule) for w in cw.wrappers.values()] == ["at([2, 3])", "at([2])"]


class Turns:
    """A pipeline whose prompts take turns, as [a|b] does, which hands its UNet a number that is new in each call."""

    def __init__(self) -> None:
        self.unet, self.scheduler = UNetOfMine(), parts.scheduler("DDIMScheduler")

    @torch.no_grad()
    def __call__(self, names: str) -> Tensor:
        random = torch.Generator().manual_seed(0)
        sample, texts = torch.randn(1, 2, 8, 8, generator=random), {"a": torch.zeros(1, 3), "b": torch.ones(1, 3)}
        self.scheduler.set_timesteps(len(names))
        for name, t in zip(names, self.scheduler.timesteps, strict=True):
            noise = self.unet(sample, t, texts[name], number=torch.rand(1, generator=random).item())
            sample = self.scheduler.step(noise, t, sample).prev_sample
        return sample


@pytest.mark.parametrize(
    ("names", "options", "passes"),
    [
        ("aaaa", {}, "FFFF"),
        ("aaaa", {"ignore": "number"}, "FAFA"),
        ("aaaa", {"ignore": {"unet": ["number"]}}, "FAFA"),
        ("aaaa", {"ignore": {}}, "FFFF"),
        ("abababab", {"ignore": "number", "reuse": "same condition"}, "FFAAFFAA"),
        ("abababab", {"ignore": "number", "reuse": {"unet": "same condition"}, "clock": 2}, "FFAAFFAA"),
        ("abab", {"ignore": ["number"]}, "FFFF"),
    ],
)
def test_what_tells_nothing_and_prompts_that_take_turns(names: str, options: dict[str, Any], passes: str) -> None:
    pipe = Turns()
    with wrap_pipeline(pipe, **options) as cw:
        drawn = pipe(names)
        stats = cw.wrappers["unet"].stats
        assert (stats.full_passes, stats.adaptor_passes) == (passes.count("F"), passes.count("A")), cw.report()
    slots = list(zip(passes, names, strict=True))
    assert torch.equal(drawn, replay(pipe.unet, "up", slots, lambda: pipe(names)))


def test_a_key_for_each_call_of_a_pipeline() -> None:
    """Texts that are the same, in branches that are not: the key tells, else their order does."""
    keys: list[float] = []

    def key(arguments: Any) -> str:
        keys.append(float(arguments["c"].sum()))
        return f"text {keys[-1]:.0f}"

    pipe = holder("DDIMScheduler")
    with torch.no_grad(), wrap_pipeline(pipe, schedule=ch.Schedule.every(2), branch=key) as cw:
        drawn, report = loop(pipe, steps=4), cw.wrappers["model"].report()
        assert [branch.split("branch ")[1] for branch in report.cache] == ["'text 0'", "'text 3'"]
        assert report.adaptor_passes == 4
    assert keys == [0.0, 3.0] * 4
    with torch.no_grad():
        assert torch.equal(drawn, replay(pipe.model, "up", every(2, [1] * 4, branches=2), lambda: loop(pipe, steps=4)))


def test_a_compiled_unet_is_found_and_followed() -> None:
    """`pipe.unet = torch.compile(pipe.unet)` hides the UNet's class."""
    pipe = parts.text_to_image()
    unet, plain = pipe.unet, run(pipe)
    passes = every(2, [1] * 6)
    expected = replay(unet, EXIT, passes, lambda: run(pipe))
    pipe.unet = torch.compile(unet, backend="eager")
    with wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        cw.compile(backend="eager").follow(SimpleNamespace(unet=pipe.unet), SimpleNamespace(unet=unet))
        torch.testing.assert_close(run(pipe), expected)
        assert (cw.wrappers["unet"].stats.full_passes, cw.wrappers["unet"].stats.adaptor_passes) == counts(passes)
    pipe.unet = unet
    assert torch.equal(run(pipe), plain)


def test_a_unet_is_one_by_its_base_class_by_the_pipelines_name_for_it_or_by_the_callers() -> None:
    class Finetuned(UNetOfMine):
        pass

    pipe = SimpleNamespace(base=Finetuned(), unet=Tiny(1), denoiser=Tiny(2), text=torch.nn.Linear(1, 1))
    with wrap_pipeline(pipe) as cw:
        assert list(cw.wrappers) == ["base", "unet"]
    with wrap_pipeline(pipe, unets=["denoiser"], region={"denoiser": None}) as cw:
        cw.follow(SimpleNamespace(denoiser=pipe.denoiser))
        assert list(cw.wrappers) == ["denoiser"]


def test_all_or_none() -> None:
    """The refiner is wrapped already: the base is let go again."""
    both = BaseAndRefiner()
    before = snapshot(both.base.unet)
    with ch.wrap(both.refiner.unet), pytest.raises(ch.WrapError, match="wrapped only once"):
        wrap_pipeline(both)
    assert snapshot(both.base.unet) == before


def test_what_is_no_pipeline_or_no_such_unet(pipe: Any) -> None:
    with pytest.raises(ch.ArgumentError, match="its UNets: none"):
        wrap_pipeline(SimpleNamespace(text=torch.nn.Linear(1, 1)))
    with pytest.raises(ch.ArgumentError, match="its UNets: unet\n  unets: decoder"):
        wrap_pipeline(pipe, unets=["decoder"])
    with pytest.raises(ch.ArgumentError, match="takes a pipeline, not a model"):
        wrap_pipeline(pipe.unet)
    with pytest.raises(ch.ArgumentError, match="pipeline: NoneType\n  its UNets: none"):
        wrap_pipeline(None)
    with pytest.raises(ch.ArgumentError, match="load it first"):
        wrap_pipeline("owner/model")
    with pytest.raises(ch.ArgumentError, match="unets= names UNets of the pipeline\n  unets: 1"):
        wrap_pipeline(pipe, unets=1)  # type: ignore[arg-type]
    with wrap_pipeline(pipe) as cw, pytest.raises(ch.ArgumentError, match="shares a wrapped UNet"):
        cw.follow("owner/model")


@pytest.mark.parametrize("options", [{"schedule": {"unett": {2}}}, {"clocks": {1: 2, 2: 4}}])
def test_a_mapping_that_names_no_unet_is_refused(pipe: Any, options: dict[str, Any]) -> None:
    """It would be left out, and the UNet would run by the default clock."""
    before = snapshot(pipe.unet)
    with pytest.raises(ch.ArgumentError, match=r"must have names of the pipeline's UNets as keys\n  no such UNet: "):
        wrap_pipeline(pipe, **options)
    assert snapshot(pipe.unet) == before


@torch.no_grad()
def test_a_loop_one_entry_behind_another_is_no_inversion() -> None:
    pipe, sample = holder("DDIMScheduler"), torch.randn(1, 2, 8, 8)
    with wrap_pipeline(pipe, schedule=lambda step: True) as cw:
        stats = cw.wrappers["model"].stats
        pipe.scheduler.set_timesteps(12)
        times = pipe.scheduler.timesteps
        for k in (0, 1, 2, 3):
            pipe.model(sample, times[k])
        stats.clear()
        for k in range(4, 11):
            pipe.model(sample, times[k])
            pipe.model(sample, times[k - 1])
        assert stats.adaptor_passes == 1  # the very first of them
        for k in range(8, 1, -1):  # the second step back, and on: an inversion
            pipe.model(sample, times[k])
        assert stats.adaptor_passes == 1 + 7

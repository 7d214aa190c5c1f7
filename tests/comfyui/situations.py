"""Situations of ComfyUI's users: each makes a model and says how it is sampled."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

ONE = [1] * 6


@dataclass
class Case:
    """How a situation is sampled.

    Attributes:
        patcher: the model, before Clockwork's node.
        options: of the sampler.
        evaluations: of each step.
        after: puts more on the model, after Clockwork's node or the reference.
        letters: the passes; None where the reference alone says.
        frozen: modules within the region at which the situation looks: what they did in the last full pass stays.
        counted: is each call a pass? Not where another cache answers some.
        each: do the sampler's steps have two evaluations, which the clock counts, from the second one on?
    """

    patcher: Any
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: list[int] = field(default_factory=lambda: list(ONE))
    after: Callable[[Any], Any] = lambda patcher: patcher
    letters: str | None = "FAFAFA"
    frozen: tuple[str, ...] = ()
    counted: bool = True
    each: bool = False


SITUATIONS: dict[str, Callable[[Any], Case]] = {}  # with any client
REAL: dict[str, Callable[[Any], Case]] = {}  # with ComfyUI's own nodes


def _in(table: dict[str, Callable[[Any], Case]]) -> Callable[[Callable[[Any], Case]], Callable[[Any], Case]]:
    def add(make: Callable[[Any], Case]) -> Callable[[Any], Case]:
        table[make.__name__] = make
        return make

    return add


any_client, real_only = _in(SITUATIONS), _in(REAL)

# -- sampling ----------


@any_client
def plain(client: Any) -> Case:
    return Case(client.model())


@any_client
def no_guidance(client: Any) -> Case:
    return Case(client.model(), {"cfg": 1.0})


@any_client
def a_batch(client: Any) -> Case:
    return Case(client.model(), {"batch": 3})


@any_client
def heun(client: Any) -> Case:
    return Case(client.model(), {"sampler": "heun"}, [2, 2, 2, 2, 2, 1], letters="FFAFAFAFAFA", each=True)


@any_client
def dpm_2(client: Any) -> Case:
    return Case(client.model(), {"sampler": "dpm_2"}, [2, 2, 2, 2, 2, 1], letters="FFAFAFAFAFA", each=True)


@any_client
def the_negative_prompt_left_out_in_every_other_step(client: Any) -> Case:
    """The first batch without it is recorded; after that its rows are served by those of the step before."""
    return Case(client.skips(client.model(), lambda step: step % 2 == 1), letters="FFFAFA")


@any_client
def no_guidance_from_the_middle_on(client: Any) -> Case:
    return Case(client.skips(client.model(), lambda step: step >= 3), {"batch": 2}, letters="FAFFFA")


@any_client
def no_guidance_for_the_first_half(client: Any) -> Case:
    """Rows that come anew are not there in the step before."""
    return Case(client.skips(client.model(), lambda step: step < 3), {"batch": 2}, letters="FAFFFA")


@any_client
def two_prompts_without_the_negative_one(client: Any) -> Case:
    return Case(
        client.skips(client.model(), lambda step: step % 2 == 1),
        {"positive": client.cond(1) + client.cond(5), "batch": 2},
        letters="FFFAFA",
    )


@any_client
def the_negative_prompt_left_out_in_heuns_steps(client: Any) -> Case:
    """The clock counts evaluations: the adaptor's are those without it, served from the full ones before."""
    return Case(
        client.skips(client.model(), lambda evaluation: evaluation > 0 and evaluation % 2 == 0),
        {"sampler": "heun"}, [2, 2, 2, 2, 2, 1], letters="FFFFAFAFAFA", each=True,
    )  # fmt: skip


@any_client
def an_area_without_the_negative_prompt(client: Any) -> Case:
    area = client.cond(5, area=(8, 8, 4, 4), strength=0.8)
    return Case(
        client.skips(client.model(), lambda step: step % 2 == 1), {"positive": client.cond(1) + area}, letters=None
    )


@any_client
def prompts_of_different_lengths(client: Any) -> Case:
    """Positive and negative cannot be one batch: two calls an evaluation."""
    return Case(
        client.model(), {"positive": client.cond(1, tokens=6), "negative": client.cond(2, tokens=5)}, letters="FFAA" * 3
    )


@any_client
def image_to_image(client: Any) -> Case:
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return Case(client.model(), {"latent": latent, "denoise": 0.6})


@any_client
def two_prompts_at_once(client: Any) -> Case:
    return Case(client.model(), {"positive": client.cond(1) + client.cond(5)})


@any_client
def an_area(client: Any) -> Case:
    area = client.cond(5, area=(8, 8, 4, 4), strength=0.8)
    return Case(client.model(), {"positive": client.cond(1) + area}, letters=None)


@any_client
def a_prompt_for_a_part_of_the_sampling(client: Any) -> Case:
    """The second half has another prompt: its first call has nothing before it."""
    first, then = client.cond(1, start_percent=0.0, end_percent=0.5), client.cond(5, start_percent=0.5, end_percent=1.0)
    return Case(client.model(), {"positive": first + then}, letters=None)


@any_client
def moving_windows(client: Any) -> Case:
    return Case(client.windows(client.model()), {"batch": 7}, letters=None)


@any_client
def a_patch_that_writes_to_the_features(client: Any) -> Case:
    """As FreeU does it: the exit is written to in place."""

    def patch(h: Any, skip: Any, _: Any) -> Any:
        if h.shape[1] == 64:
            h[:, :32] = h[:, :32] * 1.2
        return h, skip

    def after(patcher: Any) -> Any:
        clone = patcher.clone()
        clone.set_model_output_block_patch(patch)
        return clone

    return Case(client.model(), after=after)


@any_client
def guidance_of_its_own_calls_the_model_again(client: Any) -> Case:
    """As perturbed attention does: one more call in an evaluation, with the conditions of another one."""
    return Case(client.third_call(client.model()), letters=None)


@any_client
def batches_that_memory_splits_in_every_other_step(client: Any) -> Case:
    """Rows are served by the rows of the step before, in whatever batch they were."""
    return Case(client.splits(client.model(), lambda step: step % 2 == 1), letters=None)


@any_client
def guidance_of_its_own_where_memory_splits_batches(client: Any) -> Case:
    """Its own call is the first of its condition alone where both are one batch, and the second where they are not."""
    return Case(client.splits(client.third_call(client.model()), lambda step: step % 2 == 1), letters=None)


@any_client
def steps_that_another_cache_answers(client: Any) -> Case:
    """As LazyCache does: nobody is asked for the third step, so nothing is kept of the step before the fourth."""
    clone, evaluations, last = client.model().clone(), client.Evaluations(), list[Any]()

    def answer(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if evaluations.at != 2:
            last[:] = [executor(*args, **kwargs)]
        return last[0]

    evaluations.watch(clone)
    clone.add_wrapper_with_key("predict_noise", "cache", answer)
    return Case(clone, evaluations=[1, 1, 0, 1, 1, 1], letters="FAFFA")


@any_client
def a_lora_of_one_prompt_that_grows_weaker(client: Any) -> Case:
    """In the second step, which is full for that prompt: its weights are written to past their counters."""
    return Case(client.model(), {"positive": client.keyframed(client.cond(1))}, letters=None)


@any_client
def calls_from_another_thread(client: Any) -> Case:
    """As ComfyUI makes them where several GPUs share the work: each call is made by a thread of its own."""
    clone = client.model().clone()

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,)) as pool:
            return pool.submit(executor, *args, **kwargs).result()

    clone.add_wrapper_with_key("apply_model", "thread", call)
    return Case(clone)


@any_client
def weights_patched_for_the_run(client: Any) -> Case:
    return Case(client.lora(client.model()))


# -- ComfyUI's own nodes ----------


@real_only
def free_u(client: Any) -> Case:
    return Case(client.node("nodes_freelunch", "FreeU_V2", model=client.model(), b1=1.3, b2=1.4, s1=0.9, s2=0.2))


@real_only
def free_u_after(client: Any) -> Case:
    after = lambda m: client.node("nodes_freelunch", "FreeU", model=m, b1=1.1, b2=1.2, s1=0.9, s2=0.2)  # noqa: E731
    return Case(client.model(), after=after)


@real_only
def hyper_tile(client: Any) -> Case:
    random.seed(0)
    model = client.node(
        "nodes_hypertile", "HyperTile", model=client.model(), tile_size=64, swap_size=1, max_depth=0, scale_depth=False
    )
    return Case(model)


@real_only
def token_merging(client: Any) -> Case:
    return Case(client.node("nodes_tomesd", "TomePatchModel", model=client.model(), ratio=0.3))


@real_only
def perturbed_attention(client: Any) -> Case:
    return Case(
        client.node("nodes_pag", "PerturbedAttentionGuidance", model=client.model(), scale=3.0), letters="FFAA" * 3
    )


@real_only
def self_attention_guidance(client: Any) -> Case:
    """It looks at an attention of the middle block, which adaptor passes skip: its map is of the last full pass."""
    model = client.node("nodes_sag", "SelfAttentionGuidance", model=client.model(), scale=0.5, blur_sigma=2.0)
    return Case(model, letters="FFAA" * 3, frozen=("middle_block.1",))


@real_only
def deep_shrink(client: Any) -> Case:
    model = client.node(
        "nodes_model_downscale", "PatchModelAddDownscale", model=client.model(), block_number=2, downscale_factor=2.0,
        start_percent=0.0, end_percent=0.35, downscale_after_skip=True,
        downscale_method="bicubic", upscale_method="bicubic",
    )  # fmt: skip
    return Case(model, {"size": 32}, letters=None)


@real_only
def rescaled_guidance(client: Any) -> Case:
    return Case(client.node("nodes_model_advanced", "RescaleCFG", model=client.model(), multiplier=0.7))


@real_only
def v_prediction_and_zero_snr(client: Any) -> Case:
    return Case(
        client.node(
            "nodes_model_advanced", "ModelSamplingDiscrete", model=client.model(), sampling="v_prediction", zsnr=True
        )
    )


@real_only
def differential_diffusion(client: Any) -> Case:
    model = client.node("nodes_differential_diffusion", "DifferentialDiffusion", model=client.model())
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return Case(model, {"latent": latent, "noise_mask": torch.linspace(0, 1, 16).expand(1, 1, 16, 16)})


@real_only
def inpainting_with_a_mask(client: Any) -> Case:
    latent, mask = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    return Case(client.model(), {"latent": latent, "noise_mask": mask})


@real_only
def a_mask_on_a_prompt(client: Any) -> Case:
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    return Case(client.model(), {"positive": client.cond(1) + client.cond(5, mask=mask, mask_strength=0.9)})


@real_only
def little_memory(client: Any) -> Case:
    """Weights are moved and patched in each call."""
    return Case(client.low_memory(client.lora(client.model())))


@real_only
def control_net(client: Any) -> Case:
    return Case(client.model(), {"positive": client.controlled(client.cond(1))}, letters=None)


@real_only
def control_for_a_part_of_the_sampling(client: Any) -> Case:
    return Case(client.model(), {"positive": client.controlled(client.cond(1), (0.0, 0.5))}, letters=None)


@real_only
def a_lora_of_one_prompt(client: Any) -> Case:
    """Weights change between the calls of a step; those of a branch are the same in every step."""
    return Case(client.model(), {"positive": client.hooked(client.cond(1))}, letters="FFAA" * 3)


@real_only
def uniform_windows(client: Any) -> Case:
    model = client.node(
        "nodes_context_windows", "ContextWindowsManualNode", model=client.model(), context_length=4, context_overlap=1,
        context_schedule="standard_uniform", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=0,
    )  # fmt: skip
    return Case(model, {"batch": 7}, letters=None)


@real_only
def a_schedule_in_two_parts(client: Any) -> Case:
    """KSamplerAdvanced: steps 2 to 8 of 8."""
    return Case(client.model(), {"steps": 8, "start_step": 2, "last_step": 8, "force_full_denoise": True})


@real_only
def easy_cache_beside_it(client: Any) -> Case:
    """It answers whole calls by itself; a step after such a one is full."""

    def after(patcher: Any) -> Any:
        options = {"reuse_threshold": 0.5, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
        return client.node("nodes_easycache", "EasyCacheNode", model=patcher, **options)

    return Case(client.model(), {"steps": 10}, [1] * 10, after, letters=None, counted=False)

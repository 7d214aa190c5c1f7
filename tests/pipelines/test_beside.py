"""Who reads maps and features, or counts layers, in the region: following the warning to the letter works."""

import ast
import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

import clockwork_hooks as ch
from tests.pipelines import parts

STEPS = 6
TEXT = torch.randn(1, 7, parts.WIDTH, generator=torch.Generator().manual_seed(1))


def small_unet(**options: Any) -> Any:
    """Three levels, with attention in the region and outside of it."""
    return parts.unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        **options,
    )


def steps(unet: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    noise, timeline = torch.randn(1, 4, parts.SIZE, parts.SIZE), torch.linspace(900, 150, STEPS)
    with torch.no_grad():
        return [unet(noise + t / 900, t, encoder_hidden_states=TEXT, **kwargs).sample for t in timeline]


def followed(unet: Any, work: Callable[[], Any]) -> tuple[list[str], Any, Any]:
    """Wrap without more ado, and again as the warning says: (what is kept, the second wrapper, what was worked out)."""
    with ch.wrap(unet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError):  # raised by who needs maps that no adaptor pass makes
            work()
    messages = [str(one.message) for one in caught if one.category is ch.SkippedModuleWarning]
    assert len(messages) == 1
    advice = re.search(r"keep=(\[.*?\])", messages[0])
    assert advice is not None
    keep = ast.literal_eval(advice[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ch.SkippedModuleWarning)
        with ch.wrap(unet, keep=keep) as cw:
            done = work()
    assert cw.stats.adaptor_passes == cw.stats.full_passes
    assert cw.stats.macs_saved > 0
    return keep, cw, done


# -- controllers ------------------------------------------------------------------------------------------------------


class Controller(AttnProcessor):
    """Counts its calls to know its step, and keeps the maps of each step, as prompt-to-prompt does."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.count, self.step = layers, 0, 0
        self.maps: list[list[tuple[int, ...]]] = [[]]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kw: Any
    ) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = (attn.head_to_batch_dim(y) for y in (attn.to_q(hidden_states), attn.to_k(context)))
        self.maps[-1].append(tuple(attn.get_attention_scores(query, key).shape))
        self.count += 1
        if self.count == self.layers:
            self.count, self.step = 0, self.step + 1
            self.maps.append([])
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kw)


def test_a_controller_counts_every_step_and_has_the_maps_of_all_resolutions() -> None:
    def work(unet: Any) -> Controller:
        unet.set_attn_processor(controller := Controller(len(unet.attn_processors)))
        steps(unet)
        return controller

    unet, plain = small_unet(), work(small_unet())
    keep, _, controller = followed(unet, lambda: work(unet))
    assert len(keep) == sum("down_blocks.0" not in n and "up_blocks.2" not in n for n in unet.attn_processors)
    assert controller.step == plain.step == STEPS
    assert controller.maps == plain.maps
    assert len({shape[1] for shape in controller.maps[0]}) == 3  # queries: as many as pixels


def test_a_cache_of_diffusers_counts_the_calls_of_its_layers() -> None:
    """Pyramid attention broadcast computes every second call anew: with the layers kept, in the steps that it means."""

    def fresh() -> Any:
        options = {"cross_attention_block_skip_range": 2, "cross_attention_block_identifiers": ["transformer_blocks"]}
        config = PyramidAttentionBroadcastConfig(**options, current_timestep_callback=lambda: 500)
        unet, computed = small_unet(), list[int]()
        apply_pyramid_attention_broadcast(unet, config)
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.register_forward_hook(
            lambda *_: computed.append(len(outputs))
        )
        return unet, computed

    outputs: list[Tensor] = []

    def work(unet: Any) -> None:
        outputs.clear()
        for t in torch.linspace(900, 150, STEPS):
            with torch.no_grad():
                outputs.append(unet(torch.zeros(1, 4, parts.SIZE, parts.SIZE), t, TEXT).sample)

    plain, computed = fresh()
    work(plain)
    unet, seen = fresh()
    with ch.wrap(unet), pytest.warns(ch.SkippedModuleWarning, match="PyramidAttentionBroadcastHook"):
        work(unet)
    assert seen != computed
    layers = [path for path, one in unet.named_modules() if path.endswith("attn2") and "up_blocks.2" not in path]
    unet, seen = fresh()
    with ch.wrap(unet, keep=layers[1:]) as cw:
        work(unet)
    assert seen == computed
    assert cw.stats.adaptor_passes == STEPS // 2


# -- self-attention guidance ------------------------------------------------------------------------------------------


def sag(unet: Any, **options: Any) -> Callable[[], Tensor]:
    vae = diffusers.AutoencoderKL(block_out_channels=[4], norm_num_groups=2)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionSAGPipeline(
        vae, None, None, unet, scheduler, None, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt_embeds": TEXT, "negative_prompt_embeds": 0 * TEXT, "height": parts.SIZE, "width": parts.SIZE}
    return lambda: (
        pipe(
            **inputs,
            **options,
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_self_attention_guidance_runs_and_is_the_plain_one_on_full_passes(scale: float) -> None:
    unet = small_unet()
    work = sag(unet, guidance_scale=scale, sag_scale=0.75)
    plain, reference = work(), []
    handle = unet.register_forward_hook(lambda m, args, kwargs, out: reference.append(out[0]), with_kwargs=True)
    work()
    handle.remove()
    keep, _, picture = followed(unet, work)
    assert keep == ["mid_block.attentions.0"]
    assert torch.isfinite(picture).all()
    assert not torch.equal(picture, plain)
    outputs: list[Tensor] = []
    with ch.wrap(unet, keep=keep, schedule=ch.Schedule.where(lambda step: step == STEPS)):
        handle = unet.register_forward_hook(lambda m, args, kwargs, out: outputs.append(out[0]), with_kwargs=True)
        work()
        handle.remove()
    assert len(outputs) == len(reference) == 2 * STEPS  # of the last step one pass or two are the adaptor's
    assert all(map(torch.equal, outputs[: 2 * STEPS - 2], reference))
    assert not torch.equal(outputs[-2], reference[-2])


# -- perturbed guidance -------------------------------------------------------------------------


def test_perturbed_attention_guidance_needs_nothing() -> None:
    """Its processors hold no state: layers of the region are perturbed on full passes, and their features reused."""
    pipe = parts.text_to_image("StableDiffusionPAGPipeline", unet=small_unet(), pag_applied_layers=["mid"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ch.SkippedModuleWarning)
        with ch.wrap(pipe.unet) as cw:
            pipe("a", num_inference_steps=STEPS, height=32, width=32, output_type="latent", pag_scale=3.0)
    assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (STEPS // 2, STEPS // 2)


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["mid_block", "up_blocks.1.resnets.0", "down_blocks.1"], ids=["h-space", "DIFT", "probe"]
)
def test_hooks_that_read_features_have_one_a_step(path: str) -> None:
    unet = small_unet()
    features: list[Tensor] = []
    unet.get_submodule(path).register_forward_hook(
        lambda m, args, out: features.append(out if isinstance(out, Tensor) else out[0])
    )
    steps(unet)
    plain = [*features]

    def work() -> list[Tensor]:
        features.clear()
        steps(unet)
        return [*features]

    keep, _, read = followed(unet, work)
    assert keep == [path]
    assert len(read) == STEPS
    assert all(map(torch.equal, read, plain))  # what they come from runs with its true inputs

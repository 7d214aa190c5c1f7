"""Beside whatever else changes a UNet: what it does and what Clockwork does both hold, in either order, and both go."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import (
    HookRegistry,
    apply_layerwise_casting,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.engine.hooks import Forward
from tests.pipelines import parts
from tests.pipelines.oracle import every, replay
from tests.snapshot import snapshot

STEPS = 4
OPTIONS = {"prompt": "a red cat", "height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}
PASSES = every(2, [1] * STEPS)
ADAPTOR = 2  # passes of a run, half of it
EXIT = "up_blocks.0"

Change = Callable[[Any], object]


@dataclass(frozen=True)
class Companion:
    """Something else that changes the pipeline's UNet.

    Attributes:
        do, undo: its own calls.
        ready: called before every run: some keep state between runs.
        frozen: modules that are skipped with the region and notice when they run.
        extra: full passes that its arrival costs once.
        exact: plain pictures stay what they were; None where a machine's products may round either way.
        restores: undone, the plain pictures come back to the bit.
        copies_times: times are no views of the scheduler's list.
    """

    do: Change
    undo: Change
    ready: Change = lambda pipe: None
    frozen: tuple[str, ...] = ()
    extra: int = 0
    exact: bool | None = False
    restores: bool = True
    copies_times: bool = False


def run(pipe: Any) -> Tensor:
    pictures: Tensor = pipe(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), **OPTIONS).images
    return pictures


def lora() -> dict[str, Tensor]:
    """A LoRA on attention and convolutions, the exit's too."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet, generator = parts.unet(), torch.Generator().manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1", "conv", "proj_in"]))
    shapes = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
    return {f"unet.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fuse(pipe: Any) -> None:
    pipe.load_lora_weights(lora(), adapter_name="style")
    pipe.fuse_lora(components=["unet"])


def unfuse(pipe: Any) -> None:
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()


def merge_tokens(pipe: Any) -> None:
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, use_rand=False)


def split_tokens(pipe: Any) -> None:
    import tomesd

    tomesd.remove_patch(pipe)


def broadcast(pipe: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)


def registry(pipe: Any) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(pipe.unet)


def start_broadcast_anew(pipe: Any) -> None:
    registry(pipe).reset_stateful_hooks()


def to_disk(pipe: Any) -> None:
    """Weights in files between the calls."""
    pipe.folder = tempfile.mkdtemp()
    accelerate.disk_offload(pipe.unet, pipe.folder, CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())


def dispatch(pipe: Any) -> None:
    """Some parts stay, others come from the CPU's memory or from files: `from_pretrained(device_map=...)` does this."""
    places = dict.fromkeys((name for name, _ in pipe.unet.named_children()), "cpu")
    pipe.folder = tempfile.mkdtemp()
    accelerate.dispatch_model(
        pipe.unet,
        places | {"mid_block": "disk", "up_blocks.0": "disk", "up_blocks.1": "cpu"},
        main_device="cpu",
        offload_dir=pipe.folder,
        force_hooks=True,
    )
    assert {parameter.is_meta for parameter in pipe.unet.parameters()} == {True, False}


def from_disk(pipe: Any) -> None:
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    shutil.rmtree(pipe.folder)
    for name in ("hf_device_map", "to", "cuda"):  # what `dispatch_model` leaves on the model
        vars(pipe.unet).pop(name, None)


CPU = torch.device("cpu")
COMPANIONS = {
    "attention slicing": Companion(
        lambda pipe: pipe.enable_attention_slicing(1), lambda pipe: pipe.disable_attention_slicing()
    ),
    "channels_last": Companion(
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        lambda pipe: pipe.unet.to(memory_format=torch.contiguous_format),
    ),
    "set_attn_processor": Companion(
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    ),
    "fused projections": Companion(
        lambda pipe: pipe.fuse_qkv_projections(), lambda pipe: pipe.unfuse_qkv_projections(), exact=None
    ),
    "FreeU": Companion(
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
        lambda pipe: pipe.disable_freeu(),
        extra=1,  # it writes to the exit: noticed once, copied from then on
    ),
    "LoRA": Companion(
        lambda pipe: pipe.load_lora_weights(lora(), adapter_name="style"), lambda pipe: pipe.unload_lora_weights()
    ),
    "fused LoRA": Companion(fuse, unfuse, restores=False),  # adds and subtracts the weights
    "tomesd": Companion(merge_tokens, split_tokens),
    "model CPU offload": Companion(  # as on a GPU, but "onload" is to the CPU too
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.remove_all_hooks(),
        exact=True,
        copies_times=True,  # to "cpu:0", which is another device than "cpu"; on a GPU they stay what they are
    ),
    "sequential CPU offload": Companion(  # what the pipeline's method does to its UNet: weights on meta between calls
        lambda pipe: accelerate.cpu_offload(pipe.unet, CPU, offload_buffers=len(pipe.unet._parameters) > 0),
        lambda pipe: accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True),
        exact=True,
    ),
    "disk offload": Companion(to_disk, from_disk, exact=True),
    "dispatched": Companion(dispatch, from_disk, exact=True),
    "group offload": Companion(
        lambda pipe: pipe.unet.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type="leaf_level", use_stream=False
        ),
        lambda pipe: registry(pipe).remove_hook("group_offloading", recurse=True),
        exact=True,
    ),
    "pyramid attention broadcast": Companion(
        broadcast,
        lambda pipe: registry(pipe).remove_hook("pyramid_attention_broadcast", recurse=True),
        ready=start_broadcast_anew,
        frozen=("mid_block",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The parts that every pipeline here shares; each takes its own copy of the UNet."""
    return parts.text_to_image()


def fresh(pipe: Any) -> Any:
    copied = type(pipe)(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False)
    return parts.quiet(copied)


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Tensor:
    return run(fresh(pipe))


@pytest.fixture(scope="module", params=COMPANIONS.values(), ids=list(COMPANIONS))
def companion(request: pytest.FixtureRequest) -> Companion:
    one: Companion = request.param
    return one


@pytest.fixture(scope="module")
def expected(pipe: Any, plain: Tensor, companion: Companion) -> Tensor:
    """By a plain hook on a UNet that the companion has changed and Clockwork never touched."""
    other = fresh(pipe)
    companion.do(other)
    companion.ready(other)
    changed = run(other)
    assert companion.exact is None or torch.equal(changed, plain) == companion.exact
    companion.ready(other)
    pictures = replay(other.unet, EXIT, PASSES, partial(run, other), frozen=companion.frozen)
    assert not torch.equal(pictures, changed)
    companion.undo(other)
    return pictures


def left_by(pipe: Any, companion: Companion) -> dict[str, set[str]]:
    """The attributes that the companion alone leaves behind: module → names."""
    other = fresh(pipe)
    companion.do(other)
    companion.undo(other)
    return attributes(other.unet)


def attributes(unet: Any) -> dict[str, set[str]]:
    """Names, but for a `forward` that is the class's own: accelerate leaves one behind, which changes nothing."""
    return {
        path: {name for name, value in vars(module).items() if name != "forward" or not _own_forward(module, value)}
        for path, module in unet.named_modules()
    }


def _own_forward(module: Any, value: Any) -> bool:
    return getattr(value, "__func__", None) is type(module).forward and value.__self__ is module


@pytest.mark.filterwarnings("ignore:(?s).*PyramidAttentionBroadcast:clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("ours_first", [True, False], ids=["clockwork goes first", "companion goes first"])
@pytest.mark.parametrize("early", [True, False], ids=["there before", "comes after"])
def test_both_hold_and_both_go(
    pipe: Any, plain: Tensor, companion: Companion, expected: Tensor, early: bool, ours_first: bool
) -> None:
    used = fresh(pipe)
    if early:
        companion.do(used)
    cw = ch.wrap(used.unet, clock=2)
    with cw.trajectory() if companion.copies_times else contextlib.nullcontext():
        if not early:
            first = run(used)
            companion.do(used)
            if companion.extra:
                run(used)
                assert cw.stats.adaptor_passes == 2 * ADAPTOR - companion.extra
            cw.stats.clear()
        for _ in range(2):
            companion.ready(used)
            assert torch.equal(run(used), expected)
    assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2 * STEPS - 2 * ADAPTOR, 2 * ADAPTOR), cw.report()
    if ours_first:
        cw.remove()
        companion.undo(used)
    else:
        companion.undo(used)
        if not early and companion.restores:
            assert torch.equal(run(used), first)  # wrapped still, as before the companion came
        cw.remove()
    if companion.restores:
        assert torch.equal(run(used), plain)
    assert attributes(used.unet) == left_by(pipe, companion)
    assert not any(isinstance(value, Forward) for module in used.unet.modules() for value in vars(module).values())


def deep_cache(pipe: Any) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return helper


def test_a_unet_under_deepcache_is_refused(pipe: Any, plain: Tensor) -> None:
    used = fresh(pipe)
    helper = deep_cache(used)
    before = snapshot(used.unet)
    with pytest.raises(ch.WrapError, match="DeepCache skips modules of this UNet already"):
        ch.wrap(used.unet)
    assert snapshot(used.unet) == before
    helper.disable()
    with ch.wrap(used.unet) as cw:
        run(used)
        assert cw.stats.adaptor_passes == ADAPTOR
    assert torch.equal(run(used), plain)
    helper.enable()
    with pytest.raises(ch.WrapError, match="DeepCache skips modules of this UNet already"):
        cw.attach()
    helper.disable()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_deepcache_switched_on_later_wins(pipe: Any) -> None:
    """Every pass that it cuts short is full, with the reason; its own pictures come out, and ours when it is gone."""
    other = fresh(pipe)
    helper = deep_cache(other)
    theirs = run(other)
    used = fresh(pipe)
    with ch.wrap(used.unet) as cw, cw.trajectory():
        ours = run(used)
        cw.stats.clear()
        helper = deep_cache(used)
        assert torch.equal(run(used), theirs)
        assert cw.stats.adaptor_passes == 0
        assert cw.stats.reasons["calls differed from the traced ones"] == ADAPTOR, cw.report()
        helper.disable()
        assert torch.equal(run(used), ours)


def test_weights_stored_in_another_precision(pipe: Any) -> None:
    """Layerwise casting moves weights from bfloat16 and back around every call; it stays for good."""
    used = fresh(pipe)
    apply_layerwise_casting(used.unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = replay(used.unet, EXIT, PASSES, partial(run, used))
    cast = run(used)
    with ch.wrap(used.unet) as cw:
        assert torch.equal(run(used), expected)
        assert cw.stats.adaptor_passes == ADAPTOR
    assert torch.equal(run(used), cast)

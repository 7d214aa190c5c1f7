"""The zoo's expectations, proved by execution: no part of the package takes part."""

import functools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import REFUSED, ZOO, Case, ZooCase, random_unet
from tests.zoo.proof import Prover, tensors_of

RANDOM = [f"random-{seed}" for seed in range(40)]
ALL = [*ZOO, *RANDOM]


@functools.cache
def build(name: str) -> ZooCase:
    return random_unet(int(name.removeprefix("random-"))) if name.startswith("random-") else ZOO[name]()


def run(case: Case) -> Any:
    args, kwargs = case.inputs()
    with torch.no_grad():
        return case.model(*args, **kwargs)


@functools.cache
def calls_of(name: str) -> dict[str, int]:
    """How often each module is called, by every path it has."""
    case = build(name)
    counts: dict[str, int] = {}
    handles = []
    for path, module in case.model.named_modules(remove_duplicate=False):

        def count(_module: nn.Module, _args: Any, _output: Any, path: str = path) -> None:
            counts[path] = counts.get(path, 0) + 1

        handles.append(module.register_forward_hook(count))
    run(case)
    for handle in handles:
        handle.remove()
    return counts


@functools.cache
def prover(name: str) -> Prover:
    case = build(name)
    named = {path: range(calls_of(name)[path]) for path in {*case.skipped, *case.outside, *case.entry, *case.exit}}
    return Prover(case.model, case.args, case.kwargs, named)


def proof(case: ZooCase, exit_path: str, skipped: set[str], *, call: int | None = None) -> bool:
    calls = calls_of(case.name)
    outside_exit = {path: range(calls[path]) for path in skipped if not path.startswith(f"{exit_path}.")}
    return prover(case.name).holds(exit_path, case.exit_call if call is None else call, outside_exit)


@pytest.mark.parametrize("name", ALL)
def test_the_output_needs_nothing_of_the_region_but_its_exit(name: str) -> None:
    case = build(name)
    for path in case.exit:
        assert proof(case, path, set(case.skipped)), path


@pytest.mark.parametrize("name", ALL)
def test_the_output_needs_everything_that_is_kept(name: str) -> None:
    case = build(name)
    paths = case.outside if name in ZOO else case.entry
    for path in paths:
        assert not proof(case, case.exit[-1], {*case.skipped, path}), path


@pytest.mark.parametrize("name", ALL)
def test_a_module_inside_of_the_region_is_no_exit_for_all_of_it(name: str) -> None:
    case = build(name)
    wrong = next(path for path in sorted(case.skipped) if _returns_one_tensor(case, path))
    assert not proof(case, wrong, {*case.skipped, case.exit[-1]} - {wrong}, call=0)


def _returns_one_tensor(case: ZooCase, path: str) -> bool:
    results: list[Any] = []
    handle = case.model.get_submodule(path).register_forward_hook(lambda _m, _a, output: results.append(output))
    run(case)
    handle.remove()
    return len(results) == 1 and isinstance(results[0], Tensor)


@pytest.mark.parametrize("name", ALL)
def test_exactly_the_listed_modules_return_the_entry_and_the_exit(name: str) -> None:
    case = build(name)
    returned: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
    consumed: list[Tensor] = []
    handles = []

    def note(path: str, output: Any) -> None:
        tensors = tensors_of(output)
        if len(tensors) == 1:
            returned[path].append((tensors[0], tensors[0]._version))  # an in-place op makes another tensor of it

    for path, module in case.model.named_modules(remove_duplicate=False):
        if path:
            handles.append(module.register_forward_hook(lambda _m, _a, output, path=path: note(path, output)))
    if case.consumer:
        module = case.model.get_submodule(case.consumer)
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, kwargs: consumed.append(tensors_of([args, kwargs])[0]), with_kwargs=True
            )
        )
    run(case)
    for handle in handles:
        handle.remove()

    def alike(tensor: Tensor, version: int) -> set[str]:
        every = ((path, *each) for path, values in returned.items() for each in values)
        return {path for path, other, seen in every if other is tensor and seen == version}

    def fits(tensor: Tensor, resolution: tuple[int, ...]) -> bool:
        if case.axes is None:
            return tensor.shape[-len(resolution) :] == resolution
        return math.prod(tensor.shape[axis] for axis in case.axes) == math.prod(resolution)

    exit_tensor, version = returned[case.exit[0]][case.exit_call]
    assert alike(exit_tensor, version) == set(case.exit)
    assert fits(exit_tensor, case.exit_resolution or case.resolution)
    if case.consumer:
        assert fits(consumed[0], case.resolution)
        assert alike(consumed[0], consumed[0]._version) == set(case.entry)
    if case.entry:
        entry_tensor, version = returned[case.entry[0]][0]
        assert fits(entry_tensor, case.resolution)
        assert alike(entry_tensor, version) == set(case.entry)


@pytest.mark.parametrize("name", ALL)
def test_a_case_is_tiny_seeded_and_nowhere_constant(name: str) -> None:
    before = torch.get_rng_state()
    case, again = build(name), build.__wrapped__(name)
    assert torch.equal(before, torch.get_rng_state())
    _is_sound(name, case, again)

    paths = {path for path, _ in case.model.named_modules(remove_duplicate=False)}
    assert {*case.entry, *case.exit, *case.skipped, *case.outside} <= paths
    assert not case.skipped & case.outside


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_case_is_tiny_seeded_and_nowhere_constant(name: str) -> None:
    case = REFUSED[name]()
    _is_sound(name, case, REFUSED[name]())
    assert case.says


def _is_sound(name: str, case: Case, again: Case) -> None:
    assert case.name == name
    assert not any(module.training for module in case.model.modules())
    assert sum(parameter.numel() for parameter in case.model.parameters()) < 4_000_000
    for (path, parameter), other in zip(case.model.named_parameters(), again.model.parameters(), strict=True):
        assert parameter.dtype is torch.float32, path
        assert torch.equal(parameter, other), path
        assert parameter.numel() == 1 or parameter.min() != parameter.max(), path
    left, right = tensors_of([case.args, case.kwargs]), tensors_of([again.args, again.kwargs])
    assert all(map(torch.equal, left, right))
    assert case.note
    assert case.source


def test_the_zoo_has_what_was_asked_for() -> None:
    """Every class and variant of issue 3's list, and no case twice."""
    assert set(ZOO) == {
        *("unet2d", "unet2d_plain", "unet2d_classes", "sd15", "sd21", "sdxl", "sd_inpainting", "sd15_controlnet"),
        *("sd15_t2i_adapter", "sd15_freeu", "sd15_classes", "sd15_gligen", "sd15_checkpointing", "deepfloyd_if"),
        *("kandinsky22", "kandinsky3", "unet1d", "unet1d_policy", "cascade_b", "unet3d", "svd", "motion", "i2vgen_xl"),
        *("ddpm_pytorch", "ddpm_self_conditioned", "ddpm_1d", "ddpm_guided", "simple_diffusion", "karras", "karras_3d"),
        *("imagen", "imagen_memory_efficient", "imagen_3d", "monai2d", "monai3d", "monai_unet", "a_unet1d", "a_unet2d"),
        *("x_unet", "x_unet_plain", "plain", "add_skips", "nested", "unshuffled", "shared_upsampler", "in_place_entry"),
        *("padded_after", "interpolated_after", "unused_skip", "several_entries", "squeeze_excite", "tokens"),
        *("token_unet", "channels_last", "volumes", "preconditioned", "patch_stem", "odd_sizes", "sequential_slices"),
        *("checkpointed", "opaque_kernel"),
    }
    assert set(REFUSED) == {
        *("ncsnpp", "unet1d_value", "cascade_c", "uvit256", "uvit512", "imagen_combined", "simple_diffusion_shallow"),
        *("pyramid", "dense_skips", "flat", "too_small"),
    }


@pytest.mark.slow
def test_many_random_unets() -> None:
    for seed in range(1000, 1500):
        name = f"random-{seed}"
        case = build(name)
        assert all(proof(case, path, set(case.skipped)) for path in case.exit), case.note
        assert not any(proof(case, case.exit[-1], {*case.skipped, path}) for path in case.outside), case.note
        prover.cache_clear()  # it keeps what the modules returned
    build.cache_clear()
    calls_of.cache_clear()

"""The zoo's expectations, proved by execution: no part of the package takes part."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO, ZooCase, random_unet
from tests.zoo.proof import nan_proof, tensors_of

RANDOM = [f"random-{seed}" for seed in range(40)]
ALL = [*ZOO, *RANDOM]


@functools.cache
def build(name: str) -> ZooCase:
    return random_unet(int(name.removeprefix("random-"))) if name.startswith("random-") else ZOO[name]()


def run(case: ZooCase) -> Any:
    with torch.no_grad():
        return case.model(*case.args, **case.kwargs)


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


def proof(case: ZooCase, exit_path: str, skipped: set[str]) -> bool:
    calls = calls_of(case.name)
    outside_exit = {path for path in skipped if not path.startswith(f"{exit_path}.")}
    named = {path: set(range(calls[path])) for path in outside_exit}
    return nan_proof(case.model, case.args, case.kwargs, exit_path, case.exit_call, named)


@pytest.mark.parametrize("name", ALL)
def test_the_output_needs_nothing_of_the_region_but_its_exit(name: str) -> None:
    case = build(name)
    for path in case.exit:
        assert proof(case, path, set(case.skipped)), path


@pytest.mark.parametrize("name", ALL)
def test_the_output_needs_everything_that_is_kept(name: str) -> None:
    case = build(name)
    paths = case.kept if name in ZOO else case.entry
    for path in paths:
        assert not proof(case, case.exit[-1], {*case.skipped, path}), path


@pytest.mark.parametrize("name", ALL)
def test_a_module_inside_of_the_region_is_no_exit_for_all_of_it(name: str) -> None:
    case = build(name)
    wrong = next(path for path in sorted(case.skipped) if _returns_one_tensor(case, path))
    assert not proof(case, wrong, {*case.skipped, case.exit[-1]} - {wrong})


def _returns_one_tensor(case: ZooCase, path: str) -> bool:
    found: list[Any] = []
    handle = case.model.get_submodule(path).register_forward_hook(lambda _m, _a, output: found.append(output))
    run(case)
    handle.remove()
    return len(found) == 1 and isinstance(found[0], Tensor)


@pytest.mark.parametrize("name", ALL)
def test_exactly_the_listed_modules_return_the_entry_and_the_exit(name: str) -> None:
    case = build(name)
    returned: dict[str, tuple[Tensor, int]] = {}
    consumed: list[Tensor] = []
    handles = []

    def note(path: str, output: Any) -> None:
        tensors = tensors_of(output)
        if len(tensors) == 1 and path not in returned:
            returned[path] = tensors[0], tensors[0]._version  # an in-place op makes another tensor of it

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
        return {path for path, (other, seen) in returned.items() if other is tensor and seen == version}

    exit_tensor, version = returned[case.exit[0]]
    assert alike(exit_tensor, version) == set(case.exit)
    assert exit_tensor.shape[-len(case.resolution) :] == (case.exit_resolution or case.resolution)
    if case.consumer:
        assert consumed[0].shape[-len(case.resolution) :] == case.resolution
        assert alike(consumed[0], consumed[0]._version) == set(case.entry)
    if case.entry:
        entry_tensor, version = returned[case.entry[0]]
        assert entry_tensor.shape[-len(case.resolution) :] == case.resolution
        assert alike(entry_tensor, version) == set(case.entry)


@pytest.mark.parametrize("name", ALL)
def test_a_case_is_tiny_seeded_and_nowhere_constant(name: str) -> None:
    before = torch.get_rng_state()
    case, again = build(name), build.__wrapped__(name)
    assert torch.equal(before, torch.get_rng_state())

    assert case.name == name
    assert not any(module.training for module in case.model.modules())
    assert sum(parameter.numel() for parameter in case.model.parameters()) < 2_000_000
    for (path, parameter), other in zip(case.model.named_parameters(), again.model.parameters(), strict=True):
        assert parameter.dtype is torch.float32, path
        assert torch.equal(parameter, other), path
        assert parameter.numel() == 1 or parameter.min() != parameter.max(), path
    left, right = tensors_of([case.args, case.kwargs]), tensors_of([again.args, again.kwargs])
    assert all(map(torch.equal, left, right))

    paths = {path for path, _ in case.model.named_modules(remove_duplicate=False)}
    assert {*case.entry, *case.exit, *case.skipped, *case.kept} <= paths
    assert not case.skipped & case.kept
    assert case.note
    assert case.source


def test_the_zoo_has_what_was_asked_for() -> None:
    assert list(ZOO) == [
        *("unet2d", "sd15", "sd15_controlnet", "sdxl", "kandinsky22", "unet1d", "unet3d", "svd"),
        *("plain", "ddpm_pytorch", "monai3d", "a_unet1d"),
    ]


@pytest.mark.slow
def test_many_random_unets() -> None:
    for seed in range(1000, 1500):
        name = f"random-{seed}"
        case = build(name)
        assert all(proof(case, path, set(case.skipped)) for path in case.exit), case.note
        assert not any(proof(case, case.exit[-1], {*case.skipped, path}) for path in case.kept), case.note
    build.cache_clear()
    calls_of.cache_clear()

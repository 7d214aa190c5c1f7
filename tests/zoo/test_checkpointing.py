"""Gradient checkpointing: in the backward pass a module runs once more, outside of any call of the UNet."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.zoo import ZOO, ZooCase
from tests.zoo.proof import tensors_of

CASES = ["sd15_checkpointing", "checkpointed"]


def loss(case: ZooCase) -> Tensor:
    args, kwargs = case.inputs()
    return tensors_of(case.model(*args, **kwargs))[0].square().mean()


def gradients(case: ZooCase) -> tuple[Tensor, list[Tensor | None]]:
    value = loss(case)
    value.backward()
    values = [parameter.grad for parameter in case.model.parameters()]
    case.model.zero_grad(set_to_none=True)
    return value.detach(), values


def equal(left: tuple[Tensor, list[Any]], right: tuple[Tensor, list[Any]]) -> bool:
    pairs = zip(left[1], right[1], strict=True)
    return torch.equal(left[0], right[0]) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs
    )


@pytest.mark.parametrize("name", CASES)
def test_a_full_pass_has_the_gradients_of_the_plain_unet(name: str) -> None:
    case = ZOO[name]()
    plain = gradients(case)
    assert sum(grad is not None for grad in plain[1]) > 20
    with ch.wrap(case.model) as cw:
        cw.step()
        assert equal(gradients(case), plain)
        assert cw.stats.full_passes == 1
    assert equal(gradients(case), plain)


@pytest.mark.parametrize("name", CASES)
def test_an_adaptor_pass_has_the_gradients_of_what_ran(name: str) -> None:
    """Those of the plain UNet with the exit held fixed by a plain hook: none for the region, also on recomputation."""
    case = ZOO[name]()
    args, kwargs = case.inputs()
    region = ch.find_region(case.model, *args, **kwargs)
    path = region.exit.paths[-1]
    exits: list[Tensor] = []

    def hold(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        exits.append(output.detach().clone())
        return exits[0]

    handle = case.model.get_submodule(path).register_forward_hook(hold)
    plain = gradients(case)
    handle.remove()
    with ch.wrap(case.model, region=region) as cw:
        cw.step()
        gradients(case)
        cw.step()
        assert equal(gradients(case), plain)
        assert cw.stats.adaptor_passes == 1, cw.report()


@pytest.mark.parametrize("name", CASES)
def test_training_runs_full(name: str) -> None:
    case = ZOO[name]()
    case.model.train()
    plain = gradients(case)
    with ch.wrap(case.model) as cw:
        for _ in range(2):
            cw.step()
            assert equal(gradients(case), plain)
        assert cw.stats.adaptor_passes == 0, cw.report()

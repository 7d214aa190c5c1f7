"""Calls that are transformed by torch.func, or run again by a backward pass: what the plain UNet would give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
C = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))

TRANSFORMS: dict[str, Callable[[nn.Module, float], Any]] = {
    "vjp": lambda unet, t: torch.func.vjp(lambda x: unet(x, t), X)[1](X),
    "jvp": lambda unet, t: torch.func.jvp(lambda x: unet(x, t), (X,), (X,)),
    "grad": lambda unet, t: torch.func.grad(lambda x: unet(x, t).square().sum())(X),
    "jacrev": lambda unet, t: torch.func.jacrev(lambda x: unet(x, t).sum((2, 3)))(X),
    "vmap": lambda unet, t: torch.func.vmap(lambda x: unet(x[None], t)[0])(X),
    "vmap of all inputs": lambda unet, t: torch.func.vmap(lambda x, t, c: unet(x[None], t, c[None])[0])(
        X, torch.full((2,), t), C
    ),
}  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in tensors(part)]


@pytest.mark.parametrize("first", [True, False], ids=["before any other call", "in a trajectory"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_of_the_unet_itself(name: str, first: bool) -> None:
    """As of a likelihood's divergence at each step; the loop around it goes on, and nothing in it is stale."""
    judge, transform = Judge(Tiny()), TRANSFORMS[name]
    with ch.wrap(judge.unet) as cw, cw.trajectory():
        for k, t in enumerate((900.0, 800.0, 700.0, 600.0), 1):
            if k > 2 or first:
                pairs = zip(tensors(transform(judge.unet, t)), tensors(transform(judge.plain, t)), strict=True)
                assert all(map(torch.equal, *zip(*pairs, strict=True)))
                judge.begin()
            if k > 1 or not first:
                with torch.no_grad():
                    judge.call(X, t, step=k)
    assert cw.stats.reasons["within a transform of torch.func"] == (4 if first else 2)
    assert judge.letters == ("FFF" if first else "FAFF")


def by_checkpoint(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def sample(unet: nn.Module, x: Tensor) -> Tensor:
        for t in (900.0, 800.0, 700.0):
            x = x - 0.1 * checkpoint(unet, x, t, use_reentrant=reentrant)
        return x

    return sample


class Adjoint(torch.autograd.Function):
    """Forward without a graph; the backward pass solves the steps again, the last one first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unet: nn.Module) -> Tensor:
        ctx.unet, ctx.xs = unet, []
        for t in (900.0, 800.0, 700.0):
            ctx.xs.append(x)
            x = x - 0.1 * unet(x, t)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for x, t in zip(reversed(ctx.xs), (700.0, 800.0, 900.0), strict=True):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(y - 0.1 * ctx.unet(y, t), y, grad)
        return grad, None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "sample",
    [by_checkpoint(False), by_checkpoint(True), Adjoint.apply],
    ids=["checkpoint", "reentrant checkpoint", "adjoint"],
)
def test_a_call_that_is_run_again_gives_the_same_both_times(sample: Any, training: bool) -> None:
    """Training through the sampler as AlignProp does it: the gradients are the plain UNet's, to the bit."""
    unet = Tiny().double().train(training)
    plain, gradients = copy.deepcopy(unet), []
    with ch.wrap(unet) as cw:
        for model in (unet, plain):
            x = X.double().requires_grad_()
            out = sample(x, model) if sample == Adjoint.apply else sample(model, x)
            out.square().sum().backward()
            gradients.append([out, x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert set(cw.stats.reasons) == {"within torch.utils.checkpoint or a backward pass"}
    assert cw.stats.adaptor_passes == 0


def test_sampling_after_such_a_call_is_a_trajectory_of_its_own() -> None:
    judge = Judge(Tiny())
    with ch.wrap(judge.unet) as cw, cw.trajectory(), torch.no_grad():
        for k, t in enumerate((900, 800, 700, 600), 1):
            if k == 3:
                with torch.enable_grad():
                    checkpoint(judge.unet, X, 790, use_reentrant=False)
                judge.begin()
            judge.call(X, t, step=k)
    assert judge.letters == "FAFA"
    assert [one.steps for one in cw.stats.trajectories] == [2, 2]
    assert cw.region is not None
    assert cw.stats.macs_plain == 5 * cw.region.full_macs  # counted, and in full

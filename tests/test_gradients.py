"""Gradients: of a UNet at clock 1, through an adaptor pass, and through the cached exit where that is asked for."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from clockwork_hooks.clock import reasons
from tests.small_unet import Tiny, reference

TIMES = (900.0, 800.0, 700.0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def double() -> Tiny:
    return Tiny().double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (1, 2, 4, 4), dtype=torch.float64)


class Linear(nn.Module):
    """Predicts the exit from the entry and the exit before; both matter."""

    def __init__(self) -> None:
        super().__init__()
        self.from_entry = nn.Parameter(0.3 * noise(8, 8, 1, 1))
        self.from_exit = nn.Parameter(0.3 * noise(8, 8, 3, 3))

    def forward(self, entry: Tensor, exit_cached: Tensor, **_: Any) -> Tensor:
        output: Tensor = F.conv2d(entry, self.from_entry) + F.conv2d(exit_cached, self.from_exit, padding=1).tanh()
        return output


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    assert one.keys() == other.keys()
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
def test_clock_1_leaves_every_gradient_as_it_is(training: bool) -> None:
    """Also of the first call, which is recorded while it runs."""
    unet, plain = double().train(training), double().train(training)
    xs = [noise() for _ in TIMES]
    with pytest.warns(ch.NoEffectWarning):
        cw = ch.wrap(unet, clock=1)
    for model in (unet, plain):
        model.seen = [x.clone().requires_grad_() for x in xs]
        sum(model(x, t).square().sum() for x, t in zip(model.seen, TIMES, strict=True)).backward()
    cw.remove()
    assert same(gradients(unet), gradients(plain))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(unet.seen, plain.seen, strict=True))


def test_a_unet_that_trains_runs_full() -> None:
    unet = double().train()
    with ch.wrap(unet) as cw, cw.trajectory():
        for t in TIMES:
            unet(noise(), t).sum().backward()
        assert cw.stats.adaptor_passes == 0
        assert cw.stats.reasons["training"] == 1


# -- through an adaptor pass ---------------------------------------------------------------------------------------


@pytest.fixture
def unet() -> Tiny:
    return double().requires_grad_(False)


def rollout(unet: nn.Module, cw: ch.ClockworkWrapper, xs: list[Tensor]) -> Tensor:
    """The last output of a trajectory."""
    cw.reset()
    for x, t in zip(xs, TIMES, strict=False):
        output = unet(x, t)
    result: Tensor = output
    return result


@pytest.mark.parametrize("keep_graph", [False, True])
def test_an_adaptor_pass_against_finite_differences(unet: Tiny, keep_graph: bool) -> None:
    """With respect to the second step's sample (through the entry) and the adaptor's weights."""
    adaptor = Linear()
    first = noise()
    with ch.wrap(unet, adaptor, keep_graph=keep_graph) as cw, cw.trajectory():

        def second(x: Tensor, *weights: Tensor) -> Tensor:  # gradcheck moves the parameters themselves
            return rollout(unet, cw, [first, x])

        assert torch.autograd.gradcheck(second, (noise().requires_grad_(), *adaptor.parameters()), fast_mode=False)
        assert cw.stats.adaptor_passes > 100


@pytest.mark.parametrize("clock", [2, 3])
def test_into_the_step_before_only_where_it_is_asked_for(unet: Tiny, clock: int) -> None:
    """Over one adaptor pass and over two in a row; by finite differences of the whole trajectory."""
    count = clock  # F A, F A A
    adaptor = Linear()
    for keep_graph in (True, False):
        with ch.wrap(unet, adaptor, clock=clock, keep_graph=keep_graph) as cw, cw.trajectory():

            def run(*xs: Tensor) -> Tensor:
                return rollout(unet, cw, list(xs))

            xs = [noise().requires_grad_() for _ in range(count)]
            if keep_graph:
                assert torch.autograd.gradcheck(run, xs, fast_mode=True)
                continue
            run(*xs).sum().backward()
            assert [x.grad is not None for x in xs] == [False] * (count - 1) + [True]


def test_the_gradient_is_that_of_the_same_trajectory_by_hand(unet: Tiny) -> None:
    """The adaptor's output in the exit's place, on a plain UNet; the exit of the step before is a constant."""
    adaptor, by_hand, plain = Linear(), Linear(), copy.deepcopy(unet)
    by_hand.load_state_dict(adaptor.state_dict())
    xs = [noise().requires_grad_() for _ in range(2)]
    with ch.wrap(unet, adaptor) as cw, cw.trajectory():
        rollout(unet, cw, xs).sum().backward()
    _, exit = reference(plain, xs[0], TIMES[0])
    x = xs[1].detach().requires_grad_()
    entry = plain.stem(x) + plain.emb(torch.full((1, 1), TIMES[1] / 100, dtype=torch.float64)).sin()[:, :, None, None]
    output = by_hand(entry, exit.detach())
    plain.head(torch.cat([entry, output], 1)).sum().backward()
    assert same(gradients(adaptor), gradients(by_hand))
    assert torch.allclose(xs[1].grad, x.grad, rtol=1e-12)
    assert xs[0].grad is None


def test_an_adaptor_learns_through_the_sampler(unet: Tiny) -> None:
    """The loss of the adaptor pass against the full pass goes down by gradients that came through the UNet."""
    adaptor, plain = Linear(), copy.deepcopy(unet)
    optimizer, losses = torch.optim.Adam(adaptor.parameters(), lr=0.02), []
    xs = [noise(4, 2, 4, 4) for _ in range(2)]
    with ch.wrap(unet, adaptor) as cw, cw.trajectory():
        for _ in range(30):
            loss = (rollout(unet, cw, xs) - plain(xs[1], TIMES[1])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_an_exit_whose_graph_was_lost_costs_a_pass(unet: Tiny) -> None:
    """The traced call copies an exit that its code writes to; the copy has no graph: not used where one is due."""

    class Writes(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            h = self.stem(x)
            z = self.up(self.body(self.act(self.down(h))))
            return self.head(torch.cat([h, z.mul_(0.5)], 1))

    model = Writes().double()
    with ch.wrap(model, keep_graph=True) as cw, cw.trajectory():
        for expected in (0, 1):
            xs = [noise().requires_grad_() for _ in range(2)]
            rollout(model, cw, xs).sum().backward()
            assert cw.stats.adaptor_passes == expected
            assert (xs[0].grad is not None) == bool(expected)


# -- through a checkpoint ------------------------------------------------------------------------------------------


class Checkpointed(Tiny):
    """Checkpoints the last part of the UNet, from the skipped modules on; or each skipped module by itself."""

    def __init__(self, part: str, *, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + self.emb(torch.full((1, 1), t / 100, dtype=x.dtype)).sin()[:, :, None, None]
        return self.checkpoint(self.lower, h) if self.part == "all" else self.lower(h)

    def lower(self, h: Tensor) -> Tensor:
        z = self.down(h)
        z = self.checkpoint(self.middle, z) if self.part == "modules" else self.middle(z)
        z = self.checkpoint(self.up, z) if self.part == "modules" else self.up(z)
        return self.head(torch.cat([h, z], 1))

    def middle(self, z: Tensor) -> Tensor:
        return self.body(self.act(z))

    def checkpoint(self, function: Any, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize(
    ("part", "reentrant", "served"), [("all", False, 0), ("all", True, 0), ("modules", False, 2), ("modules", True, 0)]
)
def test_what_a_backward_pass_runs_again_is_what_ran(part: str, reentrant: bool, served: int) -> None:
    """A pass has the gradients of what it computed; where a second run would compute something else, it is full."""
    unet, plain = Checkpointed(part, reentrant=reentrant).double(), Checkpointed("none", reentrant=False).double()
    xs, exit = [noise() for _ in range(4)], None
    with warnings.catch_warnings(), ch.wrap(unet) as cw, cw.trajectory():
        warnings.simplefilter("ignore")
        for k, x in enumerate(xs):
            passes = cw.stats.adaptor_passes
            one, other = (x.clone().requires_grad_() for _ in range(2))
            unet(one, 900.0 - 100 * k).square().sum().backward()
            skipped = cw.stats.adaptor_passes > passes
            output, exit = reference(plain, other, 900.0 - 100 * k, exit=exit if skipped else None)
            output.square().sum().backward()
            exit = exit.detach()
            assert one.grad is not None
            assert torch.equal(one.grad, other.grad)
            assert same(gradients(unet), gradients(plain))
            for model in (unet, plain):
                model.zero_grad()
        assert cw.stats.adaptor_passes == served
        assert cw.stats.reasons[reasons.REPEATED] == 3 * (not served)
        with torch.no_grad():  # nothing will run again
            for k, x in enumerate(xs):
                unet(x, 900.0 - 100 * k)
        assert cw.stats.adaptor_passes == served + 2

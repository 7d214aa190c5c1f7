"""The scaled ResNet adaptor: exits of any size, a gain that the time sets, and it is saved like the others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clockwork_hooks.adaptors import LearnedAdaptor, ResNetAdaptor, ScaledResNetAdaptor
from clockwork_hooks.graph.operators import node_macs
from clockwork_hooks.graph.tracing import recording

EXIT, ENTRY = ({"channels": c, "space": (8, 8)} for c in (4, 3))


def adaptor(kind: type[ResNetAdaptor] = ScaledResNetAdaptor, **options: object) -> ResNetAdaptor:
    torch.manual_seed(0)
    return kind(width=8, exit=EXIT, entry=ENTRY, time=6, text=5, **options)


def inputs(scale: float = 1.0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(2, *size, generator=noise) for name, size in (("time", (6,)), ("text", (5,)))}
    entry, cached = (torch.randn(2, c, 8, 8, generator=noise) for c in (3, 4))
    return {"entry": entry, "exit_cached": scale * cached, **tensors}


def test_fresh_it_is_the_identity() -> None:
    arguments = inputs(1000.0)
    assert torch.equal(adaptor()(**arguments), arguments["exit_cached"])


def test_what_it_adds_grows_with_the_cached_exit() -> None:
    """Twice the exit, twice the output, whatever was learned: the convolutions see the same numbers."""
    module = adaptor()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    small, large = inputs(1.0), inputs(2.0)
    torch.testing.assert_close(module(**large), 2 * module(**small))
    assert not torch.allclose(module(**small), small["exit_cached"])


def test_half_precision_holds_large_exits() -> None:
    """The squares of numbers above 256 are no halves."""
    module = adaptor().half()
    torch.nn.init.normal_(module.up.weight, std=0.1)
    arguments = {name: value.half() for name, value in inputs(1000.0).items()}
    assert torch.isfinite(module(**arguments)).all()


def test_it_learns_a_shrinkage_that_depends_on_the_time() -> None:
    """0.1 at one time and 0.8 at another: no 1×1 residual is both."""
    times = torch.eye(2, 6)
    generator = torch.Generator().manual_seed(2)

    def error(module: ResNetAdaptor, updates: int) -> float:
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
        for _ in range(updates):
            cached = torch.randn(2, 4, 8, 8, generator=generator) * torch.tensor([100.0, 2.0])[:, None, None, None]
            wanted = cached * torch.tensor([0.1, 0.8])[:, None, None, None]
            output = module(torch.zeros(2, 3, 8, 8), cached, time=times, text=torch.zeros(2, 5))
            size = cached.square().mean((1, 2, 3))
            loss = ((output - wanted).square().mean((1, 2, 3)) / size).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert error(adaptor(), 120) < 0.01 < error(adaptor(ResNetAdaptor), 120)


def test_it_costs_what_the_resnet_costs_but_for_a_layer_on_the_time() -> None:
    costs = []
    for kind in (ResNetAdaptor, ScaledResNetAdaptor):
        module, arguments = adaptor(kind), inputs()
        with recording(module, (), arguments) as recorder:
            module(**arguments)
        costs.append(sum(map(node_macs, recorder.bindings.nodes)))
    assert costs[1] - costs[0] == 2 * 6 * 8  # two rows, time 6, two gains of four channels


def test_saved_and_loaded(tmp_path: Path) -> None:
    module = adaptor(sees_exit=False)
    torch.nn.init.normal_(module.gain.weight)
    module.save_pretrained(tmp_path)
    again = LearnedAdaptor.from_pretrained(tmp_path)
    assert type(again) is ScaledResNetAdaptor
    assert torch.equal(again(**inputs()), module.eval()(**inputs()))

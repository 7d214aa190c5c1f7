"""A UNet of five layers to bend into every shape, and the proofs that its region must pass."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks._tree import leaves
from clockwork_hooks.engine import passes
from clockwork_hooks.regions.cut import SkippedCall, Slot
from tests.snapshot import snapshot
from tests.zoo.proof import nan_proof, same


class Tiny(nn.Module):
    """stem → (down → body → up), joined with the stem's output → head; every step can be overridden."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(channels, 8, 3, 1, 1)
        self.down = nn.Conv2d(8, 32, 4, 2, 1)
        self.body = nn.Conv2d(32, 32, 3, 1, 1)
        self.up = nn.ConvTranspose2d(32, 8, 4, 2, 1)
        self.head = nn.Conv2d(16, channels, 3, 1, 1)
        self.embed = nn.Linear(8, 32)

    def time(self, t: Any, like: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=like.device).to(like.dtype).reshape(-1, 1)
        waves = t * 0.3 ** torch.arange(4, device=like.device, dtype=like.dtype)
        return self.embed(torch.cat((waves.sin(), waves.cos()), 1))[:, :, None, None]

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.body(self.down(h) + self.time(t, h)))

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return self.head(torch.cat((h, low), 1))

    def forward(self, x: Tensor, t: Any) -> Any:
        h = self.stem(x)
        return self.join(h, self.low(h, t))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(1))


class Oracle(nn.Module):
    """Returns the exit it was given, whatever was cached."""

    def __init__(self, exit: Tensor) -> None:
        super().__init__()
        self.exit = exit

    def forward(self, entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        assert exit_cached.shape == self.exit.shape
        return self.exit.clone()


def nan(slot: Slot) -> Tensor:
    fill = float("nan") if slot.dtype.is_floating_point else 0
    return torch.full(slot.shape, fill, dtype=slot.dtype, device=slot.device)


def exit_of(call: SkippedCall) -> int | None:
    return next((k for k, (_, slot) in enumerate(leaves(call.output)) if isinstance(slot, Slot) and slot.exit), None)


def proven(model: nn.Module, *args: Any, region: ch.Region | None = None, **kwargs: Any) -> ch.Region:
    """The model's region, after three proofs.

    The independent NaN proof; a wrapped adaptor pass with NaN for placeholders and the true exit, equal to the bit;
    every module as before after `remove()`.
    """
    region = region or ch.find_region(model, *args, **kwargs)
    last = next(call for call in region.skipped if exit_of(call) is not None)
    where = exit_of(last)
    assert where is not None
    before, seen = snapshot(model), []
    handle = model.get_submodule(last.path).register_forward_hook(
        lambda module, inputs, output: seen.append([leaf for _, leaf in leaves(output)][where].clone())
    )
    with torch.no_grad():
        expected = model(*args, **kwargs)
    handle.remove()
    whole = not next(iter(leaves(last.output)))[0]
    if whole:  # the independent prover injects single tensors only
        skipped: dict[str, set[int]] = defaultdict(set)
        for call in region.skipped:
            skipped[call.path].add(call.ordinal)
        assert nan_proof(model, args, kwargs, last.path, last.ordinal, skipped)
    oracle = Oracle(seen[last.ordinal])
    with torch.no_grad(), mock.patch.object(passes, "placeholder", nan), ch.wrap(model, oracle, region=region) as cw:
        for _ in range(2):
            cw.step()
            assert same(model(*args, **kwargs), expected), region.line
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1, 1), cw.report()
    assert snapshot(model) == before
    return region


def outputs(call: Callable[[Any], Any], times: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return [call(t) for t in times]

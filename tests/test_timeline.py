"""Which step and branch a call is, and that nothing stale is ever returned."""

import copy

import torch

import clockwork_hooks as ch
from tests.tiny import Tiny


def sample(batch: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 2, size, size)


@torch.no_grad()
def test_a_doubtful_step_is_doubtful_for_every_branch() -> None:
    """One step of guidance in two calls, then a new trajectory above it: its direction is unknown for both calls."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    conditions = torch.randn(1, 3), torch.randn(1, 3)
    with ch.wrap(unet):
        for c in conditions:
            unet(sample(), 100, c)
        x = sample()
        for c in conditions:
            assert torch.equal(unet(x, 900, c), plain(x, 900, c))

"""Which step and branch a call is, and that nothing stale is ever returned."""

import copy

import numpy as np
import pytest
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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["array", "changed array", "new equal array", "objects whose == is no bool"])
def test_conditions_that_are_no_tensors(kind: str) -> None:
    """The same array or object: one branch; one written to in place, or another: a new branch. Never a crash."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = object.__hash__

    unet, condition = Tiny(), np.ones(3)
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for t in (900, 800, 700):
            if kind == "changed array":
                condition += 1
            elif kind == "new equal array":
                condition = np.ones(3)
            elif kind == "objects whose == is no bool":
                condition = Odd()
            unet(sample(), t, None, mask=condition)
    assert cw.stats.adaptor_passes == (2 if kind == "array" else 0)
    assert cw.stats.reasons["conditions are new in this step"] == (0 if kind == "array" else 2)

"""Which step and branch a call is, and that nothing stale is ever returned."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.timeline import Clock
from tests.small_unet import Tiny


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


def letters(unet: Tiny, cw: ch.ClockworkWrapper, times: Iterable[Any]) -> str:
    """One letter a call: F for a full pass, A for an adaptor pass."""
    made = ""
    for t in times:
        before = cw.stats.adaptor_passes
        unet(sample(), t)
        made += "A" if cw.stats.adaptor_passes > before else "F"
    return made


@torch.no_grad()
@pytest.mark.parametrize(
    ("loops", "expected"),
    [
        (lambda ts: [ts[:3], ts[5:]], ["FAF", "FAFA"]),  # aborted, then restarted lower in the same list
        (lambda ts: [ts[:1], ts[3:6]], ["F", "FAF"]),  # a single call, then lower
        (lambda ts: [ts[:3], ts[2:6]], ["FAF", "FFFA"]),  # at the same time: doubt, until the old clock goes on
        (lambda ts: [ts, ts], ["FAFAFAFAF"] * 2),
        (lambda ts: [ts[:4], ts.clone()[4:]], ["FAFA", "FAFAF"]),  # where it stopped, in a new list
        (lambda ts: [ts[::2]], ["FFAFA"]),  # its entries are two apart: known from the second step on
        (lambda ts: [reversed(list(ts))], ["FAFAFAFAF"]),
        (lambda ts: [ts.repeat_interleave(2)[1:]], ["FA" + "F" * 15]),  # Heun: two calls a step from the second on
    ],
)
def test_times_from_a_list(loops: Callable[[torch.Tensor], list[Any]], expected: list[str]) -> None:
    """A trajectory takes its list's entries in turn, so one that jumps in it, or uses another list, is a new one."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        assert [letters(unet, cw, times) for times in loops(torch.arange(900, 0, -100))] == expected


def test_a_list_is_not_mistaken_for_one_at_its_old_address() -> None:
    clock, places = Clock(), []
    for _ in range(20):
        times = torch.linspace(900, 100, 9)
        places.append(clock.read(times[0])[1])
        del times  # its memory is free for the next one; its identity must not be
    assert len({place.times for place in places if place is not None}) == 20

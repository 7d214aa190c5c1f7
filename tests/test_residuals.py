"""Inputs that are added to feature maps, as a ControlNet's outputs: like the sample, they tell no branch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from tests.small_unet import Tiny, reference


class Steered(Tiny):
    """Takes what another network adds to it inside the region and outside, and pictures that it is conditioned on."""

    def forward(
        self,
        x: Tensor,
        t: Any,
        c: Tensor | None = None,
        *,
        top: Any = None,
        low: Any = None,
        mask: Any = None,
        by: Any = None,
    ) -> Tensor:
        x = x if mask is None else x + mask
        h = self.stem(x if by is None else torch.cat([x[:, :1], by], 1))
        z = self.down(h)
        if low is not None:
            z = z + 0.5 * low
        if c is not None:
            z = z + self.side(c)[:, :, None, None]
        z = self.up(self.body(self.act(z)))
        if top is not None:
            h += top
        return self.head(torch.cat([h, z], 1))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def maps() -> dict[str, Tensor]:
    return {"top": noise(1, 8, 8, 8), "low": noise(1, 16, 4, 4)}


def test_what_is_added_to_features_is_found_and_nothing_else() -> None:
    """Not what is added to the sample itself or put beside it, nor what reaches the features through a layer."""
    others = {"mask": noise(1, 2, 8, 8), "by": noise(1, 1, 8, 8)}
    region = ch.find_region(Steered(), noise(1, 2, 8, 8), 5.0, noise(1, 3), **maps(), **others)
    assert region.residuals == ("top", "low")


@torch.no_grad()
@pytest.mark.parametrize("passed", [False, True])
def test_new_ones_in_every_step_leave_the_schedule_alone(passed: bool) -> None:
    """Two branches in two calls, each with residuals of its own; the features are those of the branch's last step."""
    unet, texts = Steered(), (noise(1, 3), noise(1, 3))
    region = ch.find_region(unet, noise(1, 2, 8, 8), 5.0, texts[0], **maps()) if passed else None
    calls = [(t, text, noise(1, 2, 8, 8), maps()) for t in (900.0, 800.0, 700.0, 600.0) for text in (0, 1)]
    expected, exits = [], {}
    for k, (t, text, x, added) in enumerate(calls):
        exit = exits[text] if k // 2 in (1, 3) else None
        output, exits[text] = reference(unet, x.clone(), t, texts[text], exit=exit, **added)
        expected.append(output)
    with ch.wrap(unet, region=region) as cw, cw.trajectory():
        outputs = [unet(x, t, texts[text], **added) for t, text, x, added in calls]
        assert cw.stats.adaptor_passes == 4, cw.report()
    assert all(map(torch.equal, outputs, expected))


@torch.no_grad()
def test_where_they_begin_and_end_a_pass_is_full() -> None:
    unet = Steered()
    with ch.wrap(unet, schedule=lambda step: True) as cw, cw.trajectory():
        for t in range(900, 0, -100):
            unet(noise(1, 2, 8, 8), t, **(maps() if 400 <= t < 800 else {}))
    assert cw.stats.reasons["inputs or modes changed since the step before"] == 1  # where they end
    assert cw.stats.adaptor_passes == 6, cw.report()


@torch.no_grad()
def test_new_conditions_are_still_new() -> None:
    """A picture put beside the sample tells a branch: another one is not served by the features of the first."""
    unet = Steered()
    with ch.wrap(unet) as cw, cw.trajectory():
        for t in (900, 800, 700, 600):
            unet(noise(1, 2, 8, 8), t, by=noise(1, 1, 8, 8))
    assert cw.stats.adaptor_passes == 0
    assert cw.stats.reasons["conditions are new in this step"] == 2

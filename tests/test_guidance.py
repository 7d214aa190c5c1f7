"""Guided losses: scales, weights, functions; guidance in an interval, outside of which one branch is called alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.training.losses import guidance_weights, guided
from tests.small_unet import Tiny
from tests.training_parts import GUIDANCE, Small, by_hand, sampler

LOSSES = ("feature", "guided-feature", "guided-output")
TIMES = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0)
INTERVALS = {"stops": TIMES[:4], "starts": TIMES[4:], "between": TIMES[2:6]}


@pytest.fixture
def float64() -> Iterator[None]:
    """Adam divides by the gradient's size: one call or two differ by rounding alone, which it amplifies each step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def quick(unet: Tiny, generate: Any, **options: Any) -> ch.DistillResult:
    more = {"prompts": range(12), "batch": 2, "trajectories": 3, "hold": 1, "lr": 1e-2, "max_norm": None}
    return ch.distill(unet, Small(), generate, progress=False, **{"guidance": GUIDANCE, **more, **options})


def compare(unet: Tiny, within: Any, scale: Callable[[float], float | None], **options: Any) -> ch.DistillResult:
    """Train with both branches in one call, and see that the losses are Algorithm 1's with those scales."""
    batches: list[list[int]] = []
    generate = sampler(unet, TIMES, within=within)

    def watched(batch: list[int]) -> None:
        batches.append(batch)
        generate(batch)

    loss = options.setdefault("loss", "guided-output")
    result = quick(unet, watched, **options)
    expected = by_hand(
        unet, Small(), batches[1:], clock=2, loss=loss, lr=1e-2, times=TIMES, scale=scale, within=within
    )  # the first batch found the region
    assert result.losses == pytest.approx(expected, rel=1e-4)
    assert len(result.losses) == 3 * len(TIMES) // 2
    return result


@pytest.mark.parametrize("within", INTERVALS.values(), ids=INTERVALS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("float64")
def test_outside_of_an_interval_the_loss_is_of_the_only_branch(loss: str, within: tuple[float, ...]) -> None:
    """The batch is even, so its one branch could be taken for two."""
    unet = Tiny()
    one = compare(unet, within, lambda t: GUIDANCE if t in within else None, loss=loss)
    two = quick(unet, sampler(unet, TIMES, calls=2, within=within), loss=loss)
    assert two.losses == pytest.approx(one.losses, rel=1e-9)
    assert list(two.errors) == list(one.errors) == [2, 4, 6, 8]


def test_an_interval_that_begins_or_ends_at_an_adaptor_step() -> None:
    """One call: other rows, so a full pass. Two: the branch that was there is an adaptor pass, the new one is full."""
    unet, within = Tiny(), TIMES[1:5]  # steps 2 to 5
    one, two = (quick(unet, sampler(unet, TIMES, calls=calls, within=within)) for calls in (1, 2))
    assert list(one.errors) == [4, 8]
    assert list(two.errors) == [2, 4, 6, 8]
    assert all(loss < 10 for loss in (*one.losses, *two.losses))


def test_guidance_may_be_a_function_of_step_and_time(tmp_path: Path) -> None:
    asked: set[tuple[int, float | None]] = set()

    def falling(step: int, time: float | None) -> Any:
        asked.add((step, time))
        assert time is not None
        return (1 - time / 100, time / 100) if time > 500 else time / 100

    result = compare(Tiny(), None, lambda t: t / 100, guidance=falling, folder=tmp_path)
    assert asked == {(2, 800.0), (4, 600.0), (6, 400.0), (8, 200.0)}
    assert "falling(step, time)" in str(result.settings["guidance"])
    assert "falling(step, time)" in (tmp_path / "training.json").read_text()


def test_a_function_may_say_that_there_is_no_guidance() -> None:
    compare(
        Tiny(), None, lambda t: GUIDANCE if t > 500 else None, guidance=lambda step, t: GUIDANCE if t > 500 else None
    )


def test_what_a_function_returns_is_checked() -> None:
    unet = Tiny()
    with pytest.raises(ch.ArgumentError, match="guidance is a finite scale") as caught:
        quick(unet, sampler(unet), guidance=lambda step, time: "strong")
    assert "guidance: 'strong'" in str(caught.value)


def test_guided_combinations() -> None:
    plain, cond = torch.randn(2, 3), torch.randn(2, 3)
    expected = (plain + 4.0 * (cond - plain)).flatten()
    weights = guidance_weights(4.0)
    torch.testing.assert_close(guided([torch.cat([plain, cond])], [1], weights), expected)
    torch.testing.assert_close(guided([plain, cond], [1, 2], weights), expected)
    torch.testing.assert_close(guided([cond, plain], [1, 2], guidance_weights((4.0, -3.0))), expected)
    tiles = guided([torch.cat([plain, cond]), torch.cat([cond, plain])], [1, 1], weights)
    torch.testing.assert_close(tiles[:6], expected)
    torch.testing.assert_close(guided([plain], [1], None), plain.flatten())
    with pytest.raises(ch.DistillError, match="a weight for each branch"):
        guided([plain, cond, plain], [1, 2, 3], weights)

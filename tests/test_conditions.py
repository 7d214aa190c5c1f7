"""What was a call conditioned on? A private copy tells, however the tensor came to have other values, or not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clockwork_hooks.clock.conditions import Conditions

SMALL, LARGE = (2, 6, 6), (2, 100, 100)  # read where they lie; compared by an operator of torch


def _swap(value: Tensor) -> None:
    value.data = value.data.clone()


def _swap_other(value: Tensor) -> None:
    value.data = value.data + 1


def _shrink(value: Tensor) -> None:
    value.data = value.data[:1]


def _turn(value: Tensor) -> None:
    value.transpose_(1, 2)


def _turn_data(value: Tensor) -> None:
    value.data = value.data.transpose(1, 2)


def _sign_of_zero(value: Tensor) -> None:
    value.data[0, 0, 0] = -0.0


def _last(value: Tensor) -> None:
    value.data[-1, -1, -1] += 1


def _first(value: Tensor) -> None:
    value.data[0, 0, 1] += 1


CHANGES: list[tuple[Callable[[Tensor], object], bool]] = [
    (lambda value: None, True),
    (lambda value: value.mul_(1), True),  # written to, with the same values
    (_swap, True),
    (_swap_other, False),
    (_shrink, False),
    (_turn, False),
    (_turn_data, False),
    (_sign_of_zero, False),
    (_first, False),
    (_last, False),
]


def made(shape: tuple[int, ...]) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    value[0, 0, 0] = 0.0
    return value


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize(("change", "same"), CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_condition_that_was_changed_in_place(
    shape: tuple[int, ...], change: Callable[[Tensor], object], same: bool, inference: bool
) -> None:
    with torch.inference_mode(inference):
        value = made(shape)
        was = value.clone()
        known = Conditions([value])
        assert known.same([value])
        change(value)
        bits = value.shape == was.shape and torch.equal(value.contiguous().view(torch.int32), was.view(torch.int32))
        assert known.same([value]) == same == bits
        assert known.same([value.clone()]) == same  # another object, compared as a whole


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_bits_of_every_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = (made(shape) * 3).to(dtype)
    known = Conditions([value, 1, "text", None])
    assert known.same([value, 1, "text", None])
    assert not known.same([value, 2, "text", None])
    value.data[0, 0, 1] = value.data[0, 0, 1] == 0
    assert not known.same([value, 1, "text", None])


def test_not_a_number_is_itself() -> None:
    value = made(SMALL)
    value[0, 0, 1] = float("nan")
    assert Conditions([value]).same([value])


def test_the_memory_of_one_that_is_gone_is_not_read() -> None:
    """A new tensor, perhaps in the same memory and with the same values, is compared as a new one."""
    value = made(SMALL)
    known = Conditions([value])
    del value
    for other in range(8):
        assert known.same([made(SMALL)]), other
        assert not known.same([made(SMALL) + 1]), other
    assert known.same([made(SMALL)])


def test_one_that_is_gone_is_not_none() -> None:
    """A branch that was called with an embedding, then, that being gone, with none."""
    value = torch.zeros(2, 6, 6)
    kept = Conditions([value])
    del value
    assert not kept.same([None])

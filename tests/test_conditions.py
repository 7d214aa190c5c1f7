"""What was a call conditioned on? A private copy tells, however the tensor came to have other values, or not."""

import logging
import threading
import types
from array import array
from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

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


def tensor(shape: tuple[int, ...]) -> Tensor:
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
        value = tensor(shape)
        was = value.clone()
        remembered = Conditions([value])
        assert remembered.same([value])
        change(value)
        bits = value.shape == was.shape and torch.equal(value.contiguous().view(torch.int32), was.view(torch.int32))
        assert remembered.same([value]) == same == bits
        assert remembered.same([value.clone()]) == same  # another object, compared as a whole


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_bits_of_every_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = (tensor(shape) * 3).to(dtype)
    remembered = Conditions([value, 1, "text", None])
    assert remembered.same([value, 1, "text", None])
    assert not remembered.same([value, 2, "text", None])
    value.data[0, 0, 1] = value.data[0, 0, 1] == 0
    assert not remembered.same([value, 1, "text", None])


@pytest.mark.parametrize("begin", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bits_that_begin_anywhere(dtype: torch.dtype, begin: int) -> None:
    """A part of a larger tensor, which need not begin where eight bytes do, holds what its copy holds."""
    whole = torch.arange(3 * 8 + 4).to(dtype)
    part = whole[begin:][: 3 * 8].view(3, 8)
    for one, other in ((part.clone(), part), (part, part.clone()), (part.t(), part.t().clone())):
        conditions = Conditions([one])
        assert conditions.same([other])
        assert conditions.same_rows([other], [(2, 2)], one.shape[0], one.shape[0])
        other[2, 2] += 1
        assert not conditions.same([other])
        assert not conditions.same_rows([other], [(2, 2)], one.shape[0], one.shape[0])
        other[2, 2] -= 1


def test_not_a_number_is_itself() -> None:
    value = tensor(SMALL)
    value[0, 0, 1] = float("nan")
    assert Conditions([value]).same([value])


def test_the_memory_of_one_that_is_gone_is_not_read() -> None:
    """A new tensor, perhaps in the same memory and with the same values, is compared as a new one."""
    value = tensor(SMALL)
    remembered = Conditions([value])
    del value
    for other in range(8):
        assert remembered.same([tensor(SMALL)]), other
        assert not remembered.same([tensor(SMALL) + 1]), other
    assert remembered.same([tensor(SMALL)])


def test_one_that_is_gone_is_not_none() -> None:
    """A branch that was called with an embedding, then, that being gone, with none."""
    value = torch.zeros(2, 6, 6)
    remembered = Conditions([value])
    del value
    assert not remembered.same([None])


# -- what holds other things ------------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("__secret", "c")

    def __init__(self) -> None:
        self.c, self.__secret = torch.ones(2), 1


class Called(SimpleNamespace):
    def __call__(self) -> Tensor:
        return self.c


class Tagged(Tensor):
    pass


def deep() -> SimpleNamespace:
    value = SimpleNamespace(c=torch.ones(2))
    for _ in range(20):
        value = SimpleNamespace(inner=value)
    return value


def deepest(value: SimpleNamespace) -> SimpleNamespace:
    return deepest(value.inner) if hasattr(value, "inner") else value


def closure() -> Callable[[], Tensor]:
    c = torch.ones(2)
    return lambda: c


LOG = logging.getLogger(__name__)
SETTINGS = SimpleNamespace(strength=1.0)
OTHER = types.ModuleType("other")


class Strength:
    value = 1.0


def helper(x: float) -> float:
    return helpers_helper(x) if x > 1 else x


def helpers_helper(x: float) -> float:
    return helper(x - 1) * SETTINGS.strength


@lru_cache
def remembering(x: float) -> float:
    LOG.debug("computed")
    return x * SETTINGS.strength


def of_another_module() -> Callable[[], float]:
    OTHER.strength = 1.0  # type: ignore[attr-defined]
    return lambda: OTHER.strength


def of_a_class() -> Callable[[], float]:
    Strength.value = 1.0
    return lambda: Strength.value


def with_settings(function: Callable[..., Any]) -> Callable[[], Any]:
    def make() -> Any:
        SETTINGS.strength = 1.0
        return function

    return make


def strengthen(_: Any) -> None:
    SETTINGS.strength = 2.0


def tagged() -> Tensor:
    value = torch.ones(2).as_subclass(Tagged)
    value.strength = torch.ones(1)
    return value


class Options(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Unset:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a = 1

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], bool]] = {  # made, changed; are new ones the same?
    "slots": (Slots, lambda one: setattr(one, "c", torch.zeros(2)), True),
    "private slots": (Slots, lambda one: setattr(one, "_Slots__secret", 2), True),
    "callable": (lambda: Called(c=torch.ones(2)), lambda one: setattr(one, "c", torch.zeros(2)), True),
    "deque": (lambda: deque([torch.ones(1)], maxlen=1), lambda one: one.append(torch.zeros(1)), True),
    "set": (lambda: {1, "a"}, lambda one: one.add(2), True),
    "dict with a default": (lambda: defaultdict(list, a=[1]), lambda one: one["a"].append(2), True),
    "dict with another default": (lambda: defaultdict(list), lambda one: setattr(one, "default_factory", dict), True),
    "array": (lambda: array("i", [1]), lambda one: one.append(2), True),
    "a built-in method": (lambda: {"a": 1}.get, lambda one: one.__self__.update(a=2), True),
    "a shape": (lambda: SimpleNamespace(a=torch.Size([1])), lambda one: setattr(one, "a", torch.Size([2])), True),
    "an item is asked for any attribute": (lambda: Options(a=[1]), lambda one: one["a"].append(2), True),
    "unset slots are asked for": (Unset, lambda one: setattr(one, "a", 2), True),
    "dict": (lambda: {"a": [torch.ones(1)]}, lambda one: one["a"].append(1), True),
    "twenty deep": (deep, lambda one: deepest(one).c.data.add_(1), True),
    "closure": (closure, lambda one: one.__closure__[0].cell_contents.data.add_(1), True),
    "a comprehension": (with_settings(lambda x: {SETTINGS.strength * y for y in x}), strengthen, True),
    "a function within": (with_settings(lambda x: lambda: SETTINGS.strength * x), strengthen, True),
    "what its helpers read": (with_settings(lambda x: helper(x)), strengthen, True),
    "what one that remembers reads": (with_settings(lambda x: remembering(x)), strengthen, True),
    "a class of its module": (of_a_class, lambda _: setattr(Strength, "value", 2.0), True),
    "a setting of another module": (of_another_module, lambda _: setattr(OTHER, "strength", 2.0), True),
    "partial": (lambda: partial(print, torch.ones(2)), lambda one: one.args[0].data.add_(1), True),
    "a list with an attribute": (lambda: Names("a"), lambda one: setattr(one, "scale", 2), True),
    "text with an attribute": (lambda: Word("a"), lambda one: setattr(one, "scale", 2), True),
    "module": (lambda: torch.nn.Linear(2, 2), lambda one: one.weight.requires_grad_(False).add_(1), False),
    "module's switch": (lambda: torch.nn.Linear(2, 2), lambda one: one.eval(), False),
    "tensor of a subclass": (tagged, lambda one: setattr(one, "strength", torch.zeros(1)), False),
}


class Names(list[str]):
    scale = 1


class Word(str):
    scale = 1


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_other_things_is_compared_by_them(name: str) -> None:
    make, change, new_ones_too = HOLDERS[name]
    value = make()
    conditions = Conditions([value])
    assert conditions.same([value])
    assert conditions.same([make()]) == new_ones_too
    change(value)
    assert not conditions.same([value])


@pytest.mark.parametrize("make", [threading.Lock, lambda: iter([1]), lambda: {object()}, lambda: [[0] * 5000]])
def test_what_cannot_be_taken_apart_is_never_the_same(make: Callable[[], Any]) -> None:
    value = make()
    assert not Conditions([value]).same([value])


def test_values_that_are_equal_but_not_the_same() -> None:
    for one, other in ((0.0, -0.0), (1, 1.0), (1, True), ("1", 1), ([1], (1,)), ({1: 2, 3: 4}, {3: 4, 1: 2})):
        assert not Conditions([one]).same([other])
    circle: list[Any] = []
    circle.append(circle)
    assert Conditions([circle]).same([circle])


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a row of a table with odd rows": lambda: torch.arange(21.0).view(3, 7)[1:2, :6],
    "no columns, of rows that lie one apart": lambda: torch.zeros(3, 0),
    "a column of numbers larger than eight bytes": lambda: torch.ones(1, 5, dtype=torch.complex128).t(),
    "an odd stride that nothing follows": lambda: torch.arange(8, dtype=torch.int32).as_strided((1, 2), (3, 1)),
    "an element that is expanded": lambda: torch.ones(()).expand(1, 8),
    "the middle of eight bytes": lambda: torch.arange(8, dtype=torch.int32)[1:5],
    "transposed": lambda: torch.arange(8.0).view(2, 4).t(),
    "several axes, in another order": lambda: torch.arange(32.0).view(2, 4, 4).transpose(0, 1),
    "one number": lambda: torch.ones((), dtype=torch.int16),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_how_a_tensor_lies_in_memory_does_not_matter(make: Callable[[], Tensor]) -> None:
    value = make()
    conditions, dense = Conditions([value]), value.clone(memory_format=torch.contiguous_format)
    assert conditions.same([make()])
    assert conditions.same([dense])
    assert Conditions([dense]).same([value])
    if value.numel():
        dense.view(-1)[-1] += 1
        assert not conditions.same([dense])

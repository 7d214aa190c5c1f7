"""The proof itself: it sees what it should, counts calls, and leaves the model as it was."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.proof import map_tensors, nan_proof, same

Pair = namedtuple("Pair", "left right")


@dataclass
class Output:
    sample: Tensor
    aside: Any = None


class Tower(nn.Module):
    """a → b → (twice the shared c) → out, with a skip from a."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.box = nn.Sequential(self.b, self.c)

    def forward(self, x: Tensor) -> Output:
        a = self.a(x)
        inner = self.box(a)
        return Output(self.c(inner) + a)


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().eval()


X = (torch.ones(2, 3),)


def test_true_for_a_region_and_false_beyond_it(tower: Tower) -> None:
    assert nan_proof(tower, X, {}, "c", 1, {"b": {0}})
    assert nan_proof(tower, X, {}, "c", 1, {"b": {0}, "c": {0}})
    assert nan_proof(tower, X, {}, "c", 1, {"box": {0}})
    assert not nan_proof(tower, X, {}, "c", 1, {"a": {0}, "b": {0}})
    assert not nan_proof(tower, X, {}, "b", 0, {"c": {0}})


def test_calls_inside_of_a_replaced_call_are_counted(tower: Tower) -> None:
    # c's first call lies in box; box is answered without running, and c's second call is still its second.
    assert nan_proof(tower, X, {}, "box", 0, {"b": {0}})
    assert not nan_proof(tower, X, {}, "box", 0, {"c": {1}})


def test_a_call_that_does_not_happen_is_an_error(tower: Tower) -> None:
    with pytest.raises(ValueError, match="call 2 of a Linear"):
        nan_proof(tower, X, {}, "c", 2, {})
    with pytest.raises(ValueError, match="call 7 of a Linear"):
        nan_proof(tower, X, {}, "c", 1, {"b": {7}})


def test_the_model_and_the_arguments_are_left_alone(tower: Tower) -> None:
    tower.b.forward = tower.b.forward  # somebody else's patch stays
    before = [(dict(vars(module)), dict(module._forward_hooks)) for module in tower.modules()]
    x = torch.ones(2, 3)
    nan_proof(tower, (x,), {}, "c", 1, {"b": {0}, "box": {0}})
    with pytest.raises(ValueError, match="did not happen"):
        nan_proof(tower, (x,), {}, "c", 9, {})
    tower.a.register_forward_pre_hook(_fail_second_time())
    with pytest.raises(RuntimeError, match="second"):
        nan_proof(tower, (x,), {}, "c", 1, {"b": {0}})
    tower.a._forward_pre_hooks.clear()
    assert [(dict(vars(module)), dict(module._forward_hooks)) for module in tower.modules()] == before
    assert torch.equal(x, torch.ones(2, 3))


def _fail_second_time() -> Any:
    seen = []

    def fail(_module: nn.Module, _args: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("the second run failed")

    return fail


def test_random_models_are_seeded() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    assert nan_proof(model, X, {}, "0", 0, {})


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        (torch.ones(2), 1),
        [torch.ones(2)],
        {"a": torch.ones(2)},
        Pair(torch.ones(2), None),
        Output(torch.ones(2)),
    ],
)
def test_structures_are_kept_and_compared(value: Any) -> None:
    copy = map_tensors(Tensor.clone, value)
    assert type(copy) is type(value)
    assert same(value, copy)
    assert not same(value, map_tensors(lambda tensor: tensor + 1, value))
    assert not same(value, map_tensors(lambda tensor: tensor * float("nan"), value))
    assert not same(copy, [copy])

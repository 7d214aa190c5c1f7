"""Skipped modules that hand their results on by what they leave behind: in a dictionary, an object, a list, memory.

What a call returns is one way in which the exit comes to the code outside of the region; these are the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.small_unet import Tiny

TIMES = torch.linspace(900, 200, 8)
Put = Callable[[Any, Any], None]


class Part(nn.Module):
    """Works on `state.x` or `state["x"]`, and returns nothing, the state, or the tensor; by an operator of its own."""

    def __init__(self, inner: nn.Module, returns: str, *, doubles: bool) -> None:
        super().__init__()
        self.inner, self.returns, self.doubles = inner, returns, doubles

    def forward(self, state: Any) -> Any:
        record = isinstance(state, SimpleNamespace)
        x = self.inner(state.x if record else state["x"])
        x = 2 * x if self.doubles else x
        if record:
            state.x = x
        else:
            state["x"] = x
        return {"nothing": None, "state": state, "tensor": x}[self.returns]


class Stateful(Tiny):
    """All that is skipped works on one state, which holds the skip too."""

    def __init__(self, kind: type, returns: str, *, uses_result: bool = False, doubles: bool = False) -> None:
        super().__init__()
        self.kind, self.uses_result = kind, uses_result
        self.parts = nn.ModuleList(
            Part(one, returns, doubles=doubles) for one in (self.down, self.act, self.body, self.up)
        )
        del self.down, self.act, self.body, self.up

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + self.emb(t.reshape(1, 1) / 100).sin()[:, :, None, None]
        state = self.kind(x=h, h=h)
        for part in self.parts:
            returned = part(state)
            state = returned if self.uses_result else state
        h, z = (state.h, state.x) if self.kind is SimpleNamespace else (state["h"], state["x"])
        return self.head(torch.cat([h, z], 1))


class Upsampler(nn.Module):
    """Makes the exit, and leaves it somewhere."""

    def __init__(self, inner: nn.Module, put: Put) -> None:
        super().__init__()
        self.inner, self.put = inner, put

    def forward(self, z: Tensor, place: Any) -> Tensor:
        result: Tensor = self.inner(z)
        self.put(self, (place, result))
        return result


class Leaves(Tiny):
    """Reads the exit where the upsampler has put it, not what it returns."""

    def __init__(self, place: Callable[[Tensor], Any], put: Put, read: Callable[[Upsampler, Any], Tensor]) -> None:
        super().__init__()
        self.place, self.read = place, read
        self.upsampler = Upsampler(self.up, put)
        del self.up

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + self.emb(t.reshape(1, 1) / 100).sin()[:, :, None, None]
        place = self.place(h)
        self.upsampler(self.body(self.act(self.down(h))), place)
        return self.head(torch.cat([h, self.read(self.upsampler, place)], 1))


LEAVES: dict[str, tuple[Callable[[Tensor], Any], Put, Callable[[Upsampler, Any], Tensor]]] = {
    "a new entry": (lambda h: {}, lambda _, both: both[0].update(z=both[1]), lambda _, place: place["z"]),
    "an entry that is looked for": (
        lambda h: {},
        lambda _, both: both[0].update(z=both[1]),
        lambda _, place: place.get("z", torch.zeros(1, 8, 8, 8)),
    ),
    "the last of a list": (
        lambda h: [h, h],
        lambda _, both: both[0].__setitem__(-1, both[1]),
        lambda _, place: place[-1],
    ),
    "one more in a list": (lambda h: [h], lambda _, both: both[0].append(both[1]), lambda _, place: place[-1]),
    "memory from outside": (torch.empty_like, lambda _, both: both[0].copy_(both[1]), lambda _, place: place),
    "memory with values": (torch.clone, lambda _, both: both[0].add_(both[1]), lambda _, place: place),
    "part of it": (
        lambda h: torch.zeros(1, 16, 8, 8),
        lambda _, both: both[0][:, 4:12].copy_(both[1]),
        lambda _, place: place[:, 4:12],
    ),
    "its module": (
        lambda h: None,
        lambda module, both: setattr(module, "last", both[1]),
        lambda module, _: module.last,
    ),
}


def held(model: nn.Module, exit: Tensor | None, path: str) -> Iterator[list[Tensor]]:
    """While it goes on, the innermost module that makes the exit returns this one; what it has returned."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        seen.append((output if exit is None else exit).clone())
        return exit

    handle = model.get_submodule(path).register_forward_hook(hook)
    yield seen
    handle.remove()


def rollout(unet: nn.Module, path: str, **options: Any) -> str:
    """Which passes were the adaptor's; each returns what the plain UNet does, with the exit before held by hand."""
    plain, letters, exit = copy.deepcopy(unet), "", None
    with torch.no_grad(), ch.wrap(unet, **options) as cw:
        for t in TIMES:
            x, passes = torch.randn(1, 2, 8, 8), cw.stats.adaptor_passes
            output = unet(x, t)
            skipped = cw.stats.adaptor_passes > passes
            for seen in held(plain, exit if skipped else None, path):
                assert torch.equal(output, plain(x, t)), letters
                exit = seen[-1]
            letters += "A" if skipped else "F"
    return letters


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("uses_result", [False, True])
@pytest.mark.parametrize("returns", ["nothing", "state", "tensor"])
@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_modules_that_work_on_one_state(kind: type, returns: str, uses_result: bool, doubles: bool) -> None:
    """Whether the code outside reads the state that it has, or the one that a call returns."""
    if uses_result and returns != "state":
        return
    unet = Stateful(kind, returns, uses_result=uses_result, doubles=doubles)
    assert rollout(unet, "parts.3.inner") == "FAFAFAFA"


@pytest.mark.parametrize("schedule", [None, lambda step: True])
@pytest.mark.parametrize("name", LEAVES)
def test_an_exit_that_is_read_where_it_was_left(name: str, schedule: Any) -> None:
    assert rollout(Leaves(*LEAVES[name]), "upsampler.inner", schedule=schedule) == (
        "FAFAFAFA" if schedule is None else "FAAAAAAA"
    )


class Hidden:
    """Holds what it is given where nobody who walks arguments finds it."""

    def __init__(self) -> None:
        self.get, self.put = Hidden.made()

    @staticmethod
    def made() -> tuple[Callable[[], Any], Callable[[Any], None]]:
        held: list[Any] = []
        return lambda: held[-1], held.append


UNSEEN: dict[str, tuple[Callable[[Tensor], Any], Put, Callable[[Upsampler, Any], Tensor]]] = {
    "a closure": (lambda h: Hidden(), lambda _, both: both[0].put(both[1]), lambda _, place: place.get()),
    "a closure with a default": (
        lambda h: (hidden := Hidden(), hidden.put(h))[0],
        lambda _, both: both[0].put(both[1]),
        lambda _, place: place.get(),
    ),
    "another module": (
        lambda h: ANOTHER,
        lambda _, both: setattr(both[0], "last", both[1]),
        lambda _, place: place.last,
    ),
    "a set": (lambda h: set(), lambda _, both: both[0].add(both[1]), lambda _, place: next(iter(place))),
}
ANOTHER = nn.Module()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.parametrize("schedule", [None, lambda step: True])
@pytest.mark.parametrize("name", UNSEEN)
def test_who_does_not_read_the_exit_that_a_pass_gives_is_full(name: str, schedule: Any) -> None:
    """The first adaptor pass sees that nobody has read it, and is run again."""
    assert rollout(Leaves(*UNSEEN[name]), "upsampler.inner", schedule=schedule) == "F" * 8


def test_at_another_size_and_compiled() -> None:
    unet = Stateful(dict, "state")
    plain = copy.deepcopy(unet)
    with torch.no_grad(), ch.wrap(unet, schedule=lambda step: True) as cw:
        for size in (8, 16, 12):
            exit = None
            for t in TIMES.clone():
                x = torch.randn(1, 2, size, size)
                passes = cw.stats.adaptor_passes
                output = unet(x, t)
                for seen in held(plain, exit if cw.stats.adaptor_passes > passes else None, "parts.3.inner"):
                    assert torch.equal(output, plain(x, t))
                    exit = seen[-1]
        assert cw.stats.adaptor_passes == 21
        cw.compile(backend="eager")
        exit = None
        for t in TIMES.clone():
            x, passes = torch.randn(1, 2, 8, 8), cw.stats.adaptor_passes
            output = unet(x, t)
            for seen in held(plain, exit if cw.stats.adaptor_passes > passes else None, "parts.3.inner"):
                assert torch.equal(output, plain(x, t))
                exit = seen[-1]
        assert cw.stats.adaptor_passes == 28

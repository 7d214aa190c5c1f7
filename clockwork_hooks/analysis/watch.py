"""Look into the calls that a sampler makes: the first one's arguments, and every call's step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks.attach import wrap
from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph import Trace, record
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.tree import map_leaves

__all__ = ["Generate", "Watch", "check_clocks", "check_runs", "final", "first_call", "reference"]

Generate = Callable[[Any, int], Tensor]


class _Enough(BaseException):
    """Leaves a sampling loop, through whatever it catches."""


def check_runs(generate: Generate, conditions: Iterable[Any], seeds: Sequence[int]) -> list[Any]:
    """The batches of conditions, as a list.

    Raises:
        ArgumentError: there are none, or no seeds; or `generate` is no function.
    """
    if not callable(generate) or isinstance(conditions, str) or not isinstance(conditions, Iterable):
        raise ArgumentError(
            "generate(batch, seed) is a function, and conditions a list of batches for it",
            seen={"generate": type(generate).__name__, "conditions": repr(conditions)[:80]},
            do="pass measure(unet, generate, [batch])",
        )
    batches = list(conditions)
    if not isinstance(seeds, Sequence):
        raise ArgumentError("seeds are a sequence of ints", seen={"seeds": repr(seeds)}, do="pass seeds=(0, 1)")
    if not batches or not seeds:
        raise ArgumentError(
            "a measurement needs conditions and seeds",
            seen={"batches": len(batches), "seeds": len(seeds)},
            do="pass at least one of each",
        )
    return batches


def check_clocks(clocks: Sequence[int]) -> None:
    """Clocks to compare with are ints of at least 2.

    Raises:
        ArgumentError: one is not, or there is none.
    """
    given = clocks if isinstance(clocks, Sequence) else ()
    if not given or any(isinstance(clock, bool) or not isinstance(clock, int) or clock < 2 for clock in given):
        raise ArgumentError("clocks that skip are ints of at least 2", seen={"clocks": clocks}, do="pass clocks=(2,)")


def first_call(unet: nn.Module, generate: Generate, batch: Any, seed: int) -> Trace:
    """Trace the first call that `generate(batch, seed)` makes; the loop goes no further.

    Raises:
        ArgumentError: it makes none.
        TraceError: the call could not be recorded.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)))
        raise _Enough

    handle = unet.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            generate(batch, seed)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not seen:
        raise _never(unet)
    return record(unet, *seen[0])


def final(unet: nn.Module, generate: Generate, batch: Any, seed: int) -> Tensor:
    """What `generate(batch, seed)` returns: one tensor, samples first.

    Raises:
        ArgumentError: it returns something else.
    """
    with torch.no_grad():
        made = generate(batch, seed)
    if not isinstance(made, Tensor) or made.ndim < 2 or not made.is_floating_point():
        seen = f"{tuple(made.shape)} {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
        raise ArgumentError(
            "generate(batch, seed) returns one tensor of floats, samples first",
            seen={"returned": seen},
            do="return the pictures, or the last latents",
        )
    return made.detach()


def reference(unet: nn.Module, generate: Generate, batch: Any, seed: int) -> Tensor:
    """What `generate(batch, seed)` returns of the UNet as it is, to compare with.

    Raises:
        ArgumentError: it is not finite: errors could not be told.
    """
    made = final(unet, generate, batch, seed)
    if not bool(made.isfinite().all()):
        raise ArgumentError(
            "results are finite numbers without adaptor passes",
            seen={"seed": seed, "not finite": f"{int((~made.isfinite()).sum())} of {made.numel()} values"},
            do="mend the sampler, or its dtype, first",
        )
    return made


class Watch:
    """Tells the step of the call that is under way; a context manager around any number of trajectories.

    The UNet is wrapped with a schedule of full passes alone: nothing changes, and steps are placed as in use.

    Attributes:
        step: denoising step of the call under way, or of the last one; from 1.
        calls: how many there were in this trajectory.
        branch: (guidance branch, which of its calls in the step) of the call under way, or of the last one.
        usable: may the call under way use the adaptor, if the schedule says so? Some are in doubt whatever it says.
    """

    def __init__(self, unet: nn.Module, region: Region) -> None:
        self.unet, self.step, self.calls = unet, 0, 0
        self.branch, self.usable = (1, 0), False
        self._before: dict[tuple[int, int, int], int] | None = None
        self._wrapper = wrap(unet, schedule=Schedule.where(lambda step: False), region=region)
        self._handles = [  # each after the wrapper's own
            unet.register_forward_pre_hook(self._place),
            unet.register_forward_hook(self._settle),
        ]

    def _place(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        position = self._wrapper.position
        self.calls, self._before = self.calls + 1, None
        if position is not None:
            self.step, self.branch = position.step, (position.branch.number, position.ordinal)
            self.usable = position.doubt is None and position.before is not None
        else:  # this call is being traced: which branch's it is will be known when it is over
            self.step, self.branch, self.usable = max(self.step, 1), (0, self.calls), False
            self._before = self._counts()

    def _settle(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a call that was traced: where it was."""
        if self._before is None:
            return
        for (trajectory, step, branch), count in self._counts().items():
            if self._before.get((trajectory, step, branch)) != count:
                self.step, self.branch = step, (branch, count - 1)

    def _counts(self) -> dict[tuple[int, int, int], int]:
        """(trajectory, step, branch) → its calls so far, of every branch that the wrapper remembers."""
        timeline = self._wrapper._engine.states.current().timeline
        return {(timeline.trajectory, one.step, one.number): len(one.calls) for one in timeline.branches}

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[Watch]:
        """Watch one run of the sampler.

        Raises:
            ArgumentError: it never called the UNet.
        """
        self._wrapper.reset()
        self.step = self.calls = 0
        yield self
        if not self.calls:
            raise _never(self.unet)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._wrapper.remove()


def _never(unet: nn.Module) -> ArgumentError:
    return ArgumentError(
        "generate(batch, seed) samples with the UNet that is looked into",
        seen={"calls of the UNet": 0, "unet": type(unet).__name__},
        do="let it call this very UNet object, not a copy or a compiled one",
    )

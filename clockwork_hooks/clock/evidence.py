"""Are the calls of a loop that declares nothing the steps of one trajectory? What their times tell."""

from __future__ import annotations

from typing import Any

from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.times import Place

__all__ = ["Jumps", "Strides"]

EQUAL_STRIDES = 2  # as often as this the stride was the one before
FORETOLD_STRIDES = 3  # or as often as this it was what the two before it foretell
_EQUAL, _NEAR, _ROUNDING = 0.01, 0.25, 1.01


class Strides:
    """The strides of plain times: numbers, or a new tensor for each call.

    Times drawn at random, as in score distillation, are no trajectory, and a stride off the trend is perhaps a restart.
    Equal strides are a trend, and so are those that shrink or grow as on Karras', exponential or shifted grids: the
    next one lies near what the two before it foretell, by their difference or by their ratio. Of times at random one
    call in 100,000 passes for a step of a trajectory.

    Args:
        trusted: the caller says that the calls are of one run, so that no evidence is asked for.

    Example:
        >>> strides = Strides()
        >>> [strides.doubt(stride) is None for stride in (50, 50, 50, 50, 90, 50)]
        [False, False, True, True, False, False]
    """

    __slots__ = ("_equal", "_foretold", "_last", "trusted")

    def __init__(self, *, trusted: bool = False) -> None:
        self.trusted = trusted
        self._last: tuple[float, ...] = ()
        self._equal = self._foretold = 0

    def doubt(self, stride: float) -> str | None:
        """Why the call that came with this stride may not be of the next step; None where it is."""
        last = self._last
        if last and _equal(last[-1], stride):
            self._equal, self._foretold = self._equal + 1, self._foretold + 1
        elif len(last) == 2 and _near(*last, stride):
            self._equal, self._foretold = 0, self._foretold + 1
        elif len(last) == 2:
            self._last, self._equal, self._foretold = (stride,), 0, 0
            return reasons.STRIDE
        self._last = (*last, stride)[-2:]
        believed = self.trusted or self._equal >= EQUAL_STRIDES or self._foretold >= FORETOLD_STRIDES
        return None if believed else reasons.EVIDENCE


def _equal(before: float, stride: float) -> bool:
    return abs(stride - before) <= max(_EQUAL * before, _ROUNDING if min(before, stride) >= 2 else 0.0)


def _near(one: float, two: float, stride: float) -> bool:
    foretold = two * two / one, max(2 * two - one, 0.0)
    slack = 2 * _ROUNDING if min(one, two, stride) >= 2 else 0.0  # times rounded to integers
    return min(foretold) * (1 - _NEAR) - slack <= stride <= max(foretold) * (1 + _NEAR) + slack


class Jumps:
    """How a trajectory moves in its list of times: a sampler takes the entries in turn, from one end to the other.

    One that begins within the list, or leaves entries out, needs evidence, as entries may be drawn at random; but not
    in a list that has been walked along before, that way.

    Args:
        trusted: the caller says that the calls are of one run, so that no evidence is asked for.

    Example:
        >>> import torch
        >>> from clockwork_hooks._tree import held
        >>> times = torch.linspace(900, 0, 10)
        >>> place = lambda index: Place(held(times.untyped_storage()), index)
        >>> jumps = Jumps()
        >>> jumps.begin(place(4))
        >>> [jumps.doubt(place(index)) is None for index in (5, 6, 7)]
        [False, True, True]
    """

    __slots__ = ("_begins_outermost", "_count", "_jump", "_place", "_walked", "trusted")

    def __init__(self, *, trusted: bool = False) -> None:
        self.trusted = trusted
        self._walked: Any = None
        self.leave()

    def leave(self) -> None:
        """The next trajectory may begin anywhere."""
        self._place: Place | None = None
        self._jump, self._count, self._begins_outermost = 0, 0, False

    def begin(self, place: Place | None) -> None:
        """A trajectory begins here, as the jump to this place was not the one before it; the next may be like it."""
        jump = self.to(place) if place is not None else None
        self._jump, self._count = (jump, 1) if jump else (0, 0)
        self.stay(place)
        self._begins_outermost = place is not None and place.outermost

    def stay(self, place: Place | None) -> None:
        """The step goes on at this place."""
        self._place = place

    def to(self, place: Place | None) -> int | None:
        """Entries from the last place to this one; None in another list. 0 where neither is in one."""
        if place is None or self._place is None:
            return 0 if place is self._place else None
        return place.index - self._place.index if place.times == self._place.times else None

    def regular(self, jump: int | None, *, second: bool) -> bool:
        """May what came with this jump be the next step? `second`: of the trajectory."""
        return jump is not None and (jump in (0, self._jump) or (second and abs(jump) == 1))

    def doubt(self, place: Place) -> str | None:
        """Move on to this place of the list: why that may not be the next step's; None where it is."""
        jump = self.to(place) or 0
        self._count = self._count + 1 if jump == self._jump else 1
        self._jump, self._place = jump, place
        neighbours = abs(jump) == 1
        if neighbours and self._count >= (2 if self._begins_outermost else 3):
            self._walked = (place.times, jump)
        walked = self._walked == (place.times, jump)
        believed = self._begins_outermost or self._count >= 2 or walked
        return None if self.trusted or (neighbours and believed) or self._count >= 3 else reasons.EVIDENCE

"""Are the calls of a loop that declares nothing the steps of one trajectory? What their times tell."""

from __future__ import annotations

from typing import Any

from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.times import Place

__all__ = ["Jumps", "MixedTimes", "Strides"]

EQUAL_STRIDES = 2  # as often as this the stride was the one before
FORETOLD_STRIDES = 3  # or as often as this it was what the two before it foretell
_EQUAL, _NEAR, _ROUNDING = 0.01, 0.25, 1.01
_CONFIRMED = 2  # intervals of the list that have to look like the one before
_SAME = 0.001  # of an interval


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


class MixedTimes:
    """Sees that the times of a loop walk along a list, with computed ones at the same places of every interval.

    EDM's sampler computes each step's first time and takes the second one from the list; the midpoint method computes a
    time half-way between two entries. Each of these calls, alone, looks like the first one of a trajectory.

    Example:
        >>> import torch
        >>> from clockwork_hooks.clock.times import TimeReader
        >>> times, reader, mixed = torch.tensor([9.0, 8.0, 6.0, 3.0, 1.0]), TimeReader(), MixedTimes()
        >>> steps = [(times[k], (times[k] + times[k + 1]) / 2) for k in range(4)]
        >>> [mixed.fits(*reader.read(time)) for step in steps for time in step]
        [False, False, False, False, False, False, True, True]
    """

    __slots__ = ("_computed", "_confirmed", "_fractions", "_last", "_place", "_way", "both")

    def __init__(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Nothing of what was seen matters any more."""
        self._place: Place | None = None  # of the last entry
        self._computed: list[float] = []  # since then
        self._fractions: tuple[float, ...] = ()  # where in the interval before the computed ones were
        self._confirmed, self._way = 0, 0
        self._last: tuple[float, bool] | None = None
        self.both = False

    def fits(self, time: float, place: Place | None) -> bool:
        """Is a call at this time the next one of such a loop, as far as it is known by now?"""
        if self._last != (time, place is None):  # else another call of the same evaluation
            self.both = self.both or (self._last is not None and self._last[1] is not (place is None))
            self._last = (time, place is None)
            if not (self._computes(time) if place is None else self._enters(place)):
                self._confirmed = 0
        return self.believed

    @property
    def believed(self) -> bool:
        """Was the last call of such a loop?"""
        return self._confirmed >= _CONFIRMED

    def _computes(self, time: float) -> bool:
        """A computed time: the next of an interval, where the interval before had one?"""
        self._computed.append(time)
        if self._place is None or not self._confirmed:
            self._computed = self._computed[-8:]
            return False
        fractions, ordinal = self._within(self._place, self._way), len(self._computed) - 1
        return ordinal < len(self._fractions) and abs(fractions[-1] - self._fractions[ordinal]) <= _SAME

    def _enters(self, place: Place) -> bool:
        """An entry of the list: the next one, after as many computed times as in the interval before?"""
        before, self._place, confirmed = self._place, place, False
        if before is not None and before.times == place.times and before.values is not None:
            way = place.index - before.index
            fractions = self._within(before, way) if abs(way) == 1 else ()
            alike = len(fractions) == len(self._fractions) and way == self._way
            confirmed = alike and all(abs(a - b) <= _SAME for a, b in zip(fractions, self._fractions, strict=True))
            confirmed = confirmed and bool(fractions)
            self._fractions, self._way = fractions, way
            self._confirmed += confirmed
        self._computed = []
        return confirmed

    def _within(self, place: Place, way: int) -> tuple[float, ...]:
        """Where the computed times stand between this entry and the one next to it: 0 to 1."""
        values = place.values
        if not self._computed:
            return ()
        if values is None or not 0 <= place.index + way < len(values):
            return (float("inf"),) * len(self._computed)
        first, second = float(values[place.index]), float(values[place.index + way])
        return tuple((time - first) / (second - first or 1.0) for time in self._computed)

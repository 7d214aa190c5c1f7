"""Times that are partly entries of a list and partly computed between them, as in EDM's sampler and Runge-Kutta."""

from __future__ import annotations

from clockwork_hooks.clock.times import Place

__all__ = ["MixedTimes"]

_CONFIRMED = 2  # intervals of the list that have to look like the one before
_NEAR = 0.001  # of an interval


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
        return ordinal < len(self._fractions) and abs(fractions[-1] - self._fractions[ordinal]) <= _NEAR

    def _enters(self, place: Place) -> bool:
        """An entry of the list: the next one, after as many computed times as in the interval before?"""
        before, self._place, confirmed = self._place, place, False
        if before is not None and before.times == place.times and before.values is not None:
            way = place.index - before.index
            fractions = self._within(before, way) if abs(way) == 1 else ()
            alike = len(fractions) == len(self._fractions) and way == self._way
            confirmed = alike and all(abs(a - b) <= _NEAR for a, b in zip(fractions, self._fractions, strict=True))
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

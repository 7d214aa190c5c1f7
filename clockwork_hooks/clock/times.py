"""The time of a call: as a number, as evidence of the steps of a trajectory, and in the other forms of some inputs."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from clockwork_hooks._tree import address, held, version
from clockwork_hooks.clock import reasons
from clockwork_hooks.graph.arguments import is_number

_LARGEST_LIST = 1 << 16  # elements
_GRID = 1e5  # values of a list that lie so close, relative to its whole range, are one


@dataclass(slots=True)
class Place:
    """Where a time stands in a list of times.

    Attributes:
        times: the list; the weak reference keeps its address from being used for another one.
        index: which entry.
        outermost: is it the first or the last one?
        ordered: does the list go from each value to the next one of its values? One that was drawn at random does not.
        values: what is in the list.
    """

    times: Any
    index: int
    outermost: bool = field(default=False, compare=False)
    ordered: bool = field(default=True, compare=False)
    values: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Copy:
    """A copy of a storage in main memory.

    Attributes:
        storage: of what; the weak reference keeps its address from being used for another one.
        version: its counter of in-place writes then.
        values: what was in it.
        varied: does it hold different values? A list of times does, one time for each row does not.
    """

    storage: Any
    version: int
    values: torch.Tensor
    varied: bool

    @functools.cached_property  # asked of lists alone: of one time for each of 1,024 rows it takes 75 µs a call
    def ordered(self) -> bool:
        """Does none leave out another one, on the way from the one before?"""
        return _ordered(self.values)


class TimeReader:
    """Reads the time input as a number.

    Most loops hand over views of one list of times, so one copy of that list serves the whole trajectory.

    Example:
        >>> times, reader = torch.tensor([900.0, 800.0]), TimeReader()
        >>> time, place = reader.read(times[1])
        >>> time, place.index, reader.read(700)
        (800.0, 1, (700.0, None))
    """

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def read(self, value: Any) -> tuple[float | None, Place | None]:
        """The time, None if it cannot be told or differs between rows; and its place, if it comes from a list.

        NaN and infinity are no times: a stride from there, or to there, says nothing.

        Args:
            value: a number, or a tensor with one element or one per row.
        """
        if not isinstance(value, torch.Tensor):
            return (_finite(value) if is_number(value) else None), None
        count = value.numel()
        if value.is_meta or count == 0 or isinstance(value, FakeTensor):
            return None, None
        storage, place, is_cpu = value.untyped_storage(), None, value.is_cpu
        size = storage.nbytes() // value.dtype.itemsize
        one = count == 1 or not any(value.stride())  # one entry, or one that is expanded to all rows
        listed = one and size > 1
        if size <= _LARGEST_LIST and (listed or not is_cpu):
            copy = self._copy(value, storage, trusted=listed)
            if listed and copy.varied:
                index = int(value.storage_offset())
                place = Place(copy.storage, index, index in (0, size - 1), copy.ordered, copy.values)
            if not is_cpu:
                value = copy.values.as_strided(value.shape, value.stride(), value.storage_offset())
        if count > 1:
            first = value.flatten()[0]
            if not one and not bool((value == first).all()):
                return None, None
            value = first
        number = value.tolist()
        while isinstance(number, list):  # an operator that reshapes would take 8 µs where caches are cold
            number = number[0]
        number = _finite(number)
        return number, None if number is None else place

    def _copy(self, value: torch.Tensor, storage: torch.UntypedStorage, *, trusted: bool) -> _Copy:
        """The storage's copy, made again when it was written to; where no counter tells, only a list is trusted."""
        key, written = address(storage), version(value)
        copy = self._copies.get(key)
        same = copy is not None and copy.version == written and copy.values.dtype == value.dtype
        if copy is None or not same or (written < 0 and not trusted):
            values = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to("cpu", copy=True)
            if len(self._copies) > 8:
                self._copies.clear()
            varied = bool((values != values[0]).any())
            copy = self._copies[key] = _Copy(held(storage), written, values, varied)
        return copy


class Told:
    """The time of a call, as an adaptor is told it.

    Args:
        time: as it was passed: a number, or a tensor that nobody writes to; of several rows the first one's counts.
        number: the same as a number, where it is known as one; then no kernel has run for it.

    Example:
        >>> told = Told(torch.tensor([900, 900]))
        >>> told.tensor(torch.device("cpu")), told.number
        (tensor(900.), None)
    """

    __slots__ = ("_made", "_time", "number")

    def __init__(self, time: Any, number: float | None = None) -> None:
        self._time, self.number = time if number is None else number, number
        self._made: torch.Tensor | None = None

    def tensor(self, device: torch.device) -> torch.Tensor:
        """As a tensor on a device, float32 of shape (); made once."""
        if self._made is None or self._made.device != device:
            if isinstance(self._time, torch.Tensor):
                self._made = self._time.detach().reshape(-1)[0].to(device, torch.float32)
            else:  # a kernel: nothing to wait for
                self._made = torch.full((), float(self._time), dtype=torch.float32, device=device)
        return self._made

    def same(self, other: Told) -> bool:
        """Is it the same time? Of two that are not known as numbers the device is asked."""
        if self is other or (self.number is not None and other.number is not None):
            return self.number == other.number
        devices = (one._time.device for one in (self, other) if isinstance(one._time, torch.Tensor))
        device = next(devices, torch.device("cpu"))
        return torch.equal(self.tensor(device), other.tensor(device))


def is_read_at_once(time: Any) -> bool:
    """Does reading this time, call by call, wait for no device: a number, on the CPU, or an entry of a list?"""
    if not isinstance(time, torch.Tensor) or time.is_cpu:
        return time is not None
    if time.is_meta or version(time) < 0 or (time.numel() != 1 and any(time.stride())):
        return False
    return 1 < time.untyped_storage().nbytes() // time.dtype.itemsize <= _LARGEST_LIST


def _ordered(values: torch.Tensor) -> bool:
    """Does each stand next to the one before among all of them, as on a grid that is walked down, or up and down?

    Where it turns it goes on for two values at least: of two levels that take turns none is a step of the other.
    """
    numbers = [number for number in map(_finite, values.tolist()) if number is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if low == high:
        return False
    if high - low > len(numbers):  # of two neighbours one may be rounded to an integer, as in a list of KDPM2's
        apart = (after for before, after in itertools.pairwise(numbers) if abs(after - before) > _ROUNDING / 2)
        numbers = [numbers[0], *apart]
    rounded = [round((number - low) / (high - low) * _GRID) for number in numbers]  # one may come of two computations
    rank = {value: k for k, value in enumerate(sorted(set(rounded)))}
    moves = [rank[after] - rank[before] for before, after in itertools.pairwise(rounded) if after != before]
    turns = [after != before for before, after in itertools.pairwise(moves)]
    return all(abs(move) == 1 for move in moves) and not any(map(all, itertools.pairwise(turns)))


def _finite(number: Any) -> float | None:
    try:
        number = float(number)
    except (TypeError, ValueError, OverflowError):  # complex, a date of numpy's, an int beyond all floats
        return None
    return number if math.isfinite(number) else None


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
    in a list that has been walked along before, that way. So does one that begins at an end of the list that the
    trajectory before was in, and goes the way in which nothing has gone along it: loops that take turns, one entry
    behind the other, look so at the end of their list.

    Args:
        trusted: the caller says that the calls are of one run, so that no evidence is asked for.

    Example:
        >>> import torch
        >>> from clockwork_hooks._tree import held
        >>> times = torch.linspace(900, 0, 10)
        >>> place = lambda index: Place(held(times.untyped_storage()), index)
        >>> jumps = Jumps()
        >>> jumps.begin(place(4))
        >>> [jumps.doubt(place(index), 1) is None for index in (5, 6, 7)]
        [False, True, True]
    """

    __slots__ = ("_again", "_begins_outermost", "_count", "_jump", "_place", "_walked", "_way", "trusted")

    def __init__(self, *, trusted: bool = False) -> None:
        self.trusted = trusted
        self._walked: Any = None
        self._way: Any = None  # in which a list was moved along by a trajectory that was believed
        self.leave()

    def leave(self) -> None:
        """The next trajectory may begin anywhere."""
        self._place: Place | None = None
        self._jump, self._count, self._begins_outermost, self._again = 0, 0, False, False

    def begin(self, place: Place | None) -> None:
        """A trajectory begins here, as the jump to this place was not the one before it; the next may be like it."""
        jump = self.to(place) if place is not None else None
        self._jump, self._count, self._again = *((jump, 1) if jump else (0, 0)), jump is not None
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

    def doubt(self, place: Place, jump: int) -> str | None:
        """Move on to this place of the list, by this jump: why that may not be the next step's; None where it is."""
        self._count = self._count + 1 if jump == self._jump else 1
        self._jump, self._place = jump, place
        neighbours, way = abs(jump) == 1, (place.times, jump > 0)
        outermost = self._begins_outermost and (not self._again or self._way == way)
        if neighbours and self._count >= (2 if outermost else 3):
            self._walked = (place.times, jump)
        walked = self._walked == (place.times, jump)
        believed = outermost or self._count >= 2 or walked
        if not (self.trusted or (neighbours and believed) or self._count >= 3):
            return reasons.EVIDENCE
        self._way = way
        return None


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
        if not self._computed:
            self._fractions = ()
            return False
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
        if values is None or not 0 <= place.index + way < len(values):
            return (float("inf"),) * len(self._computed)
        first, second = float(values[place.index]), float(values[place.index + way])
        return tuple((time - first) / (second - first or 1.0) for time in self._computed)


_LARGEST_FORM = 1024  # elements


@dataclass(slots=True)
class _Input:
    """What was seen of one input in this trajectory.

    Attributes:
        time: of the last call.
        value: in the last call.
        original: the tensor that it was read from, and how often that was written to.
        believed: is it the time in another form, as far as was seen?
        direction: does it rise or fall where the time rises?
        strides: of a number.
        tells: it does not go with the time, so it is a condition.
    """

    time: float | None
    value: Any
    original: tuple[weakref.ref[torch.Tensor] | None, int]
    believed: bool = False
    direction: int = 0
    strides: Strides = field(default_factory=Strides)
    tells: bool = False


class TimeForms:
    """Finds the inputs that are the time in another form, as sigma, step index, percentage, next time; no branch.

    Such an input has the same value in all calls at one time, and another one as soon as the time has another one. So
    it says nothing that the time does not say, and the time is no condition either: what it steers within the region,
    the time steers. Whatever departs from this once is a condition for the rest of the trajectory.

    A number (or a floating tensor of one value) has to rise or to fall with the time, and is believed as plain times
    are: after three equal strides, or five that follow a trend. One that no operator of the recorded call has read is
    believed at once, and may take any strides: no feature was computed from it.

    Example:
        >>> forms = TimeForms()
        >>> [sorted(forms.among(900.0 - 100 * k, ["index", "scale"], [k, 7.5])) for k in range(5)]
        [[], [], [], [0], [0]]
    """

    __slots__ = ("_inputs",)

    def __init__(self) -> None:
        self._inputs: dict[str, _Input] = {}

    def begin(self) -> None:
        """A trajectory begins."""
        self._inputs.clear()

    def among(
        self, time: float | None, paths: Sequence[str], values: Sequence[Any], unread: Collection[str] = ()
    ) -> set[int]:
        """Which of these inputs of a call are the time in another form, as far as is known now.

        Args:
            time: of the call; None if it cannot be told.
            paths: of the inputs.
            values: of the inputs.
            unread: paths of those that no operator of the recorded call has read.
        """
        return {
            k
            for k, (path, value) in enumerate(zip(paths, values, strict=False))
            if may_be_form(value, unread=path in unread) and self._is_form(time, path, value, path in unread)
        }

    def _is_form(self, time: float | None, path: str, value: Any, unread: bool) -> bool:
        before = self._inputs.get(path)
        if before is None:
            self._inputs[path] = _Input(time, _read(value), _original(value))
            return False
        if before.tells:
            return False
        now = before.value if _untouched(value, *before.original) else _read(value)
        before.tells = not _follows(before, time, now, unread)
        before.time, before.value, before.original = time, now, _original(value)
        return before.believed and not before.tells


def may_be_form(value: Any, *, unread: bool) -> bool:
    """Is it a number, or a small tensor that may hold one, perhaps once for each row?"""
    if not isinstance(value, torch.Tensor):
        return is_number(value) and getattr(getattr(value, "dtype", None), "kind", "f") in "iuf"  # numpy has others
    plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if not plain or isinstance(value, FakeTensor) or value.is_nested or not 0 < value.numel() <= _LARGEST_FORM:
        return False
    return unread or (value.is_floating_point() and value.numel() == (value.shape[0] if value.ndim else 1))


def _follows(before: _Input, time: float | None, now: Any, unread: bool) -> bool:
    """Does the input go with the time, from the call before to this one?"""
    if time is None or before.time is None:
        return False
    if time == before.time:
        return bool(now == before.value)
    if now == before.value or not isinstance(now, float) or not isinstance(before.value, float):
        return False
    direction = 1 if (now > before.value) == (time > before.time) else -1
    steady, before.direction = before.direction in (0, direction), direction
    doubt = before.strides.doubt(abs(now - before.value))
    before.believed = unread or doubt is None
    return steady and (unread or doubt != reasons.STRIDE)


def _read(value: Any) -> Any:
    """A number where it is one number, else all of its elements."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    elements = tuple(value.detach().flatten().tolist())
    return float(elements[0]) if len(set(elements)) == 1 and not isinstance(elements[0], complex) else elements


def _original(value: Any) -> tuple[weakref.ref[torch.Tensor] | None, int]:
    return (weakref.ref(value), version(value)) if isinstance(value, torch.Tensor) else (None, 0)


def _untouched(value: Any, original: weakref.ref[torch.Tensor] | None, written: int) -> bool:
    """Is it the same tensor on a device, which was not written to? One in main memory is read again: that is free."""
    if original is None or not isinstance(value, torch.Tensor) or value.is_cpu or original() is not value:
        return False
    return written == version(value) >= 0

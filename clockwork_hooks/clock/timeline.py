"""Which denoising step is this call, and may the features of the step before serve it?

The UNet's time input tells: a changed value is a new step, a value that runs backwards is a new trajectory. Every
other input tells the branch, and the calls of one branch within a step are numbered: the k-th is served by the k-th
of the step before. Where the answer is in doubt the position says why, and the wrapper takes a full pass. Of each
branch its conditions are remembered, and what the regions emitted in each of its calls.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from clockwork_hooks._tree import copied, version
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.conditions import FORM, Conditions, Seen
from clockwork_hooks.clock.times import Jumps, MixedTimes, Place, Strides, TimeForms, Told
from clockwork_hooks.graph.arguments import Inputs


@dataclass(frozen=True, slots=True)
class Trail:
    """What a region emitted in the last full pass, and how that differs from the full pass before; memory of our own.

    Attributes:
        exit: a copy of what it emitted.
        told: the time of that pass; None where there is none.
        first: does the trail begin with the first step of the trajectory?
        trend: `exit` less what the full pass before emitted; None where there was none.
        before: the time of that one.
    """

    exit: torch.Tensor
    told: Told | None
    first: bool
    trend: torch.Tensor | None = None
    before: Told | None = None

    @classmethod
    def after(cls, trail: Trail | None, exit: torch.Tensor, told: Told | None, *, first: bool = False) -> Trail:
        """The trail that goes on from this one with a full pass; from none, it begins there."""
        exit = copied(exit)  # modules and samplers may write to what was emitted
        if trail is None or trail.exit.shape != exit.shape:
            return cls(exit, told, first)
        return cls(exit, told, trail.first, exit - trail.exit, trail.told)

    @property
    def positions(self) -> torch.Tensor | None:
        """(2,), the times of the last two full passes, the last one's first."""
        if self.told is None or self.before is None:
            return None
        device = self.exit.device
        return torch.stack((self.told.tensor(device), self.before.tensor(device)))

    @property
    def numbers(self) -> tuple[float, float] | None:
        """The same, where they are known as numbers."""
        told, before = self.told, self.before
        if told is None or before is None or told.number is None or before.number is None:
            return None
        return told.number, before.number

    @property
    def broken(self) -> bool:
        """Is there no trend, though the trajectory had more full passes before than the one?"""
        return self.trend is None and not self.first

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it holds of the region's size."""
        return [self.exit] if self.trend is None else [self.exit, self.trend]


@dataclass(slots=True)  # frozen would take 1 µs more at every call, of some 300
class Feature:
    """What the region emitted in a call; never changed once it is kept.

    Attributes:
        key: input signature and modes of the call.
        exit: the tensor.
        version: its counter of in-place writes, when it was kept.
        weights: state of the UNet's weights in the call.
        entry: what flowed into the region, where somebody looks at it.
        full_entry: of an adaptive schedule, what flowed in in the last full pass, if that is another one.
        age: and how many adaptor passes came since.
        told: the time of that call, where somebody looks at it.
        trail: of the full passes up to that call, where somebody looks at it.
    """

    key: Hashable
    exit: torch.Tensor
    version: int
    weights: Hashable
    entry: torch.Tensor | None = None
    full_entry: torch.Tensor | None = None
    age: int = 0
    told: Told | None = None
    trail: Trail | None = None

    @property
    def compared(self) -> torch.Tensor | None:
        """What an adaptive schedule compares the entry with."""
        return self.entry if self.full_entry is None else self.full_entry

    def stale(self, key: Hashable, weights: Hashable) -> str | None:
        """Why it may not serve a call of this key and these weights; None where it may."""
        if self.key is not key and self.key != key:
            return reasons.CHANGED
        if self.weights != weights:
            return reasons.WEIGHTS
        return reasons.WRITTEN if self.version != version(self.exit) else None


@dataclass(slots=True, eq=False)
class Call:
    """One call of a branch.

    Attributes:
        offset: entries of the list of times from the step's first call to this one; 0 where there is no list.
        feature: for the same call of the step after it; None if nothing may be used.
        missing: why there is none.
        inner: the same for the regions inside of that one that have clocks of their own.
    """

    offset: int = 0
    feature: Feature | None = None
    missing: str = reasons.NOT_KEPT
    inner: tuple[Call, ...] = ()

    def take(self) -> Feature | None:
        """What was kept, which is let go: it serves once."""
        feature, self.feature = self.feature, None
        return feature


@dataclass(slots=True, eq=False)
class Branch:
    """The calls of one trajectory that share their conditions.

    Attributes:
        number: in order of appearance in the trajectory, from 1.
        names: as the caller named it, outermost first; none where the conditions tell. The last may be the key that
            `wrap(branch=...)` gives.
        conditions: every input but sample and time.
        seen: the objects that they were.
        step: the last step with a call.
        calls: the calls of that step.
        before: the calls of the step before it.
        doubt: why none of those may serve.
    """

    number: int
    names: tuple[Hashable, ...]
    conditions: Conditions
    seen: Seen = field(default_factory=Seen)
    step: int = 0
    calls: list[Call] = field(default_factory=list)
    before: list[Call] = field(default_factory=list)
    doubt: str | None = None
    _steps: int = 0
    _usual: int = 0
    _last: int = 0
    _regular: bool = True

    @property
    def label(self) -> str:
        """How reports call it."""
        return " / ".join(map(repr, self.names)) or str(self.number)

    @property
    def nbytes(self) -> int:
        """Memory that it holds: features, each storage once, and copies of conditions."""
        calls = [each for call in (*self.before, *self.calls) for each in (call, *call.inner)]
        features = [call.feature for call in calls if call.feature is not None]
        tensors = [feature.exit for feature in features]
        entries = (entry for feature in features for entry in (feature.entry, feature.full_entry))
        tensors += [entry for entry in entries if entry is not None]
        tensors += [tensor for feature in features if feature.trail is not None for tensor in feature.trail.tensors]
        storages = map(torch.Tensor.untyped_storage, tensors)
        return self.conditions.nbytes + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def enter(self, step: int, *, declared: bool, placed: bool = False) -> None:
        """The first call of this branch in a step; `placed`: a scheduler declared it, which knows no order of calls."""
        new = self.step == 0
        self.seen.steps += 1
        self.before, self.calls, self.step = self.calls, [], step
        if len(self.before) == self._last == self._usual == 1:  # a call a step so far: there is nothing to tell apart
            self._steps, self.doubt = self._steps + 1, None
            return
        self.doubt = reasons.NEW if new and step > 1 else None
        if not new and not self._countable(placed=placed) and (placed or not declared):
            self.doubt = reasons.COUNT

    def _countable(self, *, placed: bool) -> bool:
        """May the k-th call be told by its number? One call a step always; more, once their number is regular."""
        count, last = len(self.before), self._last
        if placed:  # calls with times of their own are told apart by them
            count = -(-count // len({call.offset for call in self.before}))
        self._steps, self._last = self._steps + 1, count
        if self._steps <= 2:  # the first step may have fewer: Heun's corrections begin with the second
            self._usual = count
        elif count != self._usual:
            self._regular = False
        return count <= 1 or (self._regular and count == last)


_FAR = 4.0  # as many times as the longest stride
_MOST_CALLS = 128
_MOST_COMPARED = 2


@dataclass(slots=True)
class Position:
    """Where a call is.

    Attributes:
        trajectory: number of the trajectory; 0 for a call that belongs to none.
        step: denoising step of the trajectory, from 1.
        branch: what its conditions tell.
        ordinal: which call of the branch in this step, from 0.
        call: where its own exit is remembered.
        before: the same call of the step before; None if there is none.
        doubt: why that one may not serve; None where it may.
        changed: paths of the inputs by which the branch is a new one, of those that tell it from the one most alike.
        restarts: trajectories of a step or two that began by their times, one after another.
        certain: can no other loop have made the call?
        calls: where each region's exit is remembered.
        befores: the same of the step before; None for a region of which there is none.
        turn: the step that the schedule is asked about: of the trajectory; where branches that pause are remembered, of
            the branch alone.
    """

    trajectory: int
    step: int
    branch: Branch
    ordinal: int
    call: Call
    before: Call | None = None
    doubt: str | None = None
    changed: tuple[str, ...] = ()
    restarts: int = 0
    turn: int = 1
    certain: bool = False
    calls: tuple[Call, ...] = ()
    befores: tuple[Call | None, ...] = ()

    def split(self, regions: int) -> None:
        """Remember so many regions apart, one inside the other; the first is the call's own."""
        self.call.inner = inner = tuple(Call() for _ in range(regions - 1))
        before: tuple[Call | None, ...] = () if self.before is None else self.before.inner
        if len(before) != len(inner):  # the call before was another signature's
            before = (None,) * len(inner)
        self.calls, self.befores = (self.call, *inner), (self.before, *before)

    def release(self, regions: int) -> None:
        """Let go of what the first so many regions emitted in the step before: it serves once."""
        for before in self.befores[:regions]:
            if before is not None:
                before.take()

    @property
    def scheduled(self) -> str:
        """Why a full step is full. In a first step doubts count: a call that cannot be placed never gets beyond it."""
        return reasons.SCHEDULED if self.turn > 1 else self.doubt or reasons.FIRST


class Timeline:
    """The steps and branches of one thread, task or declared trajectory; `at` is called once per call of the UNet.

    Args:
        numbers: where the numbers of trajectories come from; shared by the timelines of one wrapper.
        trusted: the caller says that all calls are of one run at a time, so that no evidence is asked for.
        others: gives the timelines of the same wrapper, this one among them; none where there is no other.
        names: names of branches that the caller has opened, outermost first.
        steps: of each of its trajectories, where the caller says.
        oldest: a branch is remembered for so many steps, and its own steps are what the schedule counts; 1 for the step
            right after it alone.

    Attributes:
        numbers, trusted, names: as given.
        steps: of the trajectory; None where nobody has said.
        declared_steps: what the caller has said it is.
        trajectory: number of the trajectory.
        step: its last step, from 1; 0 before the first.
        declared: are steps told by `declare`, and not by the time?
        opened: has one been, and no call come since? Its time matters, of declared steps no other.
        unsure: may the next call be of a block that is open elsewhere?
        row_names: of the next call's batch, where the caller names its rows.
        rows_exact: is a batch of another number of rows an error? Else it has no names.
        rows: of this step and the one before, what calls with such names have left (`engine/rows.py`).
        branches: the branches of this step and of the step before.
        mark: where the scheduler that declares the steps stands in its list.
        way: entries from one of its steps to the next.
    """

    def __init__(
        self,
        numbers: Iterator[int] | None = None,
        *,
        trusted: bool = False,
        others: Callable[[], Sequence[Timeline]] | None = None,
        names: Sequence[str] = (),
        steps: int | None = None,
        oldest: int = 1,
    ) -> None:
        self._oldest = oldest
        self.numbers = itertools.count(1) if numbers is None else numbers
        self.trusted, self.unsure = trusted, False
        self.names: list[str] = list(names)
        self.row_names: tuple[str, ...] = ()
        self.rows_exact = True
        self.trajectory = 0
        self._others = others
        self.declared_steps = self.steps = steps
        self._jumps, self._mixed, self._forms = Jumps(trusted=trusted), MixedTimes(), TimeForms()
        self.reset()

    def reset(self) -> None:
        """The next call begins a trajectory; what was kept is let go."""
        self._forget()
        self._jumps.leave()
        self._mixed.leave()
        self._way_before = self._restarts = 0

    def _forget(self) -> None:
        self.step, self.declared, self.opened = 0, False, False
        self.branches: list[Branch] = []
        self.rows: list[Any] = []
        self.mark: Place | None = None
        self.way = 0
        self.steps = self.declared_steps
        self._time: float | None = None
        self._first: float | None = None
        self._direction = 0
        self._strides, self._farthest = Strides(trusted=self.trusted), 0.0
        self._start: Place | None = None
        self._doubt: str | None = None
        self._calls = self._seen = self._compared = 0
        self._things: dict[int, Any] = {}
        self._forms.begin()

    def declare(self, mark: Place | None = None, *, start: Place | None = None) -> None:
        """A new step begins now, whatever the time input says; from here on the caller declares all steps.

        Args:
            mark: the caller is a scheduler, and this is where it stands in its list.
            start: and the step began there, if not here.
        """
        if not self.declared:
            self.reset()
        self.mark = mark
        self.declared, self.opened, self._start = True, True, start or mark
        self._advance()

    def at(
        self,
        time: float | None,
        place: Place | None,
        conditions: Sequence[Any],
        inputs: Inputs,
        *,
        key: Hashable = None,
    ) -> Position:
        """Place a call.

        Args:
            time: its time; None if that cannot be told.
            place: where it stands in its list, if it comes from one.
            conditions: every input but the sample and the time.
            inputs: what is known of them in all such calls.
            key: of the branch, where the caller knows it.
        """
        if self.declared:
            self._check_declared(time)
        elif time is None:
            self.reset()
            return self.nowhere(reasons.NO_TIME if inputs.time is None else reasons.UNREADABLE)
        else:
            self._tick(time, place)
        self._calls += 1
        if self._calls > _MOST_CALLS:
            self.branches.clear()
            return self.nowhere(reasons.CROWDED)
        originals = conditions
        if inputs.forms:
            conditions = self._without_forms(time, conditions, inputs)
        branch, changed = self._branch(conditions, key)
        if branch.step != self.step:
            branch.enter(self.step, declared=self.declared, placed=self.mark is not None)
        if conditions and branch.seen.renewed(conditions) and not branch.names:
            if self._calls == 1:
                self._begin_again(time, place)
                return self.at(time, place, originals, inputs, key=key)
            self._doubt = reasons.RENEWED  # calls of this step have been counted already
        here = self.mark if self.declared else place
        call, ordinal = Call(here.index - self._start.index if here and self._start else 0), len(branch.calls)
        branch.calls.append(call)
        before = branch.before[ordinal] if ordinal < len(branch.before) else None
        doubt = self._doubt or branch.doubt
        if self.step > 1 and branch.before and not doubt:
            if before is None:
                doubt = reasons.AGAIN
                self._doubt = None if self.declared else doubt  # this time comes twice: who missed the first one?
            elif before.offset != call.offset:
                doubt = reasons.APART
        alone = self._alone(here, conditions)
        if self.step > 1 and not doubt:
            doubt = reasons.ELSEWHERE if self.unsure else None if alone else reasons.SHARED
        names = tuple(inputs.paths[k] for k in changed if k < len(inputs.paths))
        self._restarts = 0 if self.step > 2 else self._restarts
        turn = self.step if self._oldest == 1 else branch.seen.steps
        certain = alone and not self.unsure
        return Position(
            self.trajectory, self.step, branch, ordinal, call, before, doubt, names, self._restarts, turn, certain
        )

    def nowhere(self, doubt: str) -> Position:
        """A call of which nothing is remembered."""
        number = self.trajectory if self.step else 0
        step = max(self.step, 1)
        return Position(number, step, Branch(0, (), Conditions(())), 0, Call(), None, doubt, turn=step)

    def _alone(self, place: Place | None, conditions: Sequence[Any]) -> bool:
        """Has it used a list of times or a tensor before that no other timeline uses? Then no call is another's."""
        things: dict[int, Any] = {id(value): value for value in conditions if isinstance(value, torch.Tensor)}
        if place is not None:
            things[-hash(place.times)] = place.times
        again = [key for key, thing in things.items() if self._uses(key, thing)]
        if len(again) < len(things):
            self._things = {key: one for key, one in self._things.items() if _is_alive(one)}
            self._things |= {key: _reference(thing) for key, thing in things.items() if key not in again}
        others = () if self.trusted or self._others is None else self._others()
        if not others:
            return True
        others = [other for other in others if other is not self and other.step]
        return not others or any(not any(other._uses(key, things[key]) for other in others) for key in again)

    def _uses(self, key: int, thing: Any) -> bool:
        one = self._things.get(key)
        return one is not None and (one() is thing if isinstance(one, weakref.ref) else one == thing)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _tick(self, time: float, place: Place | None) -> None:
        """Find out whether the step goes on, the next one begins, or the next trajectory."""
        if place is not None and not (place.ordered or self.trusted):  # a list of times that were drawn ahead
            place = None
        # of a list with computed times between its entries, and in a run that is declared, places tell nothing
        before, mixed = self._mixed.believed, self._mixed.fits(time, place) or (self.trusted and self._mixed.both)
        if mixed:
            place = None
            self._jumps.stay(None)
        if self._time is None or (mixed and not before and not self.trusted):  # of the step before calls may be missing
            self._begin(time, place)
            return
        change, jump = time - self._time, self._jumps.to(place)
        if change == 0 and jump is not None:
            self._jumps.stay(place)
            return
        direction, stride = (change > 0) - (change < 0), abs(change)
        backwards = self._direction and direction != self._direction
        # one trajectory takes its list's entries in turn; another list is another trajectory's
        regular = self._jumps.regular(jump, second=self.step == 1)
        if change == 0 or backwards or not regular or (self._farthest and stride > _FAR * self._farthest):
            self._restarts += bool(change)
            self._begin(time, place, way_before=self._direction)
            return
        if not jump and self._way_before not in (0, direction) and self.step == 1:
            self._begin(time, place)  # its first step was another one's last
            return
        doubt = self._jumps.doubt(place, jump) if jump and place else None if mixed else self._strides.doubt(stride)
        self._jumps.stay(place)
        self._time, self._direction, self._farthest = time, direction, max(self._farthest, stride)
        self._advance()
        self._start = place
        self._doubt = self._doubt or doubt

    def _begin(self, time: float, place: Place | None, *, way_before: int = 0) -> None:
        self._forget()
        self._jumps.begin(place)
        self._way_before = way_before
        self._time, self._start = time, place
        self._advance()

    def _begin_again(self, time: float | None, place: Place | None) -> None:
        """This very call begins a trajectory; of declared steps, if those before it were."""
        if not self.declared:
            self._jumps.leave()
            self._begin(time or 0.0, place)  # undeclared, a call without a time has no place
            return
        mark, way, steps = self.mark, self.way, self.steps
        self.reset()
        self.declared, self._time, self._first, self.mark, self.way, self._start = True, time, time, mark, way, mark
        self.steps = steps
        self._advance()

    def _check_declared(self, time: float | None) -> None:
        """Declared steps may take any time, but one that went back is not served by the step before."""
        if not self.opened:
            return
        self.opened = False
        if time is None or self._time is None or time == self._time:
            self._time = self._time if time is None else time
            self._first = self._time if self._first is None else self._first
            return
        direction = 1 if time > self._time else -1
        self._time = time
        if self._direction in (0, direction):
            self._direction = direction
        elif self._first is not None and (time - self._first) * self._direction <= 0:  # back where it began
            self._begin_again(time, None)
        else:
            self._doubt = reasons.BACKWARDS

    def _advance(self) -> None:
        """A new step: what was not called in the step before is forgotten."""
        self._doubt = reasons.CROWDED if self._calls > _MOST_CALLS else None
        self._calls = 0
        if len(self.branches) != 1 or self.branches[0].step != self.step:
            self.branches = [branch for branch in self.branches if branch.step > self.step - self._oldest]
        self.trajectory = self.trajectory if self.step else next(self.numbers)
        self.step += 1

    # -- branches ------------------------------------------------------------------------------------------------

    def _without_forms(self, time: float | None, conditions: Sequence[Any], inputs: Inputs) -> Sequence[Any]:
        """The conditions with `FORM` in the place of what is the time in another form; the branches know none of it."""
        forms = self._forms.among(time, inputs.paths, conditions, inputs.unread)
        if not forms:
            return conditions
        for branch in self.branches:
            branch.conditions.forget(forms)
        return [FORM if k in forms else value for k, value in enumerate(conditions)]

    def _branch(self, conditions: Sequence[Any], key: Hashable) -> tuple[Branch, Sequence[int]]:
        """The branch of these names and conditions; a new one if there was none in this step and the one before.

        With it: where a new one's conditions differ from those of the branch most alike.
        """
        names = (*self.names, *(() if key is None else (key,)))
        for branch in self.branches:
            if branch.names == names and branch.conditions.same(conditions):
                return branch, ()
        alike = [branch for branch in self.branches if branch.names == names]
        again = self._renewed(alike, conditions) if names else self._equal(alike, conditions)
        if again is not None:
            return again, ()
        differing = [branch.conditions.differing(conditions) for branch in alike if self.step > 1]
        self._seen += 1
        self.branches.append(Branch(self._seen, names, Conditions(conditions)))
        return self.branches[-1], min(differing, key=len, default=())

    def _renewed(self, alike: Sequence[Branch], conditions: Sequence[Any]) -> Branch | None:
        """A name may stand for embeddings made anew in each step; not where its calls have kept theirs, or differ."""
        if len(alike) != 1 or alike[0].step == self.step or alike[0].seen.broken(conditions):
            return None
        alike[0].conditions = Conditions(conditions)
        return alike[0]

    def _equal(self, named: Sequence[Branch], conditions: Sequence[Any]) -> Branch | None:
        """New objects on a device may have the values of old ones; given up after some that did not."""
        if self.step == 1 or self._compared >= _MOST_COMPARED:
            return None
        for branch in named:
            if branch.conditions.equal(conditions):
                branch.conditions = Conditions(conditions)
                return branch
        self._compared += bool(named)
        return None


def _reference(thing: Any) -> Any:
    """To a tensor, or to a list of times, which is a reference."""
    return weakref.ref(thing) if isinstance(thing, torch.Tensor) else thing


def _is_alive(one: Any) -> bool:
    return not isinstance(one, weakref.ref) or one() is not None

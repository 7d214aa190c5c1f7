"""Which denoising steps run the whole UNet and which the adaptor: pure arithmetic, steps numbered from 1."""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clockwork_hooks.errors import ArgumentError, is_number, is_several, is_whole, whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Schedule", "check_clock"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step → full or adaptor. Step 1, the first of a trajectory, is always full.

    Build one with `Schedule.every`, `Schedule.spread`, `Schedule.at`, `Schedule.where` or `Schedule.adaptive`. Two are
    equal if they were built from equal numbers, or from the same function. `str` writes one as text, and
    `Schedule.parse` reads it.

    Some schedules depend on the number of steps of a trajectory. It is known where `wrap_pipeline` reads it from the
    pipeline's scheduler, and where a sampler says `cw.trajectory(steps=20)`. Elsewhere it is the number that the
    adaptor was made for; where there is none, an `OtherStepsWarning` says so. Steps beyond the number are full.

    Attributes:
        uses_adaptor: step (from 1) → does the adaptor stand in for the region? Of an adaptive schedule: may it?
        name: how it prints.
        threshold: of an adaptive schedule, the change of the entry that the adaptor may face; None for all others.
        longest: of an adaptive schedule, how many steps in a row may use the adaptor.

    Example:
        >>> print(Schedule.every(2).preview(8))
        F A F A F A F A
        >>> print(Schedule.at({5, 6, 7, 8}).preview(8))
        F F F F A A A A
        >>> print(Schedule.every(3, start=4).preview(9))
        F F F F A A F A A
        >>> print(Schedule.every(2, first_full=2, last_full=1).preview(9))
        F F A F A F A F F
        >>> print(Schedule.spread(2).preview(8))
        F F A A F A A F
        >>> Schedule.adaptive(0.2, longest=3).bounds(8)
        (2, 8)

    Source: arXiv 2312.08128, Sec. 4.3 and Tab. 3, whose step numbers these are.
    """

    uses_adaptor: Callable[[int], bool]
    name: str
    threshold: float | None = None
    longest: int = 0

    @classmethod
    def every(
        cls,
        clock: int,
        *,
        start: int = 1,
        stop: int | None = None,
        warmup: int = 0,
        final: int = 0,
        steps: int | None = None,
        first_full: int = 1,
        last_full: int = 0,
    ) -> Schedule:
        """One full pass every `clock` steps.

        Args:
            clock: period; 1 means that every step is full.
            start: the clock begins to tick at this step, which is full; steps before it are full.
            first_full: the first so many steps are full, and the clock begins to tick at the last of them; `start` by
                another name. "First two full, last full" is the rule of thumb for calibrated adaptors.
            last_full: the last so many steps are full, where the number of steps is known.
            stop: last step that may use the adaptor; None for no end.
            warmup: so many first steps are full, whatever the clock says.
            final: so many last steps are full; needs `steps`.
            steps: number of steps of a trajectory.

        Raises:
            ArgumentError: a number is outside its rule, or `final` comes without `steps`.
        """
        check_clock(clock)
        options = {"start": (start, 1), "first_full": (first_full, 1), "stop": (stop, None), "warmup": (warmup, 0)}
        options |= {"final": (final, 0), "last_full": (last_full, 0)}
        for name, (value, default) in options.items():
            if name != "stop":
                whole(name, value, least=default or 0)
        if start > 1 and first_full > 1:
            raise ArgumentError(
                "start and first_full mean the same",
                seen={"start": start, "first_full": first_full},
                do="pass one of them",
            )
        start = max(start, first_full)
        if stop is not None:
            whole("stop", stop, least=start)
        if steps is not None:
            whole("steps", steps, least=1)
        if final and steps is None:
            raise ArgumentError(
                "final full steps are counted from the end", seen={"final": final, "steps": None}, do="pass steps= too"
            )
        end = None if stop is None and not final else min(x for x in (stop, steps and steps - final) if x is not None)
        options["steps"] = (steps if final or end != stop else None, None)  # else they say nothing
        return cls(_Ticks(clock, start, warmup, end, last_full), f"every({clock}{_written(**options)})")

    @classmethod
    def spread(cls, clock: int, *, first_full: int = 2, last_full: int = 1) -> Schedule:
        """As many full steps as `every(clock)` has, in other places: the first ones, the last one, the others between.

        It costs what `every(clock)` costs: ⌈steps / clock⌉ full passes. A cached feature does most harm at the second
        step, so the first steps are full and the last one is, and the adaptor's steps lie between them in runs of
        nearly equal length, the longer ones late. It is `every(clock)` where the number of steps is not known, and
        where that is so small that no full step would lie between, or a run would be longer than `clock`: too old
        features do more harm than early ones.

        Args:
            clock: of `every(clock)`.
            first_full, last_full: so many first and last steps are full.

        Raises:
            ArgumentError: a number is outside its rule.

        Example:
            >>> for steps in (4, 8, 12):
            ...     print(Schedule.spread(2).preview(steps), "|", Schedule.every(2).preview(steps))
            F A F A | F A F A
            F F A A F A A F | F A F A F A F A
            F F A F A F A A F A A F | F A F A F A F A F A F A
        """
        check_clock(clock)
        whole("first_full", first_full, least=1)
        whole("last_full", last_full, least=0)
        text = _written(first_full=(first_full, 2), last_full=(last_full, 1))
        return cls(_Spread(clock, first_full, last_full), f"spread({clock}{text})")

    @classmethod
    def early(cls, clock: int) -> Schedule:
        """As many full steps as `every(clock)` has, close together at first and farther and farther apart later.

        The k-th of n full steps, from 0, lies (k / (n - 1))² of the way through. Features change most in the first
        steps, and what an adaptor is off by there stays in the picture; later ones move along a trend, which an adaptor
        of a kind "+trend" follows over several steps. Such an adaptor is what it is for: a feature as it is grows too
        old late. It costs what `every(clock)` costs, and is `every(clock)` where the number of steps is not known, and
        where there are fewer than three full ones.

        Raises:
            ArgumentError: `clock` is outside its rule.

        Example:
            >>> print(Schedule.early(3).preview(20))
            F F F A A F A A F A A A A F A A A A A F
        """
        check_clock(clock)
        return cls(_Early(clock), f"early({clock})")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """A schedule from what `str(schedule)` writes: "every(2, first_full=2, last_full=1)", "at([3, 4, 6, 7])".

        Raises:
            ArgumentError: the text is no schedule; a function of `Schedule.where` cannot be written.

        Example:
            >>> Schedule.parse("spread(3)") == Schedule.spread(3)
            True
        """
        makers: dict[str, Callable[..., Schedule]] = {
            "every": cls.every, "spread": cls.spread, "early": cls.early, "at": cls.at, "adaptive": cls.adaptive
        }  # fmt: skip
        try:
            call = ast.parse(text.strip(), mode="eval").body
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in makers):
                raise ValueError(text)
            values = [ast.literal_eval(value) for value in call.args]
            options = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
            return makers[call.func.id](*values, **options)
        except (AttributeError, SyntaxError, ValueError, TypeError) as error:
            raise ArgumentError(
                "a schedule is written as one of " + ", ".join(f"{name}(...)" for name in makers),
                seen={"schedule": repr(text)},
                do='write "every(2, first_full=2, last_full=1)", "spread(2)" or "at([3, 4, 6, 7])"',
            ) from error

    def written(self, steps: int) -> str:
        """Text that `parse` reads; of a function, which cannot be written, its steps in a run of so many.

        Example:
            >>> Schedule.where(lambda step: step > 3).written(6)
            'at([4, 5, 6])'
        """
        own = isinstance(self.uses_adaptor, (_Ticks, _Spread, _Early, _Among)) or self.threshold is not None
        return str(self if own else Schedule.at(self.adaptor_steps(steps)))

    @classmethod
    def at(cls, steps: Iterable[int]) -> Schedule:
        """The adaptor at exactly these steps, numbered from 1 as in the paper's Tab. 3: `Schedule.at({2, 4, 6, 8})`.

        Raises:
            ArgumentError: a step is no int, or below 2 (the first step is always full).
        """
        numbers: list[Any] = list(steps) if is_several(steps) else [steps]
        wrong = [step for step in numbers if not is_whole(step, 2)]
        if wrong or not is_several(steps):
            raise ArgumentError(
                "adaptor steps are a set of ints of at least 2: the first step of a trajectory is always full",
                seen={"steps": repr(steps), "outside the rule": wrong or "no set"},
                do="number the steps from 1, as in {2, 4, 6, 8}",
            )
        return cls(_Among(frozenset(numbers)), f"at({sorted(set(numbers))})")

    @classmethod
    def where(cls, uses_adaptor: Callable[[int], bool]) -> Schedule:
        """The adaptor at each step (from 1) for which `uses_adaptor(step)` is true."""
        if not _takes_a_step(uses_adaptor):
            raise ArgumentError(
                "a schedule's rule is a function of the step",
                seen={"got": repr(uses_adaptor)[:80]},
                do="pass step -> bool; an adaptor is passed by name: adaptor=",
            )
        return cls(uses_adaptor, f"where({getattr(uses_adaptor, '__name__', 'rule')})")

    @classmethod
    def adaptive(cls, threshold: float, *, longest: int = 4, warmup: int = 1) -> Schedule:
        """Decided at run time: the adaptor, until the region's entry has changed too much since the last full pass.

        The entry is compared in each guidance branch on its own, over all samples of a batch together; the first call
        of a step that gets to compare decides for the whole step, so the device is waited for once a step at most.
        Where the bound or the first steps ask for a full pass, nothing is compared. A copy of the entry is kept. A
        region whose entry no module takes or returns is refused by `wrap`'s first call.

        Args:
            threshold: ‖entry - last full one‖ / ‖last full one‖, above which a step is full.
            longest: so many steps in a row may use the adaptor.
            warmup: so many first steps are full, whatever the entry does.

        Raises:
            ArgumentError: the threshold is no positive number, or a count is below 1.

        Example:
            >>> print(Schedule.adaptive(0.2, longest=3, warmup=2))
            adaptive(0.2, longest=3, warmup=2)
            >>> print(Schedule.adaptive(0.2).preview(6))
            F ? ? ? ? ?

        Source: arXiv 2312.08128, Sec. 4.3 fixes the steps beforehand; this one measures what Sec. 3 rests on.
        """
        if not is_number(threshold) or threshold <= 0:
            raise ArgumentError(
                "the threshold is a relative change of the region's entry, above 0",
                seen={"threshold": repr(threshold)},
                do="pass threshold=0.2; ch.plan(...) measures which one a budget allows",
            )
        whole("longest", longest, least=1)
        whole("warmup", warmup, least=1)
        options = _written(longest=(longest, None), warmup=(warmup, 1))
        return cls(_Ticks(math.inf, 1, warmup, None), f"adaptive({threshold:g}{options})", float(threshold), longest)

    @classmethod
    def of(cls, value: Schedule | str | Iterable[int] | Callable[[int], bool]) -> Schedule:
        """A schedule from what `wrap(schedule=...)` takes: a schedule, its text, adaptor steps, or a rule."""
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if not (callable(value) or is_several(value)):
            raise ArgumentError(
                "a schedule is a Schedule, a set of adaptor steps, or a function step -> bool",
                seen={"schedule": repr(value)},
                do="pass Schedule.every(2), {2, 4, 6, 8} or a function",
            )
        return cls.where(value) if callable(value) else cls.at(value)

    def skips(self, step: int, steps: int | None = None) -> bool:
        """May this step (from 1) use the adaptor, in a trajectory of so many steps? None where that is not known."""
        rule = self.uses_adaptor
        if step <= 1:
            return False
        if not isinstance(rule, (_Ticks, _Spread, _Early)):
            return rule(step)
        return (steps is None or step <= steps) and rule(step, steps)  # full where there are more than was said

    @property
    def is_clock(self) -> bool:
        """Is it `every(clock)` and no more?"""
        rule = self.uses_adaptor
        return self.threshold is None and isinstance(rule, _Ticks) and rule == _Ticks(rule.clock, 1, 0, None)

    def is_full(self, step: int, steps: int | None = None) -> bool:
        """Is this step (from 1) a full pass? Of an adaptive schedule: whatever the entry does?

        Args:
            step: from 1.
            steps: of the trajectory; None where that is not known.
        """
        return not self.skips(step, steps)

    def adaptor_steps(self, steps: int) -> tuple[int, ...]:
        """The steps of a trajectory that use the adaptor.

        Raises:
            ArgumentError: that is decided at run time.

        Example:
            >>> Schedule.every(2, first_full=2, last_full=1).adaptor_steps(8)
            (3, 5, 7)
        """
        self.known_beforehand("which steps use the adaptor")
        return tuple(step for step in range(1, steps + 1) if self.skips(step, steps))

    @property
    def counts_from_end(self) -> bool:
        """Does it depend on the number of steps of a trajectory?"""
        rule = self.uses_adaptor
        return isinstance(rule, (_Spread, _Early)) or (isinstance(rule, _Ticks) and rule.last > 0)

    @property
    def last_named(self) -> int:
        """The last adaptor step of one that names them, as `at` does; 0 of a rule, which holds for any number."""
        rule = self.uses_adaptor
        return max(rule.steps, default=0) if isinstance(rule, _Among) else 0

    @property
    def never_skips(self) -> bool:
        """Is every step full, and is that certain from how it was built? A function may change its mind."""
        rule = self.uses_adaptor
        return (isinstance(rule, (_Ticks, _Spread, _Early)) and rule.clock == 1) or (
            isinstance(rule, _Among) and not rule.steps
        )

    def moved(self, entry: Tensor, before: Tensor) -> bool:
        """Of an adaptive schedule: has the entry changed by more than the threshold? Waits for the device.

        Args:
            entry, before: of one shape, now and in the last full pass; NaN is a change.
        """
        from torch import float32, linalg

        change = linalg.vector_norm(entry.detach() - before, dtype=float32)
        return not bool(change / linalg.vector_norm(before, dtype=float32) <= (self.threshold or 0.0))

    def full_steps(self, steps: int) -> int:
        """How many of the first `steps` steps are full: ⌈steps / clock⌉ for `every(clock)`.

        Raises:
            ArgumentError: that is decided at run time.
        """
        self.known_beforehand("how many steps are full")
        return self.bounds(steps)[0]

    def bounds(self, steps: int) -> tuple[int, int]:
        """How many of the first `steps` steps are full at least, and at most: the same unless it is adaptive."""
        certain = sum(self.is_full(step, steps) for step in range(1, steps + 1))
        if self.threshold is None:
            return certain, certain
        return certain + (steps - certain) // (self.longest + 1), steps

    def known_beforehand(self, what: str) -> None:
        """Raise `ArgumentError` if it is adaptive: `what` needs to know the steps before they run."""
        if self.threshold is not None:
            raise ArgumentError(
                f"{what} is known beforehand only of a schedule that does not decide at run time",
                seen={"schedule": self},
                do="pass Schedule.every(...) or Schedule.at(...)",
            )

    def preview(self, steps: int) -> str:
        """One letter a step: F for full, A for adaptor, ? for what is decided at run time."""
        other = "A" if self.threshold is None else "?"
        return " ".join("F" if self.is_full(step, steps) else other for step in range(1, steps + 1))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class _Ticks:
    """The rule of `every`: as an object, so that equal schedules are equal."""

    clock: float
    start: int
    warmup: int
    end: int | None
    last: int = 0

    def __call__(self, step: int, steps: int | None = None) -> bool:
        if step < self.start or step <= self.warmup or (self.end is not None and step > self.end):
            return False
        if steps is not None and step > steps - self.last:
            return False
        return (step - self.start) % self.clock != 0


@dataclass(frozen=True, slots=True)
class _Spread:
    """The rule of `spread`."""

    clock: int
    first: int
    last: int

    def __call__(self, step: int, steps: int | None = None) -> bool:
        return (step - 1) % self.clock != 0 if steps is None else step in _spread(self, steps)


@functools.lru_cache(maxsize=256)
def _spread(rule: _Spread, steps: int) -> frozenset[int]:
    """The adaptor steps of `spread`, of so many."""
    full = -(-steps // rule.clock)
    inner = full - rule.first - rule.last  # full steps between, with a run of adaptor steps before and after each
    if inner < 1 or -(-(steps - full) // (inner + 1)) > rule.clock:
        return frozenset(step for step in range(2, steps + 1) if rule(step))
    at, step = list[int](), rule.first + 1
    for k in range(inner + 1):
        length = (steps - full + k) // (inner + 1)  # these sum to all adaptor steps, the shorter runs first
        at += range(step, step + length)
        step += length + 1
    return frozenset(at)


@dataclass(frozen=True, slots=True)
class _Early:
    """The rule of `early`."""

    clock: int

    def __call__(self, step: int, steps: int | None = None) -> bool:
        full = 0 if steps is None else -(-steps // self.clock)
        if steps is None or full < 3:
            return (step - 1) % self.clock != 0
        return step in early_steps(full, steps)


@functools.lru_cache(maxsize=256)
def early_steps(full: int, steps: int) -> tuple[int, ...]:
    """The adaptor steps of `early` where so many of all are full, whatever the clock.

    Example:
        >>> early_steps(9, 20)  # the distances of the full ones grow: 1, 2, 3, 4, 6, 8, 12, 16, 20
        (5, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19)
    """
    at = [1]
    for k in range(1, full):
        at.append(max(1 + round((steps - 1) * (k / (full - 1)) ** 2), at[-1] + 1))
    return tuple(step for step in range(1, steps + 1) if step not in at)


@dataclass(frozen=True, slots=True)
class _Among:
    """The rule of `at`."""

    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        return step in self.steps


def _written(**options: tuple[object, object]) -> str:
    """Options, (value, default) each, as `parse` reads them: those that are not at their defaults."""
    return "".join(f", {name}={value}" for name, (value, default) in options.items() if value != default)


def _takes_a_step(rule: object) -> bool:
    """Is it a function that can be called with one number? Of one written in C nobody can tell."""
    if not callable(rule):
        return False
    try:
        inspect.signature(getattr(rule, "forward", rule)).bind(2)  # a module's own signature takes anything
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def check_clock(clock: object) -> None:
    """Check that a clock is an int of at least 1.

    Args:
        clock: what somebody passed.

    Raises:
        ArgumentError: it is another number, or none.

    Example:
        >>> check_clock(2)
    """
    rule = "a clock is an int of at least 1: one full pass every `clock` steps"
    whole("clock", clock, least=1, rule=rule, example=2)

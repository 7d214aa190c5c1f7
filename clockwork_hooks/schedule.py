"""Which denoising steps run the whole UNet and which the adaptor: pure arithmetic, steps numbered from 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clockwork_hooks.errors import ArgumentError

__all__ = ["Schedule", "check_clock"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step → full or adaptor. Step 1, the first of a trajectory, is always full.

    Build one with `Schedule.every`, `Schedule.at` or `Schedule.where`; combine it with `within`.

    Attributes:
        uses_adaptor: step (from 1) → does the adaptor stand in for the region?
        name: how it prints.

    Example:
        >>> print(Schedule.every(2).preview(8))
        F A F A F A F A
        >>> print(Schedule.at({5, 6, 7, 8}).preview(8))
        F F F F A A A A
        >>> print(Schedule.every(3, start=4).preview(9))
        F F F F A A F A A

    Source: arXiv 2312.08128, Sec. 4.3 and Tab. 3, whose step numbers these are.
    """

    uses_adaptor: Callable[[int], bool]
    name: str

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
    ) -> Schedule:
        """One full pass every `clock` steps.

        Args:
            clock: period; 1 means that every step is full.
            start: the clock begins to tick at this step, which is full; steps before it are full.
            stop: last step that may use the adaptor; None for no end.
            warmup: so many first steps are full, whatever the clock says.
            final: so many last steps are full; needs `steps`.
            steps: number of steps of a trajectory.

        Raises:
            ArgumentError: a number is outside its rule, or `final` comes without `steps`.
        """
        check_clock(clock)
        for name, value, low in (("start", start, 1), ("warmup", warmup, 0), ("final", final, 0)):
            _check_count(name, value, low)
        if stop is not None:
            _check_count("stop", stop, start)
        if steps is not None:
            _check_count("steps", steps, 1)
        if final and steps is None:
            raise ArgumentError(
                "final full steps are counted from the end", seen={"final": final, "steps": None}, do="pass steps= too"
            )
        end = None if stop is None and not final else min(x for x in (stop, steps and steps - final) if x is not None)

        def uses_adaptor(step: int) -> bool:
            if step < start or step <= warmup or (end is not None and step > end):
                return False
            return (step - start) % clock != 0

        given = {"start": (start, 1), "stop": (stop, None), "warmup": (warmup, 0), "final": (final, 0)}
        options = "".join(f", {name}={value}" for name, (value, default) in given.items() if value != default)
        return cls(uses_adaptor, f"every({clock}{options})")

    @classmethod
    def at(cls, steps: Iterable[int]) -> Schedule:
        """The adaptor at exactly these steps, numbered from 1 as in the paper's Tab. 3: `Schedule.at({2, 4, 6, 8})`.

        Raises:
            ArgumentError: a step is no int, or below 2 (the first step is always full).
        """
        given = list(steps) if isinstance(steps, Iterable) else [steps]
        wrong = [step for step in given if isinstance(step, bool) or not isinstance(step, int) or step < 2]
        if wrong or not isinstance(steps, Iterable):
            raise ArgumentError(
                "adaptor steps are a set of ints of at least 2: the first step of a trajectory is always full",
                seen={"steps": repr(steps), "outside the rule": wrong or "no set"},
                do="number the steps from 1, as in {2, 4, 6, 8}",
            )
        chosen = frozenset(given)
        return cls(chosen.__contains__, f"at({sorted(chosen)})")

    @classmethod
    def where(cls, uses_adaptor: Callable[[int], bool]) -> Schedule:
        """The adaptor at each step (from 1) for which `uses_adaptor(step)` is true."""
        if not callable(uses_adaptor):
            raise ArgumentError(
                "a schedule's rule is a function of the step", seen={"got": repr(uses_adaptor)}, do="pass step -> bool"
            )
        return cls(uses_adaptor, f"where({getattr(uses_adaptor, '__name__', 'rule')})")

    @classmethod
    def of(cls, value: Schedule | Iterable[int] | Callable[[int], bool]) -> Schedule:
        """A schedule from what `wrap(schedule=...)` takes: a schedule, adaptor steps, or a rule."""
        if isinstance(value, Schedule):
            return value
        if isinstance(value, (str, bytes)) or not (callable(value) or isinstance(value, Iterable)):
            raise ArgumentError(
                "a schedule is a Schedule, a set of adaptor steps, or a function step -> bool",
                seen={"schedule": repr(value)},
                do="pass Schedule.every(2), {2, 4, 6, 8} or a function",
            )
        return cls.where(value) if callable(value) else cls.at(value)

    def is_full(self, step: int) -> bool:
        """Is this step (from 1) a full pass?"""
        return step <= 1 or not self.uses_adaptor(step)

    def full_steps(self, steps: int) -> int:
        """How many of the first `steps` steps are full: ⌈steps / clock⌉ for `every(clock)`."""
        return sum(self.is_full(step) for step in range(1, steps + 1))

    def preview(self, steps: int) -> str:
        """One letter a step: F for full, A for adaptor."""
        return " ".join("F" if self.is_full(step) else "A" for step in range(1, steps + 1))

    def __str__(self) -> str:
        return self.name


def check_clock(clock: object) -> None:
    """A clock is an int of at least 1.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(clock, bool) or not isinstance(clock, int) or clock < 1:
        raise ArgumentError(
            "a clock is an int of at least 1: one full pass every `clock` steps",
            seen={"clock": repr(clock)},
            do="pass clock=2",
        )


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(f"{name} is an int of at least {low}", seen={name: repr(value)}, do=f"pass {name}={low}")

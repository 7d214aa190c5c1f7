"""Choose adaptor steps for a budget from measured sensitivities, one region at a time; pure arithmetic.

The error that a set of adaptor steps makes is predicted as √Σ(w(s)·d(s, age))²: d(s, age) is what keeping a feature for
`age` steps is off by at step s (`Drift.errors`), and w(s) is what such an error does to the result. w is measured, one
adaptor step at a time, where a probe was made, and interpolated between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clockwork_hooks.schedule import Schedule

__all__ = ["Sensitivity", "adaptive_steps", "probe_steps", "rule_of_thumb", "threshold_for"]


def probe_steps(steps: int, probes: int) -> tuple[int, ...]:
    """Steps from 2 to the last, evenly spread and denser at the beginning, where errors hurt most.

    Example:
        >>> probe_steps(20, 6)
        (2, 4, 7, 10, 15, 20)
    """
    last = steps - 1
    count = min(probes, last)
    if count <= 1:
        return tuple(range(2, 2 + count))
    spread = (2 + round((last - 1) * (k / (count - 1)) ** 1.5) for k in range(count))
    return tuple(dict.fromkeys(spread))


def adaptive_steps(entries: Sequence[Sequence[float | None]], threshold: float, longest: int) -> tuple[int, ...]:
    """The adaptor steps that `Schedule.adaptive(threshold, longest=longest)` takes where the entry moves like this.

    Args:
        entries: for each age from 1: how far the entry is from what it was so many steps before, for each step from 1.
        threshold, longest: of the schedule.

    Example:
        >>> adaptive_steps([(None, 0.1, 0.1, 0.3, 0.1), (None, None, 0.2, 0.4, 0.3)], threshold=0.25, longest=2)
        (2, 3, 5)
    """
    steps, age = [], 0
    for step in range(2, len(entries[0]) + 1):
        moved = entries[age][step - 1] if age < min(longest, len(entries)) else None
        age = age + 1 if moved is not None and moved <= threshold else 0
        if age:
            steps.append(step)
    return tuple(steps)


def threshold_for(entries: Sequence[Sequence[float | None]], count: int, longest: int) -> float | None:
    """The smallest threshold with which so many steps or more use the adaptor; None if none does."""
    values = sorted({value for age in entries for value in age if value is not None and 0 < value < math.inf})
    return next((v for v in values if len(adaptive_steps(entries, v, longest)) >= count), None)


def rule_of_thumb(chosen: Iterable[int], steps: int) -> str:
    """The simple schedule that adaptor steps amount to, as text; the nearest one, where none has these very steps.

    Example:
        >>> rule_of_thumb({3, 4, 6, 7}, 8)
        'spread(2)'
        >>> rule_of_thumb({3, 5, 7}, 8)
        'every(2, first_full=2)'
        >>> rule_of_thumb({3, 4, 6, 8}, 8)
        'nearly every(5, first_full=2): 1 step differs'
    """
    wanted = set(chosen)
    rules = [
        *(Schedule.every(clock) for clock in range(2, steps + 1)),
        *(Schedule.spread(clock) for clock in range(2, steps + 1)),
        *(Schedule.early(clock) for clock in range(2, steps + 1)),
        *(
            Schedule.every(clock, first_full=first, last_full=last)
            for last in range(3)
            for first in range(1, max(steps - 1, 2))
            for clock in range(2, steps + 1)
        ),
    ]
    off = [(len(wanted ^ set(rule.adaptor_steps(steps))), number) for number, rule in enumerate(rules)]
    if not off:
        return "every step is full"
    differing, number = min(off)
    if not differing:
        return str(rules[number])
    return f"nearly {rules[number]}: {differing} {'step differs' if differing == 1 else 'steps differ'}"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What adaptor steps of one region cost in error.

    Attributes:
        ages: for each age from 1: what keeping the exit so long is off by, relative, for each step from 1.
        weights: step → measured error of the result with this adaptor step alone, over what the exit was off by.
    """

    ages: Sequence[Sequence[float | None]]
    weights: Mapping[int, float]

    def weight(self, step: int) -> float:
        """At any step, on a logarithmic scale between the probes."""
        probes = sorted(self.weights)
        if step <= probes[0] or step >= probes[-1]:
            return self.weights[probes[0] if step <= probes[0] else probes[-1]]
        high = next(s for s in probes if s >= step)
        low = max(s for s in probes if s <= step)
        if high == low:
            return self.weights[high]
        share = (step - low) / (high - low)
        one, two = (math.log(max(self.weights[s], 1e-12)) for s in (low, high))
        return math.exp(one + share * (two - one))

    def predicted(self, chosen: frozenset[int]) -> float:
        """Error of the result with these adaptor steps; infinite where a feature would have to serve too long."""
        total, age = 0.0, 0
        for step in range(1, len(self.ages[0]) + 1):
            age = age + 1 if step in chosen else 0
            total += self._squared(step, age) if age else 0.0
        return math.sqrt(total)

    def best(self) -> list[frozenset[int]]:
        """The sets of 1, 2, ... adaptor steps with the least predicted error.

        Squared errors add up over steps, and each depends on its step and age alone: dynamic programming over the
        steps, with (age, number of adaptor steps so far) as the state, finds the exact minimum.
        """
        states: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
        for step in range(1, len(self.ages[0]) + 1):
            after: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for (age, count), (cost, chosen) in states.items():
                _keep(after, (0, count), (cost, chosen))
                more = self._squared(step, age + 1) if step > 1 else math.inf
                if not math.isinf(more):
                    _keep(after, (age + 1, count + 1), (cost + more, (*chosen, step)))
            states = after
        least: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (_, count), state in states.items():
            if count:
                _keep(least, count, state)
        return [frozenset(least[count][1]) for count in sorted(least)]

    def _squared(self, step: int, age: int) -> float:
        off = self.ages[age - 1][step - 1] if age <= len(self.ages) else None
        return math.inf if off is None else float(self.weight(step) * off) ** 2


def _keep(table: dict[Any, tuple[float, tuple[int, ...]]], key: Any, one: tuple[float, tuple[int, ...]]) -> None:
    if key not in table or one < table[key]:
        table[key] = one

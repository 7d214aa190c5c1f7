"""Choose adaptor steps for a budget from measured sensitivities: greedy, one region at a time; pure arithmetic.

The error that a set of adaptor steps makes is predicted as √Σ(w(s)·d(s, age))²: d(s, age) is what keeping a feature for
`age` steps is off by at step s (`Drift.ages`), and w(s) is what such an error does to the result. w is measured, one
adaptor step at a time, where a probe was made, and interpolated between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Sensitivity", "probe_steps"]


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
        known = sorted(self.weights)
        if step <= known[0] or step >= known[-1]:
            return self.weights[known[0] if step <= known[0] else known[-1]]
        high = next(s for s in known if s >= step)
        low = max(s for s in known if s <= step)
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
            if not age:
                continue
            off = self.ages[age - 1][step - 1] if age <= len(self.ages) else None
            if off is None:
                return math.inf
            total += (self.weight(step) * off) ** 2
        return math.sqrt(total)

    def greedy(self, most: int) -> list[frozenset[int]]:
        """Sets of 1, 2, ... `most` adaptor steps, each the one before with the step that adds the least error."""
        found: list[frozenset[int]] = []
        chosen: frozenset[int] = frozenset()
        steps = range(2, len(self.ages[0]) + 1)
        while len(chosen) < most:
            options = [chosen | {step} for step in steps if step not in chosen]
            best = min(options, key=self.predicted, default=None)
            if best is None or math.isinf(self.predicted(best)):
                break
            chosen = self.improved(best)
            found.append(chosen)
        return found

    def improved(self, chosen: frozenset[int]) -> frozenset[int]:
        """The set after every exchange of one step for another that lowers the predicted error."""
        steps = range(2, len(self.ages[0]) + 1)
        while True:
            now = self.predicted(chosen)
            swaps = [(chosen - {a}) | {b} for a in chosen for b in steps if b not in chosen]
            best = min(swaps, key=self.predicted, default=chosen)
            if self.predicted(best) >= now * (1 - 1e-9):
                return chosen
            chosen = best

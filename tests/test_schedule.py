"""Which steps are full: the paper's numbering, windows, and what `wrap(schedule=...)` takes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import clockwork_hooks as ch
from clockwork_hooks import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.every(1), "F F F F F F F F"),
        (Schedule.every(2), "F A F A F A F A"),
        (Schedule.every(3), "F A A F A A F A"),
        (Schedule.every(4), "F A A A F A A A"),
        (Schedule.at({2, 4, 6, 8}), "F A F A F A F A"),  # the paper's Tab. 3 names the adaptor steps
        (Schedule.at({5, 6, 7, 8}), "F F F F A A A A"),
        (Schedule.at([]), "F F F F F F F F"),
        (Schedule.every(2, start=3), "F F F A F A F A"),
        (Schedule.every(2, start=2), "F F A F A F A F"),
        (Schedule.every(2, stop=4), "F A F A F F F F"),
        (Schedule.every(2, start=3, stop=4), "F F F A F F F F"),
        (Schedule.every(2, warmup=2), "F F F A F A F A"),
        (Schedule.every(3, warmup=5), "F F F F F A F A"),
        (Schedule.every(2, final=3, steps=8), "F A F A F F F F"),
        (Schedule.every(2, final=8, steps=8), "F F F F F F F F"),
        (Schedule.every(2, stop=3, final=1, steps=8), "F A F F F F F F"),
        (Schedule.where(lambda step: True), "F A A A A A A A"),  # the first step is full, whatever the rule says
        (Schedule.where(lambda step: step % 2), "F F A F A F A F"),
        (Schedule.of({2, 3}), "F A A F F F F F"),
        (Schedule.of(iter([2, 3])), "F A A F F F F F"),
        (Schedule.of(lambda step: step > 6), "F F F F F F A A"),
    ],
)
def test_preview(schedule: Schedule, expected: str) -> None:
    assert schedule.preview(8) == expected
    assert schedule.full_steps(8) == expected.count("F")
    assert [schedule.is_full(step) for step in range(1, 9)] == [letter == "F" for letter in expected.split()]


def test_of_leaves_a_schedule_alone() -> None:
    schedule = Schedule.every(3)
    assert Schedule.of(schedule) is schedule


@given(
    clock=st.integers(1, 6),
    start=st.integers(1, 6),
    length=st.integers(0, 10),
    warmup=st.integers(0, 6),
    final=st.integers(0, 6),
    steps=st.integers(1, 12),
)
def test_every_by_its_words(clock: int, start: int, length: int, warmup: int, final: int, steps: int) -> None:
    """Ticks drawn by hand from `start`; the window, the first and the last steps cross adaptor steps out."""
    schedule = Schedule.every(clock, start=start, stop=start + length, warmup=warmup, final=final, steps=steps)
    full = {1, *range(1, start), *itertools.islice(itertools.count(start, clock), steps), *range(1, warmup + 1)}
    full |= {*range(start + length + 1, steps + 1), *range(steps - final + 1, steps + 1)}
    assert [schedule.is_full(step) for step in range(1, steps + 1)] == [step in full for step in range(1, steps + 1)]


@given(clock=st.integers(1, 20), steps=st.integers(0, 100))
def test_number_of_full_steps(clock: int, steps: int) -> None:
    assert Schedule.every(clock).full_steps(steps) == math.ceil(steps / clock)


def test_names() -> None:
    assert str(Schedule.every(2)) == "every(2)"
    assert str(Schedule.every(2, start=3, stop=8)) == "every(2, start=3, stop=8)"
    assert str(Schedule.every(2, warmup=1, final=2, steps=8)) == "every(2, warmup=1, final=2)"
    assert str(Schedule.at({4, 2})) == "at([2, 4])"

    def late(step: int) -> bool:
        return step > 9

    assert str(Schedule.where(late)) == "where(late)"
    assert ch.Schedule is Schedule

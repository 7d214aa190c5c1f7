"""Which steps are full: the paper's numbering, windows, and what `wrap(schedule=...)` takes."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clockwork_hooks as ch
from clockwork_hooks import Schedule
from tests.small_unet import Tiny


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
        (Schedule.every(2, first_full=2), "F F A F A F A F"),
        (Schedule.every(2, first_full=2, last_full=1), "F F A F A F A F"),
        (Schedule.every(3, first_full=2, last_full=2), "F F A A F A F F"),
        (Schedule.every(2, last_full=8), "F F F F F F F F"),
        (Schedule.spread(1), "F F F F F F F F"),
        (Schedule.spread(2), "F F A A F A A F"),
        (Schedule.spread(3), "F A A F A A F A"),  # else five adaptor steps would follow each other
        (Schedule.spread(8), "F A A A A A A A"),
        (Schedule.spread(2, first_full=1, last_full=0), "F A F A F A F A"),
        (Schedule.early(1), "F F F F F F F F"),
        (Schedule.early(2), "F F A F A A A F"),
        (Schedule.early(4), "F A A A F A A A"),  # two full steps say nothing of distances
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
    assert [schedule.is_full(step, 8) for step in range(1, 9)] == [letter == "F" for letter in expected.split()]


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


@given(
    clock=st.integers(1, 6),
    first=st.sampled_from(["start", "first_full"]),
    start=st.integers(1, 6),
    stop=st.one_of(st.none(), st.integers(6, 12)),
    warmup=st.integers(0, 6),
    ends=st.one_of(st.just({}), st.fixed_dictionaries({"final": st.integers(0, 6), "steps": st.integers(1, 12)})),
    last=st.integers(0, 3),
)
def test_every_is_written_as_it_is_made(
    clock: int, first: str, start: int, stop: int | None, warmup: int, ends: dict[str, int], last: int
) -> None:
    """A saved adaptor says in text which steps it was made for."""
    options: dict[str, Any] = {first: start, "stop": stop, "warmup": warmup, "last_full": last, **ends}
    schedule = Schedule.every(clock, **options)
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(schedule.written(20)) == schedule


@given(clock=st.integers(1, 20), steps=st.integers(0, 100))
def test_number_of_full_steps(clock: int, steps: int) -> None:
    assert Schedule.every(clock).full_steps(steps) == math.ceil(steps / clock)


def test_names() -> None:
    assert str(Schedule.every(2)) == "every(2)"
    assert str(Schedule.every(2, start=3, stop=8)) == "every(2, start=3, stop=8)"
    assert str(Schedule.every(2, warmup=1, final=2, steps=8)) == "every(2, warmup=1, final=2, steps=8)"
    assert str(Schedule.at({4, 2})) == "at([2, 4])"

    def late(step: int) -> bool:
        return step > 9

    assert str(Schedule.where(late)) == "where(late)"
    assert ch.Schedule is Schedule


@given(
    clock=st.integers(1, 9), first=st.integers(1, 4), last=st.integers(0, 3), steps=st.integers(1, 60)
)  # fmt: skip
def test_spread_costs_what_the_clock_costs(clock: int, first: int, last: int, steps: int) -> None:
    """As many full steps; where they are not the clock's, the first and last are among them, and runs are short."""
    schedule = Schedule.spread(clock, first_full=first, last_full=last)
    full = [step for step in range(1, steps + 1) if schedule.is_full(step, steps)]
    assert len(full) == math.ceil(steps / clock) == Schedule.every(clock).full_steps(steps)
    if full != list(range(1, steps + 1, clock)):
        assert full[:first] == list(range(1, first + 1))
        assert set(range(steps - last + 1, steps + 1)) <= set(full)
        runs = [len(list(run)) for adapted, run in itertools.groupby(schedule.preview(steps).split()) if adapted == "A"]
        assert max(runs) - min(runs) <= 1
        assert runs == sorted(runs)
        assert max(runs) <= clock
    elif clock > 1 and steps >= 2 * clock**2 and (first, last) == (2, 1):
        pytest.fail("spread is of use from 2·clock² steps on")


@given(clock=st.integers(1, 9), steps=st.integers(1, 60))
def test_early_costs_what_the_clock_costs(clock: int, steps: int) -> None:
    """As many full steps, the first and the last among them, and distances that grow."""
    schedule = Schedule.early(clock)
    full = [step for step in range(1, steps + 1) if schedule.is_full(step, steps)]
    assert len(full) == math.ceil(steps / clock)
    if len(full) > 2:
        assert (full[0], full[-1]) == (1, steps)
        distances = [after - before for before, after in itertools.pairwise(full)]
        assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(distances))  # positions are rounded


@given(clock=st.integers(1, 6), steps=st.integers(1, 20), step=st.integers(1, 20))
def test_what_counts_from_the_end_needs_the_number_of_steps(clock: int, steps: int, step: int) -> None:
    assert Schedule.spread(clock).is_full(step) == Schedule.every(clock).is_full(step)
    last = Schedule.every(clock, last_full=2)
    assert last.is_full(step) == Schedule.every(clock).is_full(step)
    assert last.is_full(step, steps) == (Schedule.every(clock).is_full(step) or step > steps - 2)


@pytest.mark.parametrize("schedule", [Schedule.spread(2), Schedule.early(2), Schedule.every(2, last_full=1)], ids=str)
def test_steps_beyond_the_number_that_was_said_are_full(schedule: Schedule) -> None:
    assert schedule.preview(8).split().count("A") > 2
    assert all(schedule.is_full(step, 8) for step in range(9, 20))


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.every(2),
        Schedule.every(3, first_full=2, last_full=1),
        Schedule.every(2, start=3, stop=8, warmup=4),
        Schedule.spread(2),
        Schedule.spread(4, first_full=3, last_full=0),
        Schedule.early(3),
        Schedule.at({3, 4, 6, 7}),
        Schedule.at([]),
        Schedule.adaptive(0.25, longest=3, warmup=2),
    ],
    ids=str,
)
def test_text_and_back(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.of(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "every", "every(2", "where(rule)", "every(n)", "at(__import__('os'))", "2 + 2"])
def test_text_that_is_no_schedule(text: str) -> None:
    with pytest.raises(ch.errors.ArgumentError, match="a schedule is written as one of"):
        Schedule.parse(text)


def test_a_sampler_says_how_many_steps_it_takes() -> None:
    """`cw.trajectory(steps=)` is what schedules that count from the end need; without it they are the plain clock."""
    unet, sample = Tiny(), torch.randn(1, 2, 16, 16)
    with torch.no_grad(), ch.wrap(unet, schedule=Schedule.spread(2)) as cw:

        def passes(steps: int | None) -> str:
            letters = ""
            with cw.trajectory(steps=steps):
                for t in range(800, 0, -100):
                    before = cw.stats.adaptor_passes
                    unet(sample, t)
                    letters += "A" if cw.stats.adaptor_passes > before else "F"
            return " ".join(letters)

        passes(8)  # the first call is recorded
        assert passes(8) == Schedule.spread(2).preview(8) == "F F A A F A A F"
        with pytest.warns(ch.OtherStepsWarning, match="steps: not known"):
            assert passes(None) == Schedule.every(2).preview(8)
        with pytest.warns(ch.OtherStepsWarning, match=r"(?s)declared: 5.*this step: 6"):
            assert passes(5) == Schedule.spread(2).preview(5) + " F F F"
        assert passes(4) == Schedule.spread(2).preview(4) + " F F F F"  # that is said once
        assert passes(9)[:15] == Schedule.spread(2).preview(9)[:15]
    with pytest.raises(ch.errors.ArgumentError, match="steps"):
        cw.trajectory(steps=0)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.every(3, first_full=2, last_full=1),
        Schedule.spread(2),
        Schedule.early(3),
        Schedule.at({2, 5}),
        Schedule.adaptive(0.2),
        Schedule.where(lambda step: step % 3 > 0),
    ],
    ids=str,
)
def test_what_is_written_is_read(schedule: Schedule) -> None:
    again = Schedule.parse(schedule.written(9))
    if schedule.threshold is not None or not str(schedule).startswith("where"):
        assert again == schedule
    else:
        assert again.adaptor_steps(9) == schedule.adaptor_steps(9) == (2, 4, 5, 7, 8)

"""Real-size configurations on meta have the regions of the tiny ones; their rows in docs/zoo.md are a rerun's."""

import re

import pytest

import clockwork_hooks as ch
from clockwork_hooks.regions.find import choose
from tests.zoo import REFUSED, ZOO, table
from tests.zoo.real import REAL, Real


def blanked(paths: tuple[str, ...]) -> set[str]:
    """Without the numbers of levels and layers."""
    return {re.sub(r"\d+", "#", path) for path in paths}


@pytest.mark.parametrize(
    "real", [pytest.param(real, id=name, marks=[pytest.mark.slow] * real.slow) for name, real in REAL.items()]
)
def test_the_region_is_that_of_the_tiny_one(real: Real) -> None:
    model, args, kwargs = real.build()
    trace = ch.trace(model, *args, **kwargs)
    region = choose(trace, model)
    tiny = ZOO[real.tiny]()

    assert region.level == tiny.level
    assert region.exit.path == real.exit
    assert blanked(region.exit.paths) == blanked(tiny.exit)
    if real.entry:
        assert real.entry in region.entry.paths
        assert blanked((real.entry,)) <= blanked(tiny.entry)
    else:
        assert not region.entry.paths
        assert not tiny.entry
    if real.same:
        args, named = tiny.inputs()
        small = ch.find_region(tiny.model, *args, **named)
        assert region.fingerprint != small.fingerprint  # other widths
        assert [(call.path, call.ordinal) for call in region.skipped] == [
            (call.path, call.ordinal) for call in small.skipped
        ]
        assert (region.entry.paths, region.exit.paths) == (small.entry.paths, small.exit.paths)
    sample = trace.inputs[trace.sample].meta["shape"]
    assert table.real_row(real, region, sample) in table.committed()


def test_the_docs_have_these_rows_and_no_others() -> None:
    """In each table's first column: every case and real model, the headings, the rules under them."""
    names = {row[0] for row in table.committed()}
    assert names == {*ZOO, *REFUSED, *(real.title for real in REAL.values()), "case", "model", "---"}

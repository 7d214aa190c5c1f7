"""docs/zoo.md from a run: `python -m tests.zoo.table` writes it, tests/test_zoo.py and tests/test_zoo_real.py compare.

The tables' rows are made here from what was found; nothing in them is typed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import clockwork_hooks as ch
from clockwork_hooks._numbers import quantity, shape
from clockwork_hooks._tree import leaves
from clockwork_hooks.regions.cut import Slot
from tests.zoo import REFUSED, ZOO, RefusedCase, ZooCase
from tests.zoo.proof import nan_proof
from tests.zoo.real import REAL, Real

DOCS = Path(__file__).parents[2] / "docs" / "zoo.md"
SERVED_HEAD = ("case", "model", "levels", "region", "parameters skipped", "MACs saved at clock 2", "NaN proof")
REFUSED_HEAD = ("case", "model", "why")
REAL_HEAD = ("model", "sample", "levels", "region", "full pass", "parameters skipped", "MACs saved at clock 2")


def levels(region: ch.Region) -> str:
    """Resolutions from the edge down; gates of one pixel left out."""
    below = (space for space, *_ in region.by_level if math.prod(space) > 1)
    return " ▸ ".join(dict.fromkeys(map(shape, (region.resolution, *below))))


def ends(region: ch.Region) -> str:
    return f"`{region.entry.path}` → `{region.exit.path}`" + (f" (call {region.exit.call})" if region.exit.call else "")


def saved(region: ch.Region) -> str:
    """Of two passes one leaves the region out: half of its share."""
    return f"{region.macs_share / 2:.1%}"


def proved(case: ZooCase, region: ch.Region) -> bool:
    """Is the output bit-equal with NaN from every skipped call but the exit? By the prover, not by the package."""
    skipped: dict[str, set[int]] = defaultdict(set)
    for call in region.skipped:
        skipped[call.path].add(call.ordinal)
    last = next(c for c in region.skipped if any(isinstance(s, Slot) and s.exit for _, s in leaves(c.output)))
    return nan_proof(case.model, case.args, case.kwargs, last.path, last.ordinal, dict(skipped))


def served_row(case: ZooCase, region: ch.Region) -> tuple[str, ...]:
    proof = "bit-equal" if proved(case, region) else "FAILS"
    return (case.name, case.source, levels(region), ends(region), f"{region.parameter_share:.1%}", saved(region), proof)


def refused_row(case: RefusedCase, error: ch.RegionNotFoundError) -> tuple[str, ...]:
    return (case.name, case.source, str(error.seen["why"]))


def real_row(real: Real, region: ch.Region, sample: Sequence[int]) -> tuple[str, ...]:
    shares = (quantity(region.full_macs, "MACs"), f"{region.parameter_share:.1%}", saved(region))
    return (real.title, shape(sample), levels(region), ends(region), *shares)


def committed() -> set[tuple[str, ...]]:
    """All rows of the tables in docs/zoo.md."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")}


def _served() -> Iterable[tuple[str, ...]]:
    for build in ZOO.values():
        case = build()
        args, kwargs = case.inputs()
        yield served_row(case, ch.find_region(case.model, *args, **kwargs))


def _refused() -> Iterable[tuple[str, ...]]:
    for build in REFUSED.values():
        case = build()
        args, kwargs = case.inputs()
        try:
            ch.find_region(case.model, *args, **kwargs)
        except ch.RegionNotFoundError as error:
            yield refused_row(case, error)


def _real() -> Iterable[tuple[str, ...]]:
    for real in REAL.values():
        model, args, kwargs = real.build()
        yield real_row(real, ch.find_region(model, *args, **kwargs), next(iter((*args, *kwargs.values()))).shape)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page() -> str:
    """The whole page."""
    return f"""# The zoo

Which UNets were tested, what is skipped in each, and what is refused. Most are small, and built with the code of other
libraries; some are our own, with other structures.
{len(ZOO)} are served, and {len(REFUSED)} are refused with the reason. `tests/zoo/` builds them, with
the region that a reader of their code expects. For every one that is served `tests/test_zoo.py` proves:

- the region is the expected one, and none of the modules that must run lies in it;
- if every skipped call returns NaN, and the exit is the true one, the output is bit-equal: shown by a prover that does
  not use the library (the column "NaN proof"), and by wrapping, for wider and deeper regions too;
- clock 1 gives the UNet's output; an identity pass gives that of the UNet with the last step's exit put in by hand;
- the modules inside do not run, all others run as often as before; torch counts as many MACs as are reported;
- after `remove()` every module is what it was.

This page is written by `python -m tests.zoo.table`; the tests compare it with their own runs, numbers included.
"MACs saved" is at clock 2 with the identity adaptor, attention products counted.

## Served

{_markdown(SERVED_HEAD, _served())}

## Refused, and why

{_markdown(REFUSED_HEAD, _refused())}

## Real sizes

On the meta device, without weights. The regions are those of the tiny ones, but for the number of levels and layers
(`tests/test_zoo_real.py`).

{_markdown(REAL_HEAD, _real())}

## Left out

diffusers' `UNet1DModel` as a value function is in the list above though it is no denoiser. imagen-pytorch is imported
without its trainer and text encoder, which ask for the network; torchvision and kornia, which lucidrains' trainers
import, are stood in for while importing (`tests/zoo/third_party.py`). None of the packages of the list had to be left
out.
"""


if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")

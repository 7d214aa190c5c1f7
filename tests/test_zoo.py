"""Every zoo UNet through trace, regions and wrap: found where its code says, proved by execution, exact, restored.

What a case costs is paid once, in `Seen`: one trace, one plain run, one wrapped full pass and one adaptor pass whose
placeholders are NaN and whose adaptor gives the true exit. The tests ask it.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clockwork_hooks as ch
from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import leaves
from clockwork_hooks.engine import passes
from clockwork_hooks.graph.arguments import Binder
from clockwork_hooks.regions.cut import SkippedCall, Slot
from clockwork_hooks.regions.find import choose, regions_of
from tests.snapshot import snapshot
from tests.zoo import REFUSED, ZOO, Case, RefusedCase, ZooCase, random_unet, table
from tests.zoo.proof import map_tensors, same

RANDOM = 5
FIRST = int(os.environ.get("CLOCKWORK_RANDOM_SEED", time.time_ns() % 1_000_000))  # other UNets in every run


pytestmark = pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")  # the hooks are ours


def run(case: Case, moved: float = 0.0) -> Any:
    """One call of the model, its sample moved by a constant."""
    args, kwargs = case.inputs()
    if moved:
        args = (args[0] + moved, *args[1:])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return case.model(*args, **kwargs)


def last_call(region: ch.Region) -> SkippedCall:
    return next(c for c in region.skipped if any(isinstance(s, Slot) and s.exit for _, s in leaves(c.output)))


def observed(case: ZooCase, regions: Sequence[ch.Region]) -> tuple[Any, list[torch.Tensor]]:
    """The plain output, and each region's exit by a plain hook on the module that returns it."""
    outputs: dict[int, list[torch.Tensor]] = defaultdict(list)
    handles = []
    for k, last in enumerate(map(last_call, regions)):
        where = next(k for k, (_, slot) in enumerate(leaves(last.output)) if isinstance(slot, Slot) and slot.exit)

        def keep(module: nn.Module, args: Any, output: Any, k: int = k, where: int = where) -> None:
            outputs[k].append([leaf for _, leaf in leaves(output)][where].clone())

        handles.append(case.model.get_submodule(last.path).register_forward_hook(keep))
    with sdpa_kernel(SDPBackend.MATH):
        output = run(case)
    for handle in handles:
        handle.remove()
    return output, [outputs[k][last_call(region).ordinal] for k, region in enumerate(regions)]


def nan(slot: Slot) -> torch.Tensor:
    fill = float("nan") if slot.dtype.is_floating_point else 0
    return torch.full(slot.shape, fill, dtype=slot.dtype, device=slot.device)


class Oracle(nn.Module):
    """Returns the exit it was given, whatever was cached."""

    def __init__(self, exit: torch.Tensor) -> None:
        super().__init__()
        self.exit = exit

    def forward(self, entry: Any, exit_cached: torch.Tensor, *, time: Any, text: Any) -> torch.Tensor:
        assert exit_cached.shape == self.exit.shape
        return self.exit


@dataclass
class Pass:
    """One pass of a wrapped model: what came out, which modules ran how often, MACs as reported and as counted."""

    output: Any
    calls: Counter[str]
    macs: int
    flops: int


def session(case: ZooCase, region: ch.Region, exit: torch.Tensor) -> list[Pass]:
    """A full and an adaptor pass: placeholders are NaN, the adaptor's output is the true exit."""
    seen: list[Pass] = []
    calls: Counter[str] = Counter()
    with mock.patch.object(passes, "placeholder", nan), ch.wrap(case.model, Oracle(exit), region=region) as cw:
        handles = [
            module.register_forward_hook(lambda m, a, o, path=path: calls.update([path]))
            for path, module in case.model.named_modules()
        ]
        try:
            for _ in range(2):
                calls.clear()
                before = cw.stats.macs_run
                cw.step()
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    output = run(case)
                seen.append(Pass(output, Counter(calls), cw.stats.macs_run - before, counter.get_total_flops()))
        finally:
            for handle in handles:
                handle.remove()
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1, 1), cw.report()
    return seen


@dataclass
class Seen:
    """A case and what was found out about it."""

    case: ZooCase
    trace: ch.Trace = field(init=False)
    regions: tuple[ch.Region, ...] = field(init=False)  # the default one, then all others
    region: ch.Region = field(init=False)
    before: Any = field(init=False)
    expected: Any = field(init=False)
    exits: list[torch.Tensor] = field(init=False)
    passes: list[Pass] = field(init=False)

    def __post_init__(self) -> None:
        args, kwargs = self.case.inputs()
        self.trace = ch.trace(self.case.model, *args, **kwargs)
        self.regions = regions_of(self.trace, self.case.model)
        self.region = choose(self.trace, self.case.model)
        self.before = snapshot(self.case.model)
        others = [region for region in (*self.regions, self.region.inner) if region and region != self.region]
        self.regions = (self.region, *others)
        self.expected, self.exits = observed(self.case, self.regions)
        self.passes = session(self.case, self.region, self.exits[0])


@pytest.fixture(scope="module", params=[*ZOO, *(f"random-{k}" for k in range(RANDOM))])
def seen(request: pytest.FixtureRequest) -> Seen:
    name: str = request.param
    return Seen(ZOO[name]() if name in ZOO else random_unet(FIRST + int(name.split("-")[1])))


def covered(path: str, region: ch.Region) -> bool:
    return any(path == call.path or path.startswith(f"{call.path}.") for call in region.skipped)


def test_region_is_where_the_code_says(seen: Seen) -> None:
    region, case = seen.region, seen.case
    assert set(region.exit.paths) & set(case.exit)
    assert region.exit.call == case.exit_call
    assert not case.entry or set(region.entry.paths) & set(case.entry)
    assert region.resolution == case.resolution
    assert region.level == case.level
    assert [path for path in case.skipped if not covered(path, region)] == []
    assert [path for path in case.outside if covered(path, region)] == []


def test_nan_proof_by_the_independent_prover(seen: Seen) -> None:
    """And the row in docs/zoo.md, which tells the proof, is what this run gives."""
    assert table.proved(seen.case, seen.region)
    if seen.case.name in ZOO:
        assert table.served_row(seen.case, seen.region) in table.committed()


def test_an_adaptor_pass_with_the_true_exit_is_the_unet(seen: Seen) -> None:
    """With NaN for placeholders and the true exit for the adaptor's output, no bit of the output changes."""
    full, adaptor = seen.passes
    assert same(full.output, seen.expected)
    assert same(adaptor.output, seen.expected)


def test_macs_that_run_are_those_reported(seen: Seen) -> None:
    full, adaptor = seen.passes
    assert full.macs == seen.region.full_macs
    assert full.flops == 2 * full.macs
    assert adaptor.flops == 2 * adaptor.macs
    assert adaptor.macs == full.macs - seen.region.macs


def test_a_level_is_one_number(seen: Seen) -> None:
    """The table by level, the U above it on the same page, and the region's own levels; nothing is counted twice."""
    args, kwargs = seen.case.inputs()
    report = ch.flops_report(seen.case.model, *args, **kwargs)
    table = {row.name: row.full_macs for row in report.by_level()}
    skipped = {row.name: row.full_macs - (row.adaptor_pass_macs or 0) for row in report.by_level()}
    drawn, region = Counter[str](), Counter[str]()
    assert report.diagram is not None
    for block in report.diagram.blocks:
        drawn[shape(report.diagram.levels[block.level])] += block.macs
    highest = shape(report.diagram.levels[0])
    table[highest] += table.pop("no level", 0)  # what comes before the first convolution is drawn at the top
    assert table == drawn
    for space, down, up in seen.region.by_level:
        region[shape(space) or "no level"] += down + up
    assert {name: macs for name, macs in skipped.items() if macs} == region
    assert sum(region.values()) == seen.region.macs


def test_skipped_modules_do_not_run(seen: Seen) -> None:
    """Neither a skipped call nor one inside of it is seen by hooks, but for the one that returns the exit."""
    chosen = {(call.path, call.ordinal) for call in seen.region.skipped}
    hidden = Counter(
        str(call.path)
        for call in seen.trace.calls
        if any((around.path, around.ordinal) in chosen for around in seen.trace.ancestors(call))
        and call.path is not None
    )
    skipped = Counter(call.path for call in seen.region.skipped if call.exit[1] is None)
    full, adaptor = seen.passes
    assert len(chosen) + sum(hidden.values()) > 0
    assert +(full.calls - adaptor.calls) == hidden + skipped
    assert +(adaptor.calls - full.calls) == Counter()


def test_remove_brings_everything_back(seen: Seen) -> None:
    assert snapshot(seen.case.model) == seen.before
    with sdpa_kernel(SDPBackend.MATH):
        assert same(run(seen.case), seen.expected)


def test_every_other_region_and_cut(seen: Seen) -> None:
    """The wider and deeper regions, and the cut inside the resamplings: exact, counted, restored as well."""
    for region, exit in zip(seen.regions[1:], seen.exits[1:], strict=True):
        full, adaptor = session(seen.case, region, exit)
        assert same(full.output, seen.expected), region.line
        assert same(adaptor.output, seen.expected), region.line
        assert adaptor.flops == 2 * adaptor.macs == 2 * (full.macs - region.macs), region.line
    assert snapshot(seen.case.model) == seen.before


def test_clock_one_is_the_unet(seen: Seen) -> None:
    with pytest.warns(ch.NoEffectWarning):
        cw = ch.wrap(seen.case.model, clock=1, region=seen.region)
    with cw, sdpa_kernel(SDPBackend.MATH):
        assert same(run(seen.case), seen.expected)
        assert cw.stats.adaptor_passes == 0


def test_identity_injects_the_exit_of_the_step_before(seen: Seen) -> None:
    """Two steps with other samples: the second is the plain UNet with the first one's exit put in by a plain hook."""
    case, last = seen.case, last_call(seen.region)
    ordinals = iter(range(1_000_000))

    def inject(module: nn.Module, args: Any, output: Any) -> Any:
        if next(ordinals) != last.ordinal:
            return None
        slots = iter([slot for _, slot in leaves(last.output) if isinstance(slot, Slot)])
        return map_tensors(lambda tensor: seen.exits[0].clone() if next(slots).exit else tensor, output)

    with sdpa_kernel(SDPBackend.MATH):
        handle = case.model.get_submodule(last.path).register_forward_hook(inject)
        expected = run(case, 0.1)
        handle.remove()
        with ch.wrap(case.model, region=seen.region) as cw:
            cw.step()
            run(case)
            cw.step()
            output = run(case, 0.1)
        assert cw.stats.adaptor_passes == 1, cw.report()
    assert same(output, expected)
    assert not same(output, seen.expected)


def test_trace_runs_as_a_graph_module(seen: Seen) -> None:
    """The recorded graph is a real one: torch.fx checks it, prints it and runs it to the same output."""
    trace, case = seen.trace, seen.case
    trace.graph.lint()
    assert "placeholder" in str(trace.graph)
    if any(node.meta.get("constant") for node in trace.nodes):
        pytest.skip("the model brings tensors from outside its parameters: the graph takes them as inputs")
    args, kwargs = case.inputs()
    names = Binder(case.model.forward)(args, kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(1)
        outputs = fx.Interpreter(fx.GraphModule(case.model, trace.graph)).run(
            *(names.get(path) for path in trace.inputs)
        )
    plain = [t for _, t in leaves(seen.expected) if torch.is_tensor(t)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


# -- those that cannot be served ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(REFUSED))
def turned_away(request: pytest.FixtureRequest) -> RefusedCase:
    return REFUSED[request.param]()


def test_the_error_says_why(turned_away: RefusedCase) -> None:
    args, kwargs = turned_away.inputs()
    with pytest.raises(ch.RegionNotFoundError) as caught:
        ch.find_region(turned_away.model, *args, **kwargs)
    assert [part for part in turned_away.says if part not in str(caught.value)] == [], str(caught.value)
    assert table.refused_row(turned_away, caught.value) in table.committed()


def test_a_refused_unet_is_left_as_it_was(turned_away: RefusedCase) -> None:
    """Its first wrapped call is the error; after `remove()` it is the UNet that it was."""
    model = turned_away.model
    before, expected = snapshot(model), run(turned_away)
    with ch.wrap(model, clock=2), pytest.raises(ch.RegionNotFoundError) as caught:
        run(turned_away)
    assert turned_away.says[0] in str(caught.value)
    assert snapshot(model) == before
    assert same(run(turned_away), expected)

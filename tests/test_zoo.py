"""Every zoo UNet through trace, regions and wrap: found where its code says, proved by execution, exact, restored."""

import os
import time
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clockwork_hooks as ch
from clockwork_hooks import passes
from clockwork_hooks.inputs import Binder
from clockwork_hooks.passes import SkippedCall, Slot
from clockwork_hooks.tree import leaves
from tests.snapshot import snapshot
from tests.zoo import ZOO, ZooCase, random_unet
from tests.zoo.proof import nan_proof, same

RANDOM = 5
FIRST = int(os.environ.get("CLOCKWORK_RANDOM_SEED", time.time_ns() % 1_000_000))  # other UNets in every run


@pytest.fixture(scope="module", params=[*ZOO, *(f"random-{k}" for k in range(RANDOM))])
def case(request: pytest.FixtureRequest) -> ZooCase:
    name: str = request.param
    if name in ZOO:
        return ZOO[name]()
    return random_unet(FIRST + int(name.split("-")[1]))


def run(case: ZooCase) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return case.model(*case.args, **case.kwargs)


def covered(path: str, region: ch.Region) -> bool:
    return any(path == call.path or path.startswith(f"{call.path}.") for call in region.skipped)


def test_region_is_where_the_code_says(case: ZooCase) -> None:
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    assert set(region.exit.paths) & set(case.exit)
    assert region.exit.call == case.exit_call
    assert not case.entry or set(region.entry.paths) & set(case.entry)
    assert region.resolution == case.resolution
    assert region.level == case.level
    assert [path for path in case.skipped if not covered(path, region)] == []
    assert [path for path in case.kept if covered(path, region)] == []


def last_call(region: ch.Region) -> SkippedCall:
    return next(c for c in region.skipped if any(isinstance(s, Slot) and s.exit for _, s in leaves(c.output)))


def test_nan_proof_by_the_independent_prover(case: ZooCase) -> None:
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    skipped: dict[str, set[int]] = defaultdict(set)
    for call in region.skipped:
        skipped[call.path].add(call.ordinal)
    last = last_call(region)
    assert nan_proof(case.model, case.args, case.kwargs, last.path, last.ordinal, dict(skipped))


def test_nan_proof_of_every_region(case: ZooCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN for placeholders and the true exit for the adaptor's output, no bit of the output changes."""
    monkeypatch.setattr(passes, "placeholder", nan)
    expected = run(case)
    for outer in ch.find_regions(case.model, *case.args, **case.kwargs):
        for region in filter(None, (outer, outer.inner)):
            with ch.wrap(case.model, Oracle(true_exit(case, region)), region=region) as cw:
                for _ in range(2):
                    cw.step()
                    assert same(run(case), expected), region.line
                assert cw.stats.adaptor_passes == 1, cw.report()


def nan(slot: Slot) -> torch.Tensor:
    fill = float("nan") if slot.dtype.is_floating_point else 0
    return torch.full(slot.shape, fill, dtype=slot.dtype, device=slot.device)


def test_clock_one_is_the_unet(case: ZooCase) -> None:
    expected = run(case)
    with pytest.warns(ch.NoEffectWarning):
        cw = ch.wrap(case.model, clock=1)
    with cw:
        assert same(run(case), expected)
        assert same(run(case), expected)


class Oracle(nn.Module):
    """Returns the exit it was given, whatever was cached."""

    def __init__(self, exit: torch.Tensor) -> None:
        super().__init__()
        self.exit = exit

    def forward(self, entry: Any, exit_cached: torch.Tensor, *, time: Any, text: Any) -> torch.Tensor:
        assert exit_cached.shape == self.exit.shape
        return self.exit


def true_exit(case: ZooCase, region: ch.Region) -> torch.Tensor:
    """The exit by a plain hook on the module that returns it."""
    last = last_call(region)
    where = next(k for k, (_, slot) in enumerate(leaves(last.output)) if isinstance(slot, Slot) and slot.exit)
    seen: list[torch.Tensor] = []
    handle = case.model.get_submodule(last.path).register_forward_hook(
        lambda module, args, output: seen.append([leaf for _, leaf in leaves(output)][where].clone())
    )
    run(case)
    handle.remove()
    return seen[last.ordinal]


def counted_calls(model: nn.Module) -> tuple[Counter[str], list[Any]]:
    """How often each module is called from now on, by its first path."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda m, a, o, path=path: calls.update([path]))
        for path, module in model.named_modules()
    ]
    return calls, handles


@pytest.mark.parametrize("cut", ["outer", "paper"])
def test_an_adaptor_pass_skips_what_it_says_and_nothing_else(case: ZooCase, cut: str) -> None:
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    region = region if cut == "outer" else (region.inner or region)
    exit, expected, before = true_exit(case, region), run(case), snapshot(case.model)
    with ch.wrap(case.model, Oracle(exit), region=region) as cw:
        cw.step()
        run(case)
        full = cw.stats.macs_run
        cw.step()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(case)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1, 1), cw.report()
        assert counter.get_total_flops() == 2 * (cw.stats.macs_run - full), "MACs that ran are not those reported"
    assert snapshot(case.model) == before
    assert same(run(case), expected)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(case)
    assert counter.get_total_flops() == 2 * full == 2 * region.full_macs


def test_skipped_modules_do_not_run(case: ZooCase) -> None:
    """Inside a skipped call no module is called; every other call happens as often as before."""
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    trace = ch.trace(case.model, *case.args, **case.kwargs)
    chosen = {(call.path, call.ordinal) for call in region.skipped}
    hidden = Counter(
        str(call.path)
        for call in trace.calls
        if any((around.path, around.ordinal) in chosen for around in trace.ancestors(call)) and call.path is not None
    )
    exit = true_exit(case, region)
    with ch.wrap(case.model, Oracle(exit), region=region) as cw:
        calls, handles = counted_calls(case.model)
        cw.step()
        run(case)
        in_full_pass = Counter(calls)
        calls.clear()
        cw.step()
        run(case)
        for handle in handles:
            handle.remove()
    assert cw.stats.adaptor_passes == 1
    assert sum(hidden.values()) > 0
    assert +(in_full_pass - calls) == hidden
    assert +(calls - in_full_pass) == Counter()


def test_identity_injects_the_exit_of_the_step_before(case: ZooCase) -> None:
    """Two steps with different samples: the second equals an oracle pass fed with the first one's exit."""
    name = "sample" if "sample" in case.kwargs else None
    moved = (
        (case.args, {**case.kwargs, name: case.kwargs[name] + 0.1})
        if name
        else ((case.args[0] + 0.1, *case.args[1:]), case.kwargs)
    )
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    outputs = []
    for adaptor in (Oracle(true_exit(case, region)), None):
        with torch.no_grad(), ch.wrap(case.model, adaptor, region=region) as cw:
            for args, kwargs in ((case.args, case.kwargs), moved):
                cw.step()
                torch.manual_seed(1)
                output = case.model(*args, **kwargs)
            assert cw.stats.adaptor_passes == 1, cw.report()
            outputs.append(output)
    assert same(*outputs)


def test_trace_runs_as_a_graph_module(case: ZooCase) -> None:
    """The recorded graph is a real one: torch.fx checks it, prints it and runs it to the same output."""
    trace = ch.trace(case.model, *case.args, **case.kwargs)
    trace.graph.lint()
    assert "placeholder" in str(trace.graph)
    if any(node.meta.get("constant") for node in trace.nodes):
        pytest.skip("the model brings tensors from outside its parameters: the graph takes them as inputs")
    names = Binder(case.model.forward)(case.args, case.kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = fx.Interpreter(fx.GraphModule(case.model, trace.graph)).run(*(names.get(path) for path in trace.inputs))
    assert all(
        torch.equal(a, b) for a, b in zip(made, [t for _, t in leaves(run(case)) if torch.is_tensor(t)], strict=True)
    )

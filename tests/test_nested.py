"""Nested regions with clocks of their own, against rollouts made by hand from plain hooks: bit for bit."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clockwork_hooks as ch
from clockwork_hooks.engine import passes
from tests.bendable import Tiny, nan, noise
from tests.snapshot import snapshot
from tests.test_choice import Wide
from tests.test_regions import SharedUpsample, conv
from tests.zoo.case import enliven

TIMES = tuple(range(900, 60, -70))  # 12 steps


class Shared(SharedUpsample):
    """Every level below the first goes up through the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = conv(64, 64)

    def lower(self, h: Tensor) -> Tensor:
        return self.grow(self.deep(self.wide(self.down2(h))))

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.body(self.down(h) + self.time(t, h))
        return self.grow(self.merge(torch.cat((h, self.lower(h)), 1)))


class Level(nn.Module):
    """A level and, inside of it, the next one."""

    def __init__(self, outside: int, inside: int, next: nn.Module | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(outside, inside, 4, 2, 1), nn.ConvTranspose2d(inside, outside, 4, 2, 1)
        self.body, self.next = conv(inside, inside), next
        self.join = conv(2 * inside, inside) if next is not None else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.body(self.down(h))
        if self.next is not None and self.join is not None:
            h = self.join(torch.cat((h, self.next(h)), 1))
        return self.up(F.silu(h))


class Recursive(Tiny):
    """Levels as modules one inside the other: the outer region is one module call, which contains the inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = Level(8, 32, Level(32, 64, Level(64, 96)))
        self.head = nn.Sequential(conv(16, 64), conv(64, 3))

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.levels(h + self.time(t, h)[:, :8])


class Hand:
    """A plain copy of the model whose exits are read, or replaced, by hooks; ends are paths, calls and shapes."""

    def __init__(self, model: nn.Module, exits: list[tuple[str, int]]) -> None:
        self.model, self.exits = copy.deepcopy(model), exits

    def run(self, *args: Any, skip: int | None = None, cached: Tensor | None = None) -> tuple[Any, list[Tensor | None]]:
        """(output, what each region emitted: None for those inside of the skipped one)."""
        seen: list[Tensor | None] = [None] * len(self.exits)
        handles = []
        for k, (path, ordinal) in enumerate(self.exits):
            calls = iter(range(99))

            def hook(
                module: nn.Module,
                inputs: Any,
                output: Tensor,
                k: int = k,
                ordinal: int = ordinal,
                calls: Iterator[int] = calls,
            ) -> Tensor | None:
                if next(calls) != ordinal:
                    return None
                emitted = cached if k == skip else output
                assert emitted is not None
                seen[k] = emitted.clone() if skip is None or k <= skip else None
                return emitted if k == skip else None

            handles.append(self.model.get_submodule(path).register_forward_hook(hook, prepend=True))
        try:
            return self.model(*args), seen
        finally:
            for handle in handles:
                handle.remove()


def due(step: int, clocks: list[int]) -> int | None:
    """The outermost region whose clock does not strike."""
    return next((k for k, clock in enumerate(clocks) if (step - 1) % clock), None)


class Rollout:
    """The semantics in a few lines: what each region emitted last, let go by every unexpected full pass."""

    def __init__(self, hand: Hand, clocks: list[int]) -> None:
        self.hand, self.clocks, self.step = hand, clocks, 0
        self.emitted: list[Tensor | None] = [None] * len(clocks)

    def __call__(self, *args: Any, doubt: bool = False) -> Any:
        self.step += 1
        skip = None if doubt else due(self.step, self.clocks)
        output, seen = self.hand.run(*args, skip=skip, cached=None if skip is None else self.emitted[skip])
        self.emitted = [new if new is not None else old for new, old in zip(seen, self.emitted, strict=True)]
        return output


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    "wide": (Wide, [("up", 0), ("up2", 0)]),
    "shared": (Shared, [("grow", 1), ("grow", 0)]),
    "recursive": (Recursive, [("levels", 0), ("levels.next", 0)]),
}


@pytest.fixture(params=MODELS)
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, Hand]:
    build, exits = MODELS[request.param]
    model = build()
    return model, Hand(model, exits)


# -- exactness ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("clocks", [(2, 4), (1, 2), (3, 6), (2, 6), (2, 12)])
def test_identity_rollouts(built: tuple[nn.Module, Hand], clocks: tuple[int, int]) -> None:
    """Every output of two trajectories, the traced one included; each kind of pass as often as the clocks say."""
    model, hand = built
    with ch.wrap(model, clocks={1: clocks[0], 2: clocks[1]}) as cw, cw.trajectory():
        for _ in range(2):
            rollout = Rollout(hand, list(clocks))
            for t in TIMES:
                x = torch.randn(1, 3, 16, 16)
                assert torch.equal(model(x, t), rollout(x, t)), (rollout.step, cw.report())
    steps = [due(step, list(clocks)) for step in range(1, len(TIMES) + 1)]
    expected = {f"level {k + 1}": 2 * steps.count(k) for k in (0, 1) if k in steps}
    assert cw.stats.regions == expected
    assert cw.stats.full_passes == 2 * steps.count(None)
    assert set(cw.stats.reasons) <= {"first step", "scheduled"}


@torch.no_grad()
def test_the_true_exits_give_the_full_output_at_any_clocks(built: tuple[nn.Module, Hand]) -> None:
    """And nothing else of a skipped region reaches the output: its placeholders are NaN."""
    model, hand = built
    truth: dict[int, Tensor | None] = {}

    def oracle(k: int) -> Any:
        return lambda entry, exit_cached, *, time, text: truth[k].clone()  # type: ignore[union-attr]

    with mock.patch.object(passes, "placeholder", nan):
        for clocks in ({1: 2, 2: 4}, {1: 1, 2: 3}, {2: 8, 1: 4}):
            with ch.wrap(model, {1: oracle(0), 2: oracle(1)}, clocks=clocks) as cw:
                for t in TIMES:
                    x = torch.randn(1, 3, 16, 16)
                    expected, exits = hand.run(x, t)
                    truth.update(enumerate(exits))
                    assert torch.equal(model(x, t), expected)
            assert cw.stats.adaptor_passes > 5
            assert len(cw.stats.regions) == 2 if clocks[1] > 1 else 1


@torch.no_grad()
def test_three_levels() -> None:
    model = Recursive()
    hand = Hand(model, [("levels", 0), ("levels.next", 0), ("levels.next.next", 0)])
    regions = [ch.find_region(model, noise(), 5, modules=path) for path, _ in hand.exits]
    clocks = {regions[1]: 4, regions[2]: 12, regions[0]: 2}
    with ch.wrap(model, clocks=clocks) as cw, cw.trajectory():
        rollout = Rollout(hand, [2, 4, 12])
        for t in TIMES:
            assert torch.equal(model(noise(), t), rollout(noise(), t))
        assert [region.fingerprint for region in cw.regions] == [region.fingerprint for region in regions]
        assert cw.region == cw.regions[0]
    outer, middle, inner = (f"{region.entry.path} → {region.exit.path}" for region in regions)
    assert cw.stats.regions == {outer: 6, middle: 3, inner: 2}
    assert cw.stats.full_passes == 1


class Mixes(nn.Module):
    """An adaptor that uses its entry too."""

    def __init__(self, entry: int, exit: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(entry, exit, 1)

    def forward(self, entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        return 0.5 * exit_cached + self.mix(entry)


@torch.no_grad()
@pytest.mark.parametrize("clocks", [{1: 2, 2: 4}, {2: 4, 1: 2}])
def test_the_steps_that_an_adaptor_was_made_for(clocks: dict[int, int]) -> None:
    """The warning is of the adaptor that runs, in whatever order the regions came."""
    model, made, other = Wide(), Mixes(8, 8), Mixes(32, 32)
    made.facts = {"schedule": "every(2)", "steps": 8}
    with ch.wrap(model, {1: made, 2: other}, clocks=clocks) as cw, cw.trajectory(steps=12):
        model(torch.randn(1, 3, 16, 16), TIMES[0])
        with pytest.warns(ch.OtherStepsWarning, match="Mixes was made for 8 steps, and this run has 12"):
            model(torch.randn(1, 3, 16, 16), TIMES[1])
        assert cw.stats.regions == {"level 1": 1}


@torch.no_grad()
def test_each_region_has_its_adaptor() -> None:
    """With the entry of its own region, in a pass that ran the region around it; its output is what serves next."""
    model = Wide()
    hand = Hand(model, [("up", 0), ("up2", 0)])
    adaptors = {1: Mixes(8, 8), 2: Mixes(32, 32)}
    entries = {0: "enter", 1: "enter2"}
    emitted: list[Any] = [None, None]
    with ch.wrap(model, adaptors, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        for step, t in enumerate(TIMES, 1):
            x, skip = torch.randn(1, 3, 16, 16), due(step, [2, 4])
            adapted = None
            if skip is not None:
                seen: list[Tensor] = []
                handle = hand.model.get_submodule(entries[skip]).register_forward_hook(
                    lambda module, args, output, seen=seen: seen.append(output.clone())
                )
                hand.run(x, t)
                handle.remove()
                adapted = adaptors[skip + 1](seen[0], emitted[skip], time=None, text=None)
            expected, new = hand.run(x, t, skip=skip, cached=adapted)
            emitted = [b if b is not None else a for a, b in zip(emitted, new, strict=True)]
            assert torch.equal(model(x, t), expected), step
    assert cw.stats.regions == {"level 1": 6, "level 2": 3}
    own = [sum(p.numel() for p in adaptors[k].parameters() if p.ndim > 1) * size for k, size in ((1, 256), (2, 64))]
    report = ch.flops_report(model, noise(1, 3, 16, 16), 5)
    saved = [ch.find_region(model, noise(1, 3, 16, 16), 5, level=k).macs for k in (1, 2)]
    assert cw.stats.macs_run == 12 * report.full_macs - 6 * (saved[0] - own[0]) - 3 * (saved[1] - own[1])


@torch.no_grad()
def test_diffusers_with_the_paper_s_cut_and_resolutions() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    model = UNet2DModel(32, block_out_channels=(8, 16, 32), norm_num_groups=8, layers_per_block=1, **blocks)
    enliven(model)
    for options in ({"clocks": {(32, 32): 2, (16, 16): 4}}, {"clocks": {1: 2, 2: 4}, "cut": "paper"}):
        with ch.wrap(model, **options) as cw, cw.trajectory():
            for _ in range(2):
                for t in TIMES[:8]:
                    model(torch.randn(1, 3, 32, 32), t)
            exits = [(region.exit.paths[-1], region.exit.call) for region in cw.regions]
            assert [region.level for region in cw.regions] == [1, 2]
        hand = Hand(model, exits)
        with ch.wrap(model, **options) as cw, cw.trajectory():
            for t in TIMES[:1]:  # traced: whether it keeps both exits is not the question here
                model(torch.randn(1, 3, 32, 32), t)
            cw.reset()
            rollout = Rollout(hand, [2, 4])
            for t in TIMES:
                x = torch.randn(1, 3, 32, 32)
                assert torch.equal(model(x, t).sample, rollout(x, t).sample)


# -- what ran -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_skipped_does_not_run_and_macs_reported_are_macs_run() -> None:
    """Calls of every module, counted by forwards from before; MACs by torch's own counter."""
    model = Wide()
    ran: list[str] = []
    for path, module in model.named_modules():
        if path and not list(module.children()):
            run = module.forward
            module.forward = lambda *a, run=run, path=path: (ran.append(path), run(*a))[1]  # type: ignore[method-assign]
    inner = {"down2", "deep", "up2"}
    outer = {"down", "enter2", "body", "leave2", "merge", "up"} | inner
    # embed is called by the parent on the way into the region
    every = {path for path, module in model.named_modules() if path and not list(module.children())}
    with ch.wrap(model, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        for step, t in enumerate(TIMES, 1):
            ran.clear()
            before = cw.stats.macs_run
            with FlopCounterMode(display=False) as counter:
                model(noise(), t)
            skipped = {None: set(), 0: outer, 1: inner}[due(step, [2, 4])]
            assert set(ran) == every - skipped
            assert len(ran) == len(every - skipped)
            assert cw.stats.macs_run - before == counter.get_total_flops() // 2
    assert cw.stats.saving > 0.45


@torch.no_grad()
def test_reports_name_the_passes() -> None:
    model = Wide()
    with ch.wrap(model, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        assert "not known before the first call" in str(cw.report())
        for t in TIMES[:8]:
            model(noise(), t)
        report = cw.report()
    assert cw.schedule.preview(8) == "F A A A F A A A"
    text = str(report)
    assert "skipping     level 1: 4" in text
    assert "skipping     level 2: 2" in text
    assert "every(2) level 1, every(4) level 2" in text
    assert "enter → up" in text
    assert "enter2 → up2" in text
    assert json.loads(report.to_json())["regions"] == {"level 1": 4, "level 2": 2}
    assert cw.stats.trajectories[0].regions == {"level 1": 4, "level 2": 2}
    cw.stats.clear()
    assert not cw.stats.regions


@torch.no_grad()
def test_one_region_is_as_with_clock() -> None:
    model = Wide()
    with ch.wrap(model, clocks={2: 3}) as cw, cw.trajectory():
        nested = [model(noise(), t) for t in TIMES]
    with ch.wrap(model, clock=3, level=2) as single, single.trajectory():
        assert all(torch.equal(model(noise(), t), out) for t, out in zip(TIMES, nested, strict=True))
    assert cw.stats.macs_run == single.stats.macs_run
    assert cw.stats.regions == {"level 2": 8}


# -- nothing stale --------------------------------------------------------------------------------------------------


class Conditioned(Wide):
    """A condition matters everywhere."""

    def forward(self, x: Tensor, t: Any, c: Tensor) -> Tensor:
        return super().forward(x + c, t)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_branches_doubts_and_restarts(seed: int) -> None:
    """Two branches by turns; now and then one gets a new condition, or everything begins anew."""
    rng = random.Random(seed)
    model = Conditioned()
    hand = Hand(model, [("up", 0), ("up2", 0)])
    conditions = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    with ch.wrap(model, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        model(noise(1, 3, 16, 16), 5, conditions[0])
        cw.reset()
        rollouts = [Rollout(hand, [2, 4]) for _ in range(2)]
        t = 1000
        for _ in range(40):
            event = rng.random()
            t -= 10
            if event < 0.08 and t < 980:
                t = 1000
                rollouts = [Rollout(hand, [2, 4]) for _ in range(2)]
            fresh = rng.randrange(2) if event > 0.85 and rollouts[0].step > 0 else None
            for k, rollout in enumerate(rollouts):
                if k == fresh:
                    conditions[k] = torch.randn(1, 3, 16, 16)
                x = torch.randn(1, 3, 16, 16)
                assert torch.equal(model(x, t, conditions[k]), rollout(x, t, conditions[k], doubt=k == fresh))
    assert len(cw.stats.regions) == 2
    assert cw.stats.reasons["conditions are new in this step"] > 0


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
@pytest.mark.parametrize("path", ["up", "up2"])
def test_an_exit_that_a_hook_writes_to_serves_nobody(path: str) -> None:
    """Once: then it is copied. Either region's; the hook comes after the trace."""

    def halve(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.is_contiguous():  # no placeholder
            output.mul_(0.5)

    model, reason = Wide(), "the kept feature was written to"
    with ch.wrap(model, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        for t in TIMES[:4]:
            model(noise(), t)
        model.get_submodule(path).register_forward_hook(halve)
        hand = Hand(Wide(), [("up", 0), ("up2", 0)])
        hand.model.get_submodule(path).register_forward_hook(halve)
        for _ in range(3):
            rollout = Rollout(hand, [2, 4])
            for t in TIMES[:5]:
                x, before = torch.randn(1, 3, 16, 16), cw.stats.reasons[reason]
                batch = model(x.expand(2, -1, -1, -1), t)
                doubt = cw.stats.reasons[reason] > before
                assert torch.equal(batch, rollout(x.expand(2, -1, -1, -1), t, doubt=doubt))
    assert 0 < cw.stats.reasons[reason] <= 2
    assert cw.stats.adaptor_passes == 3 + 3 * 3 - cw.stats.reasons[reason]


@torch.no_grad()
def test_another_batch_in_between() -> None:
    """A change of signature is a full pass, and what the inner region had emitted before is not used after it."""
    model = Wide()
    hand = Hand(model, [("up", 0), ("up2", 0)])
    with ch.wrap(model, clocks={1: 2, 2: 4}) as cw, cw.trajectory():
        for batch in (1, 2):
            model(noise(batch, 3, 16, 16), 5)
            cw.reset()
        rollout = Rollout(hand, [2, 4])
        for step, t in enumerate(TIMES, 1):
            x = torch.randn(2 if step in (2, 7) else 1, 3, 16, 16)
            assert torch.equal(model(x, t), rollout(x, t, doubt=step in (2, 3, 7, 8)))
    assert cw.stats.reasons["inputs or modes changed since the step before"] == 4


# -- surgery --------------------------------------------------------------------------------------------------------


class Trip(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("path", [None, "stem", "head"])
def test_remove_restores_everything_at_any_moment(built: tuple[nn.Module, Hand], steps: int, path: str | None) -> None:
    """Also after an exception in any kind of pass."""
    model, _ = built
    trips: list[bool] = []

    def trip(*_: Any) -> None:
        if trips:
            raise Trip

    if path is not None:
        model.get_submodule(path).register_forward_hook(trip)
    before, expected = snapshot(model), model(noise(), 5)
    cw = ch.wrap(model, clocks={1: 2, 2: 4})
    for t in TIMES[:steps]:
        model(noise(), t)
    if path is not None:
        trips.append(True)
        with pytest.raises(Trip):
            model(noise(), TIMES[steps])
        trips.clear()
        model(noise(), TIMES[steps])
        assert cw.stats.reasons["first step"] == (2 if steps else 1)
    cw.remove()
    assert snapshot(model) == before
    assert torch.equal(model(noise(), 5), expected)


# -- rules ----------------------------------------------------------------------------------------------------------


@contextmanager
def fails(kind: type[Exception], said: str) -> Iterator[nn.Module]:
    """The wrong thing is told, at the latest in the first call, and leaves the model as it was."""
    model = Wide()
    before = snapshot(model)
    with pytest.raises(kind, match=f"(?s){said}"), torch.no_grad():  # noqa: PT012
        yield model
        model(noise(), 5)
    assert snapshot(model) == before


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clocks": {1: 2, 2: 3}}, ch.ArgumentError, "multiple of that one's.*outer: level 1, clock 2.*pass 4"),
    ({"clocks": {1: 2, 2: 2}}, ch.ArgumentError, "multiple"),
    ({"clocks": {1: 4, 2: 2}}, ch.ArgumentError, "multiple"),
    ({"clocks": {1: 2, (16, 16): 4}}, ch.RegionNotFoundError, "one inside the other"),
    ({"clocks": {1: 2, 3: 4}}, ch.RegionNotFoundError, r"levels with a region: \[1, 2\]"),
    ({"clocks": {(32, 32): 2}}, ch.RegionNotFoundError, "resolutions with a region"),
    ({"clocks": {1: 0}}, ch.ArgumentError, "clock is an int"),
    ({"clocks": {"up": 2}}, ch.ArgumentError, "level is an int"),
    ({"clocks": {}}, ch.ArgumentError, "gives each region a clock"),
    ({"clocks": 2}, ch.ArgumentError, "gives each region a clock"),
    ({"clocks": {1: 2}, "level": 1}, ch.ArgumentError, "says which regions"),
    ({"clocks": {1: 2}, "schedule": {2}}, ch.ArgumentError, "says which regions"),
    ({"clocks": {1: 2}, "clock": 2}, ch.ArgumentError, "says which regions.*clock: 2.*pass clocks= without clock"),
    ({"clocks": {1: 2}, "keep_graph": True}, ch.ArgumentError, "without its graph.*keep_graph: True"),
    ({"clocks": {1: 2}, "adaptor": {2: None}}, ch.ArgumentError, "same keys"),
    ({"adaptor": {1: None}}, ch.AdaptorError, "need several clocks"),
    ({"clocks": {1: 2}, "adaptor": {1: 3}}, ch.AdaptorError, "an adaptor is None"),
]


@pytest.mark.parametrize(("options", "kind", "said"), WRONG, ids=str)
def test_rules(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with fails(kind, said) as model:
        ch.wrap(model, **options)


def test_regions_side_by_side_do_not_nest() -> None:
    with fails(ch.RegionNotFoundError, "one inside the other.*deep.*leave") as model:
        regions = [ch.find_region(model, noise(), 5, modules=path) for path in ("leave", "deep")]
        ch.wrap(model, clocks={regions[0]: 2, regions[1]: 4})


def test_clock_1_alone_changes_nothing() -> None:
    with pytest.warns(ch.NoEffectWarning):
        ch.wrap(Wide(), clocks={1: 1}).remove()


class Remembers(nn.Module):
    """The identity; remembers what flowed in, and what it is told flowed in when the cached exit was made."""

    needs = frozenset({"entry_cached"})

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def forward(self, entry: Any, exit_cached: Tensor, *, entry_cached: Any, **_: Any) -> Tensor:
        self.pairs.append((entry.clone(), entry_cached.clone()))
        return exit_cached


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")  # the hooks below are this test's
@torch.no_grad()
@pytest.mark.parametrize("model", [Recursive, Shared])
def test_every_region_is_told_the_entry_that_came_with_its_exit(model: type[nn.Module]) -> None:
    """Steps: full, outer, inner, outer, inner, outer, full, ...; each region's own, of the step before its own."""
    unet = model().eval()
    outer, inner = Remembers(), Remembers()
    x = noise()
    with ch.wrap(unet, {1: outer, 2: inner}, clocks={1: 2, 2: 6}) as cw:
        with cw.trajectory():
            unet(x, 950)  # the first call is recorded, and keeps no entries
        ports = [region.cut_plan.ports["entry"] for region in cw.regions]
        with cw.trajectory():
            for t in TIMES:
                unet(x, t)
        assert (cw.stats.regions["level 1"], cw.stats.regions["level 2"]) == (6, 4), cw.report()
    entries: dict[int, list[Tensor]] = {0: [], 1: []}
    plain = copy.deepcopy(unet)

    def see(which: int, port: Any, args: tuple[Any, ...], output: Any, calls: list[int]) -> None:
        if calls[0] == port.ordinal:
            value = args if port.side == "input" else output
            leaf = value[port.leaf] if isinstance(value, tuple) else value
            entries[which].append(leaf.clone())
        calls[0] += 1

    wanted = [(0, ports[0]), (1, ports[1])]
    for which, port in wanted:
        calls = [0]
        plain.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, 0))
        plain.get_submodule(port.path).register_forward_hook(
            lambda module, args, output, which=which, port=port, calls=calls: see(which, port, args, output, calls)
        )
    for t in TIMES:  # the same sample in every step: entries depend on the time and on nothing that is skipped
        plain(x, t)
    own = {0: [(step, step - 1) for step in range(2, 13, 2)], 1: [(3, 1), (5, 3), (9, 7), (11, 9)]}
    for which, adaptor in ((0, outer), (1, inner)):
        assert len(adaptor.pairs) == len(own[which])
        for (now, before), (step, last) in zip(adaptor.pairs, own[which], strict=True):
            assert torch.equal(now, entries[which][step - 1])
            assert torch.equal(before, entries[which][last - 1])

"""Guidance branches, tiles, micro-batches and solvers that call the UNet several times a step."""

import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.clock import conditions
from tests.oracle import Judge
from tests.small_unet import Tiny

TIMES = torch.arange(900, 100, -100)  # eight steps


def sample(batch: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 2, size, size)


def condition() -> torch.Tensor:
    return torch.randn(1, 3)


def two_calls(judge: Judge, cw: Any) -> None:
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        for b, c in enumerate(pair):
            judge.call(sample(), t, c, step=k, branch=b)


def either_order(judge: Judge, cw: Any) -> None:
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        for b in (0, 1) if k % 3 else (1, 0):
            judge.call(sample(), t, pair[b], step=k, branch=b)


def latents_in_place(judge: Judge, cw: Any) -> None:
    pair, x = (condition(), condition()), sample()
    for k, t in enumerate(TIMES, 1):
        for b, c in enumerate(pair):
            x -= 0.1 * judge.call(x, t, c, step=k, branch=b)


def scaled_copies(judge: Judge, cw: Any) -> None:
    pair, x = (condition(), condition()), sample()
    for k, t in enumerate(TIMES, 1):
        x = x - sum(
            judge.call(x * s, t, c, step=k, branch=b) for b, (c, s) in enumerate(zip(pair, (0.5, 2.0), strict=True))
        )


def new_embeddings(judge: Judge, cw: Any) -> None:
    """Made anew in each step, with the same values: in main memory that is seen."""
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        for b, c in enumerate(pair):
            judge.call(sample(), t, c.clone(), step=k, branch=b)


def three(judge: Judge, cw: Any) -> None:
    """As in InstructPix2Pix: text and image, image alone, neither."""
    text, image, none = condition(), sample(), condition()
    for k, t in enumerate(TIMES, 1):
        for b, (c, i) in enumerate([(text, image), (none, image), (none, torch.zeros_like(image))]):
            judge.call(sample(), t, c, image=i, step=k, branch=b)


def the_same_object(judge: Judge, cw: Any) -> None:
    """Perturbed attention, where a hook tells the calls apart: numbers do."""
    c = condition()
    for k, t in enumerate(TIMES, 1):
        for b in range(2):
            judge.call(sample(), t, c, step=k, branch=b)


def interval(judge: Judge, cw: Any) -> None:
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        for b in range(2 if 3 <= k <= 6 else 1):
            judge.call(sample(), t, pair[b], step=k, branch=b)


def tiles(judge: Judge, cw: Any) -> None:
    c = condition()
    for k, t in enumerate(TIMES, 1):
        for b in range(4):
            judge.call(sample(), t, c, step=k, branch=b)


def tiles_with_guidance(judge: Judge, cw: Any) -> None:
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        for tile, b in itertools.product(range(3), range(2)):
            judge.call(sample(), t, pair[b], step=k, branch=(tile, b))


def a_last_chunk_that_is_smaller(judge: Judge, cw: Any) -> None:
    """A batch of 5 in chunks of 2; each has its own rows of the conditions."""
    x, c = sample(5), torch.randn(5, 3)
    for k, t in enumerate(TIMES, 1):
        for b, (rows, text) in enumerate(zip(x.split(2), c.split(2), strict=True)):
            judge.call(rows, t, text, step=k, branch=b)


def named(judge: Judge, cw: Any) -> None:
    """Embeddings of other values in each step."""
    for k, t in enumerate(TIMES, 1):
        for name in ("cond", "uncond") if k % 2 else ("uncond", "cond"):
            with cw.branch(name):
                judge.call(sample(), t, condition(), step=k, branch=name)


def declared_heun(judge: Judge, cw: Any) -> None:
    """Two evaluations a step, at two times; one in the last step."""
    times = list(TIMES)
    for k, (now, then) in enumerate(itertools.pairwise(times), 1):
        with cw.step():
            judge.call(sample(), now, step=k)
            if then != times[-1]:
                judge.call(sample(), then, step=k)


def declared_with_guidance(judge: Judge, cw: Any) -> None:
    pair = condition(), condition()
    for k, t in enumerate(TIMES, 1):
        cw.step()
        for stage, b in itertools.product(range(3), range(2)):
            judge.call(sample(), t - stage, pair[b], step=k, branch=b)


LOOPS: dict[Callable[[Judge, Any], None], str] = {  # the passes of each step, at clock 2
    two_calls: "FF AA FF AA FF AA FF AA",
    either_order: "FF AA FF AA FF AA FF AA",
    latents_in_place: "FF AA FF AA FF AA FF AA",
    scaled_copies: "FF AA FF AA FF AA FF AA",
    new_embeddings: "FF AA FF AA FF AA FF AA",
    three: "FFF AAA FFF AAA FFF AAA FFF AAA",
    the_same_object: "FF FF FF AA FF AA FF AA",  # is their number regular? known after two steps
    interval: "F A FF AA FF AA F A",
    tiles: "FFFF FFFF FFFF AAAA FFFF AAAA FFFF AAAA",
    tiles_with_guidance: "FFFFFF FFFFFF FFFFFF AAAAAA FFFFFF AAAAAA FFFFFF AAAAAA",
    a_last_chunk_that_is_smaller: "FFF AAA FFF AAA FFF AAA FFF AAA",
    named: "FF AA FF AA FF AA FF AA",
    declared_heun: "FF AA FF AA FF AA F",
    declared_with_guidance: "FFFFFF AAAAAA FFFFFF AAAAAA FFFFFF AAAAAA FFFFFF AAAAAA",
}


DECLARED = (declared_heun, declared_with_guidance)


@torch.no_grad()
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_each_call_of_a_step_keeps_its_own_features(loop: Callable[[Judge, Any], None]) -> None:
    """Twice, with one wrapper: the second trajectory has the same passes as the first."""
    judge = Judge(Tiny())
    with ch.wrap(judge.unet) as cw:
        for _ in range(2):
            judge.letters = ""
            loop(judge, cw)
            judge.begin()
            assert judge.letters == LOOPS[loop].replace(" ", "")
            if loop in DECLARED:
                cw.reset()
    assert cw.stats.adaptor_passes == 2 * judge.letters.count("A")


@torch.no_grad()
def test_an_interval_that_begins_with_an_adaptor_step() -> None:
    """The branch that joins, or comes back, has a full pass in a step that the schedule gives to the adaptor."""
    judge, pair = Judge(Tiny()), (condition(), condition())
    with ch.wrap(judge.unet) as cw:
        for k, t in enumerate(TIMES, 1):
            for b in range(1 if k in (1, 4, 5) else 2):
                judge.call(sample(), t, pair[b], step=k, branch=b)
    assert judge.letters == "F AF FF A F AF FF AA".replace(" ", "")
    assert cw.stats.reasons["conditions are new in this step"] == 2


@torch.no_grad()
def test_a_step_with_another_number_of_calls() -> None:
    """One tile more or less: whose features are whose is doubtful until the trajectory ends; single calls are not."""
    judge, c = Judge(Tiny()), condition()
    with ch.wrap(judge.unet, schedule=lambda step: True):
        for k, (t, count) in enumerate(zip(TIMES, (2, 2, 2, 3, 2, 2, 1, 1), strict=True), 1):
            for b in range(count):
                judge.call(sample(), t, c, step=k, branch=b)
    assert judge.letters == "FF FF AA AAF FF FF F A".replace(" ", "")


def test_the_judge_can_tell() -> None:
    """It is told another branch than the conditions say, and sees a stale feature."""
    judge, c = Judge(Tiny()), condition()
    with torch.no_grad(), ch.wrap(judge.unet):
        judge.call(sample(), TIMES[0], c, step=1, branch=0)
        judge.call(sample(), TIMES[0], c + 1, step=1, branch=1)
        with pytest.raises(AssertionError, match="stale"):
            judge.call(sample(), TIMES[1], c, step=2, branch=1)


def test_a_branch_is_named_by_text() -> None:
    unet = Tiny()
    with ch.wrap(unet) as cw, pytest.raises(ch.ArgumentError, match="text"), cw.branch(3):
        pass


@torch.no_grad()
def test_names_within_names() -> None:
    """Guidance named within named tiles, in another order in each step: all names count."""
    judge, pair = Judge(Tiny()), {"uncond": condition(), "cond": condition()}
    with ch.wrap(judge.unet) as cw:
        for k, t in enumerate(TIMES, 1):
            for tile in range(3) if k % 2 else (2, 0, 1):
                with cw.branch(f"tile {tile}"):
                    for name, c in pair.items():
                        with cw.branch(name):
                            judge.call(sample(), t, c, step=k, branch=(tile, name))
    assert judge.letters == 4 * "FFFFFFAAAAAA"


@torch.no_grad()
def test_a_name_and_several_conditions() -> None:
    """Two calls in each named tile, told apart by their embeddings; a third one is new, not one of them."""
    judge, (text, none, other) = Judge(Tiny()), (condition() for _ in range(3))
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw:
        for k, t in enumerate(TIMES, 1):
            for tile in range(2):
                with cw.branch(f"tile {tile}"):
                    for c in (text, none) if k % 2 else (none, text):
                        judge.call(sample(), t, c, step=k, branch=(tile, id(c)))
                    if k == 5:
                        judge.call(sample(), t, other, step=k, branch=(tile, id(other)))
    assert judge.letters == "FFFF" + 3 * "AAAA" + "AAFAAF" + 3 * "AAAA"


@torch.no_grad()
def test_a_name_ends_with_its_block_also_after_an_error() -> None:
    unet = Tiny()
    with ch.wrap(unet, region=ch.find_region(unet, sample(), 900)) as cw:
        names: list[tuple[str, ...]] = []

        def look(*_: Any) -> None:
            names.append(cw.position.branch.names)
            if len(names) == 1:
                raise RuntimeError

        unet.stem.register_forward_hook(look)
        with pytest.raises(RuntimeError), cw.branch("a"), cw.branch("b"):
            unet(sample(), 900)
        unet(sample(), 800)
        assert names == [("a", "b"), ()]


# -- what changes midway ------------------------------------------------------------------------------------------


def _dtype(judge: Judge, call: dict[str, Any]) -> None:
    for unet in (judge.unet, judge.plain):
        unet.double()
    call["x"] = call["x"].double()


def _training(judge: Judge, call: dict[str, Any]) -> None:
    for unet in (judge.unet, judge.plain):
        unet.train()


def _argument(judge: Judge, call: dict[str, Any]) -> None:
    call["c"] = FIXED


def _keyword(judge: Judge, call: dict[str, Any]) -> None:
    call["more"] = {"scale": 0.5, "image": FIXED}


def _batch(judge: Judge, call: dict[str, Any]) -> None:
    call["x"] = sample(3)


def _resolution(judge: Judge, call: dict[str, Any]) -> None:
    call["x"] = sample(1, 16)


FIXED = condition()
CHANGES = (_dtype, _training, _argument, _keyword, _batch, _resolution)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_change_midway_costs_one_full_pass(change: Callable[[Judge, dict[str, Any]], None]) -> None:
    """From the fourth step on something is different: one full pass with its reason, then on as before."""
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw:
        for k, t in enumerate(TIMES, 1):
            call: dict[str, Any] = {"x": sample()}
            if k >= 4:
                change(judge, call)
            x, c, more = call["x"], call.get("c"), call.get("more", {})
            judge.call(*((x, t) if c is None else (x, t, c)), step=k, **more)
    assert judge.letters == "FAAFAAAA"
    assert cw.stats.full_passes == 2
    assert sum(cw.stats.reasons[name] for name in ("traced", "conditions are new in this step")) == 1


class Anywhere(Tiny):
    """Takes its time to wherever its sample is."""

    def forward(self, x: torch.Tensor, t: Any, c: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        return super().forward(x, torch.as_tensor(t).to(x.device), c, **more)


@torch.no_grad()
def test_another_device_midway_costs_one_full_pass() -> None:
    """To the meta device for one step, and back: nothing kept on one device is used on the other."""
    judge = Judge(Anywhere())
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw:
        for k, t in enumerate(TIMES, 1):
            if k != 4:
                judge.call(sample(), t, step=k)
                continue
            weights = {name: tensor.clone() for name, tensor in judge.unet.state_dict().items()}
            judge.unet.to("meta")
            assert judge.unet(sample().to("meta"), t).device.type == "meta"
            judge.unet.to_empty(device="cpu").load_state_dict(weights)
    assert judge.letters == "FAA" + "FAAA"
    assert cw.stats.full_passes == 3
    assert cw.stats.reasons["traced"] == 1
    assert sum(cw.stats.reasons.values()) == 3


# -- conditions on a device, where comparing means waiting ----------------------------------------------------------


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No private copies; the list grows by one with each comparison by value, which would wait for the device."""
    waits: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(conditions, "_LARGEST_COPY", 0)
    monkeypatch.setattr(conditions.torch, "equal", lambda a, b: waits.append(1) or equal(a, b))
    return waits


@torch.no_grad()
@pytest.mark.parametrize(
    "loop", [two_calls, either_order, interval, tiles_with_guidance], ids=lambda loop: loop.__name__
)
def test_the_same_objects_need_no_waiting(loop: Callable[[Judge, Any], None], as_on_a_device: list[int]) -> None:
    """What is new in the first step is another branch; later it might be an old one with new objects."""
    kinds, unet = LOOPS[loop].replace(" ", ""), Tiny()
    judge = Judge(unet, unet)
    judge.call = lambda *args, step, branch=0, **kwargs: unet(*args, **kwargs)  # type: ignore[method-assign]
    with ch.wrap(unet) as cw:
        loop(judge, cw)
        assert cw.stats.adaptor_passes == kinds.count("A")
    assert len(as_on_a_device) == (1 if loop is interval else 0)


class Prompt:
    """Somebody's own class, that a UNet may take."""

    def __init__(self, c: torch.Tensor) -> None:
        self.c, self.within, self.itself = None, {"deep": [types.SimpleNamespace(c=c)]}, self

    def put(self, c: torch.Tensor) -> None:
        self.within["deep"][0].c = c


class TakesAnObject(Tiny):
    def forward(self, x: torch.Tensor, t: Any, prompt: Prompt) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t, prompt.within["deep"][0].c)


@torch.no_grad()
def test_an_object_that_holds_something_else_is_another_condition() -> None:
    """One object for all calls: guidance begins in the third step, and the prompt changes in the seventh."""
    judge, (c, other, none) = Judge(TakesAnObject()), (condition() for _ in range(3))
    prompt = Prompt(c)
    with ch.wrap(judge.unet) as cw:
        for k, t in enumerate(TIMES, 1):
            if 3 < k < 6:
                prompt.put(none)
                judge.call(sample(), t, prompt, step=k, branch="none")
            now = c if k < 6 else other
            prompt.put(now)
            judge.call(sample(), t, prompt, step=k, branch=id(now))
        assert judge.letters == "FAF" + "FA" + "FF" + "FFA"
        assert cw.stats.reasons["conditions are new in this step"] == 2


def remembered(values: list[torch.Tensor], others: list[torch.Tensor]) -> tuple[bool, bool]:
    conditions_ = conditions.Conditions(values)
    return conditions_.same(others), conditions_.equal(others)


def test_conditions_on_a_device(as_on_a_device: list[int]) -> None:
    c = condition()
    assert remembered([c], [c]) == (True, True)
    assert as_on_a_device == []
    assert remembered([c], [c.clone()]) == (False, True)
    assert remembered([c], [c + 1]) == (False, False)
    assert len(as_on_a_device) == 2
    before = conditions.Conditions([c])
    c += 1
    assert not before.same([c])
    assert not before.equal([c])  # what it was is gone
    assert not before.equal([c.clone()])
    assert remembered([c], [c.double()]) == (False, False)
    assert remembered([c], [torch.zeros(2, 3)]) == (False, False)
    with torch.inference_mode():
        unversioned = condition()
        assert remembered([unversioned], [unversioned]) == (True, True)  # nothing tells: docs/timeline.md
        assert remembered([unversioned], [unversioned.clone()]) == (False, False)
    assert len(as_on_a_device) == 2


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
def test_comparing_is_given_up(as_on_a_device: list[int]) -> None:
    """Embeddings with other values in each step: full passes, and no waiting after the second of them."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        for t in TIMES:
            unet(sample(), t, condition())
    assert len(as_on_a_device) == 2
    assert cw.stats.adaptor_passes == 0
    assert cw.stats.reasons["conditions are new in this step"] == 4

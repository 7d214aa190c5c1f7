"""Others at work inside the UNet: interrupts, replicas, modules with memory of their own, tensors without values."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny, reference
from tests.snapshot import snapshot

TIMES = tuple(torch.arange(900.0, 300.0, -100.0))  # views of one list, as a scheduler hands over


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


# -- an interrupt ------------------------------------------------------------------------------------------------


class Shares(nn.Module):
    """Another model, never wrapped, of modules of the UNet."""

    def __init__(self, unet: Tiny) -> None:
        super().__init__()
        self.stem, self.down, self.body, self.up = unet.stem, unet.down, unet.body, unet.up

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.body(self.down(self.stem(x))))
        return made


def _interruptible(meet: Callable[[], None]) -> Callable[..., Any]:
    """A backend whose graphs may be interrupted."""

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            meet()
            return graph(*args)

        return run

    return backend


@pytest.mark.parametrize(
    ("where", "compiled"), [("emb", False), ("head", False), ("adaptor", False), ("a graph", True)]
)
def test_an_interrupted_adaptor_pass_leaves_no_trace(where: str, compiled: bool) -> None:
    """Before, after and within the region: what shares its modules, and the UNet itself, compute as always."""
    trip: list[BaseException] = []
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    plain = copy.deepcopy(unet)

    def meet(*_: Any) -> None:
        if trip:
            raise trip.pop()

    class Meets(nn.Module):
        def forward(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
            meet()
            return exit_cached

    if where in ("emb", "head"):
        unet.get_submodule(where).register_forward_hook(meet)
    cw = ch.wrap(unet, Meets() if where == "adaptor" else None, clock=2)
    if compiled:
        cw.compile(backend=_interruptible(meet))
    for t in TIMES[:3]:
        unet(x, t)
    trip.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        unet(x, TIMES[3])
    assert cw.pass_kind is None
    assert torch.equal(Shares(unet)(x), Shares(plain)(x))
    for path in ("stem", "down", "act", "body", "up"):
        y = torch.randn(1, getattr(unet.get_submodule(path), "in_channels", 4), 8, 8)
        assert torch.equal(unet.get_submodule(path)(y), plain.get_submodule(path)(y))
    assert torch.equal(unet.forward(x, 300), plain.forward(x, 300))


def test_another_model_that_shares_modules_works_in_the_middle_of_an_adaptor_pass() -> None:
    """In another thread, while the region is skipped in this one."""
    unet, x, seen = Tiny(), torch.randn(1, 2, 8, 8), []
    expected = Shares(copy.deepcopy(unet))(x)

    def elsewhere(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(_without_gradients(Shares(unet), x)))
        thread.start()
        thread.join()

    unet.head.register_forward_pre_hook(elsewhere)
    with ch.wrap(unet) as cw:
        for t in TIMES[:2]:
            unet(x, t)
        assert cw.stats.adaptor_passes == 1
    assert len(seen) == 2
    assert all(torch.equal(one, expected) for one in seen)


def _without_gradients(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(x)
        return made


# -- replicas and copies -----------------------------------------------------------------------------------------


def replicate(root: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate`, without a second device; its parameters are other ones."""
    replicas = {module: module._replicate_for_data_parallel() for module in root.modules()}  # type: ignore[no-untyped-call]
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, value in module._parameters.items():
            if value is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, 1.1 * value.detach())
    replica = replicas[root]
    assert isinstance(replica, nn.Module)
    return replica


class Pipeline(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: int) -> Tensor:
        made: Tensor = self.unet(x, t)
        return made


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("around", [lambda unet: unet, Pipeline], ids=["the UNet", "what holds it"])
def test_a_replica_of_a_wrapped_unet_is_refused(around: Callable[[nn.Module], nn.Module], calls: int) -> None:
    """It would run the original's modules with the original's weights, on the wrong device."""
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    judge = Judge(unet, Tiny())
    with ch.wrap(unet) as cw:
        for step, t in enumerate(TIMES[:calls], 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        with pytest.raises(ch.WrapError, match="a replica of it, as DataParallel makes them"):
            replicate(around(unet))(x, 500)
        cw.reset()
        judge.begin()
        for step, t in enumerate(TIMES, 1):  # the wrapped one is as it was
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        assert judge.made.endswith("FAFAFA")
    assert not torch.equal(replicate(unet)(x, 500), unet(x, 500))


def test_copies_made_by_threads_in_the_middle_of_a_loop_are_plain() -> None:
    unet, x, made = Tiny(), torch.randn(1, 2, 8, 8), []
    expected = {t: unet(x, t) for t in TIMES}
    before = snapshot(unet)
    with ch.wrap(unet):
        for t in TIMES:
            unet(x, t)
            thread = threading.Thread(target=lambda: made.append(copy.deepcopy(unet)))
            thread.start()
            thread.join()
        assert all(torch.equal(one(x, t), expected[t]) for one in made for t in TIMES)
    assert snapshot(unet) == before


# -- memory that others write to ----------------------------------------------------------------------------------


class Buffered(nn.Module):
    """An adaptor that writes all its outputs to one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out: Tensor | None = None

    def forward(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        self.out = torch.empty_like(exit_cached) if self.out is None else self.out
        self.out.data.copy_(exit_cached * 0.9)  # leaves no mark
        return self.out


class Static(nn.Module):
    """A module that runs as a CUDA graph does: all outputs lie in one place, and writes to it leave no mark."""

    def __init__(self, module: nn.Module, *, views: bool) -> None:
        super().__init__()
        self.module, self.views = module, views
        self.out: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        made = self.module(x)
        self.out = made.clone() if self.out is None else self.out
        self.out.data.copy_(made)
        return self.out.detach() if self.views else self.out


def _judged(unet: nn.Module, adaptor: Any, scale: float, *, clock: int, steps: int, branches: int = 2) -> str:
    """Every call is a full pass, or one whose exit is the scaled one of the same branch's step before."""
    plain, exits, made = Tiny(), {}, ""
    conditions, times = torch.randn(branches, 1, 3), torch.arange(950.0, 950.0 - 50 * steps, -50.0)
    with ch.wrap(unet, adaptor, clock=clock):
        for k in range(steps):
            for b in range(branches):
                x, t = torch.randn(1, 2, 8, 8), times[k]
                output = unet(x, t, conditions[b])
                full, exit = reference(plain, x, t, conditions[b])
                if torch.equal(output, full):
                    exits[b], made = exit, made + "F"
                    continue
                exits[b] = exits[b] * scale
                assert torch.equal(output, reference(plain, x, t, conditions[b], exit=exits[b])[0]), f"stale: {k} {b}"
                made += "A"
    return made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clock", [2, 3])
def test_an_adaptor_may_write_to_a_buffer_of_its_own(clock: int, mode: Any) -> None:
    with mode():
        made = _judged(Tiny(), Buffered(), 0.9, clock=clock, steps=9)
    assert made.count("A") >= 8


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clock", [2, 3])
def test_a_module_of_the_region_may_write_all_its_outputs_to_one_place(clock: int, mode: Any, views: bool) -> None:
    unet = Tiny()
    unet.up = Static(unet.up, views=views)  # type: ignore[assignment]
    with mode():
        made = _judged(unet, None, 1.0, clock=clock, steps=9)
    assert made.count("A") >= 6


# -- calls without values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["fake tensors alone", "in their mode"])
def test_a_call_with_fake_tensors_changes_nothing(first: bool, inside: bool) -> None:
    """Before the first call and between two steps; its time cannot be read."""
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    judge = Judge(unet, Tiny())

    def fake() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args = mode.from_tensor(x), mode.from_tensor(torch.tensor([700.0]))
            assert not inside or unet(*args).shape == x.shape
        if not inside:
            assert unet(*args).shape == x.shape

    with ch.wrap(unet) as cw:
        if first:
            fake()
        for step, t in enumerate(TIMES[:3], 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        fake()
        judge.begin()
        for step, t in enumerate(TIMES, 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        assert judge.made == "FAFFAFAFA"
        assert cw.stats.reasons["within torch.compile, torch.export or torch.jit"] == 1 + first


# -- nothing is held -----------------------------------------------------------------------------------------------


class Local:
    """What stands for a large local of a caller."""


def _sample(unet: nn.Module, times: Any, seen: list[Any], *, fails: bool = False) -> None:
    local, x = Local(), torch.randn(1, 2, 8, 8)
    seen += [weakref.ref(local), weakref.ref(x)]
    for t in times:
        if fails:
            with pytest.raises(TypeError):
                unet(x, t, no_such_argument=1, c="no tensor")
        else:
            output = unet(x, t)
            seen.append(weakref.ref(output))


@pytest.mark.parametrize("kind", ["recorded", "full", "adaptor", "adaptive", "compiled", "fails"])
def test_no_cycle_holds_a_caller_s_frame(kind: str) -> None:
    """With the collector off: what a finished call has used is gone with the last reference to it."""
    unet, seen = Tiny(), []  # type: tuple[Tiny, list[Any]]
    schedule = ch.Schedule.adaptive(threshold=0.5) if kind == "adaptive" else None
    cw = ch.wrap(unet, schedule=schedule) if schedule is not None else ch.wrap(unet)
    if kind == "compiled":
        cw.compile(backend="eager")
    if kind != "recorded":
        _sample(unet, TIMES, [])
    gc.collect()
    gc.disable()
    try:
        times = {"recorded": TIMES[:1], "full": TIMES[:1]}.get(kind, TIMES)
        _sample(unet, times, seen, fails=kind == "fails")
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    cw.remove()


# -- a pass that has to be run again -----------------------------------------------------------------------------


class Writes(Tiny):
    """Writes to its arguments, as step caches and ControlNets' plumbing do; and may call its modules another way."""

    another_way, where = False, "nowhere"

    def forward(self, x: Tensor, t: Any, c: Any = None, **more: Any) -> Tensor:
        where = self.where
        if where == "sample":
            x += 0.5
        elif where == "list":
            x = x + more["control"].pop()
        elif where == "dict":
            x = x + more["control"].pop("input")
        elif where == "attribute":
            control, more["control"].hint = more["control"].hint, None
            x = x + control
        elif where == "condition":
            c.mul_(2)
        if self.another_way:
            self.body(self.act(self.down(self.stem(x))))
        return super().forward(x, t, c)


class Control:
    def __init__(self, hint: Tensor) -> None:
        self.hint: Tensor | None = hint


def _control(where: str, hint: Tensor) -> Any:
    return {"list": [hint], "dict": {"input": hint, "more": 1}, "attribute": Control(hint)}.get(where)


def _state(where: str, control: Any) -> Any:
    return vars(control) if where == "attribute" else control


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clean", [0, 2], ids=["at once", "after passes that were right"])
@pytest.mark.parametrize("where", ["nowhere", "sample", "list", "dict", "attribute", "condition"])
def test_a_pass_that_is_run_again_sees_its_arguments_as_they_were(where: str, clean: int, mode: Any) -> None:
    """What it returns, and what it leaves in the caller's objects, is what one full pass does."""
    with mode():
        unet, plain = Writes(), Writes()
        unet.where = plain.where = where
        with ch.wrap(unet, clock=2) as cw, cw.branch("conditions that are written to"):
            for k, t in enumerate(TIMES):
                x, c, hint = torch.randn(1, 2, 8, 8), torch.ones(1, 3), torch.ones(1, 2, 8, 8)
                differs = k == 1 + clean
                unet.another_way = plain.another_way = differs
                given = [(x.clone(), c.clone(), _control(where, hint)) for _ in range(2)]
                made, right = (
                    one(sample, t, condition, control=control)
                    for one, (sample, condition, control) in zip((unet, plain), given, strict=True)
                )
                if differs:
                    assert cw.stats.reasons["calls differed from the traced ones"] == 1
                    assert torch.equal(made, right)
                assert torch.equal(given[0][0], given[1][0])
                assert torch.equal(given[0][1], given[1][1])
                assert _state(where, given[0][2]) == _state(where, given[1][2]) or where == "attribute"
                assert where != "attribute" or given[0][2].hint is None


def test_a_pass_that_was_answered_without_the_region_is_not_run_again() -> None:
    """A step cache writes to the sample and returns it."""

    class Cached(Tiny):
        answers = False
        count = 0

        def forward(self, x: Tensor, t: Any, c: Any = None, **more: Any) -> Tensor:
            self.count += 1
            if self.answers:
                x += 1
                return x
            return super().forward(x, t, c, **more)

    unet = Cached()
    with ch.wrap(unet, clock=2) as cw:
        for k, t in enumerate(TIMES):
            unet.answers = k in (2, 3)
            x = torch.zeros(1, 2, 8, 8)
            made = unet(x, t)
            assert not unet.answers or bool((made == 1).all())
        assert unet.count == len(TIMES)
        assert cw.stats.adaptor_passes == 2
        for k in range(8):  # as often as it likes: what was recorded still holds
            unet.answers = k % 2 == 0
            unet(torch.zeros(1, 2, 8, 8), 900 - 100 * k)
        assert unet.count == len(TIMES) + 8


def test_arguments_that_are_gone_are_an_error_and_no_wrong_picture() -> None:
    """A large condition, written to for the first time in a pass that differs: nobody has a copy."""
    unet = Writes()
    c = torch.ones(1, 3)
    with ch.wrap(unet) as cw:
        for t in TIMES[:3]:
            unet(torch.randn(1, 2, 8, 8), t, c)
        unet.another_way, unet.where = True, "condition"
        with pytest.raises(ch.WrapError, match="needs its arguments as they were"):
            unet(torch.randn(1, 2, 8, 8), TIMES[3], c)
        assert cw.stats.adaptor_passes == 1


# -- modules that are exchanged -----------------------------------------------------------------------------------


class Twice(nn.Module):
    """Calls a module in two pieces, as diffusers' SplitInferenceModule does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(x[:1]), self.module(x[1:])])


class LoRA(nn.Module):
    def __init__(self, module: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.base, self.extra = module, extra

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x) + 0.1 * self.extra(x)
        return made


EXCHANGES: dict[str, Callable[[Tiny], Any]] = {
    "one": lambda unet: setattr(unet, "body", Tiny(1).body),
    "exit": lambda unet: setattr(unet, "up", Tiny(1).up),
    "split": lambda unet: [setattr(unet, name, Twice(getattr(unet, name))) for name in ("down", "body", "up")],
    "lora": lambda unet: [
        setattr(unet, name, LoRA(getattr(unet, name), getattr(Tiny(1), name))) for name in ("stem", "body")
    ],
    "outside": lambda unet: setattr(unet, "head", Tiny(1).head),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 3], ids=lambda step: f"before step {step + 1}")
@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanged_modules_are_recorded_anew(name: str, step: int, compiled: bool) -> None:
    """Then half of the passes are adaptor passes again, and nothing is run twice for ever."""
    unet, plain = Tiny(), Tiny()
    with ch.wrap(unet, clock=2) as cw:
        if compiled:
            cw.compile(backend="eager")
        for t in TIMES:
            unet(torch.randn(2, 2, 8, 8), t)
        for k, t in enumerate(TIMES):
            if k == step:
                for one in (unet, plain):
                    EXCHANGES[name](one)
            unet(torch.randn(2, 2, 8, 8), t)
        for repeat in range(2):
            cw.stats.clear()
            exit = None
            for k, t in enumerate(TIMES):
                x = torch.randn(2, 2, 8, 8)
                made = unet(x, t)
                if repeat:
                    right, exit = reference(plain, x, t, exit=exit if k % 2 else None)
                    assert torch.equal(made, right)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
        assert not cw.stats.reasons["calls differed from the traced ones"]
    assert all("forward" not in vars(module) for module in unet.modules())


def test_a_module_that_was_taken_out_is_let_go() -> None:
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    body = unet.body
    with ch.wrap(unet):
        for t in TIMES:
            unet(x, t)
        assert "forward" in vars(body)
        unet.body = Tiny(1).body
        for t in TIMES:
            unet(x, t)
        assert "forward" not in vars(body)
        assert torch.equal(body(torch.ones(1, 16, 4, 4)), Tiny().body(torch.ones(1, 16, 4, 4)))


def test_a_unet_that_always_differs_is_full_and_not_run_twice() -> None:
    class Differs(Tiny):
        count = 0

        def forward(self, x: Tensor, t: Any, c: Any = None, **more: Any) -> Tensor:
            self.count += 1
            for _ in range(self.count):  # another number of calls each time
                self.body(torch.zeros(1, 16, 4, 4))
            return super().forward(x, t, c, **more)

    unet = Differs()
    with ch.wrap(unet), warnings.catch_warnings():
        warnings.simplefilter("ignore", ch.NoEffectWarning)
        for _ in range(20):
            for t in TIMES:
                unet(torch.randn(1, 2, 8, 8), t)
        before = unet.count
        for t in TIMES:
            unet(torch.randn(1, 2, 8, 8), t)
        assert unet.count == before + len(TIMES)

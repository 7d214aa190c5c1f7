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
from clockwork_hooks.engine import passes
from tests.oracle import Judge
from tests.own_memory import WAYS, Home
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
        output: Tensor = self.up(self.body(self.down(self.stem(x))))
        return output


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
    for t in (*TIMES, *TIMES[:3]) if compiled else TIMES[:3]:  # a graph runs once a pass has proved it
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
        output: Tensor = model(x)
        return output


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
        output: Tensor = self.unet(x, t)
        return output


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
        assert judge.letters.endswith("FAFAFA")
    assert not torch.equal(replicate(unet)(x, 500), unet(x, 500))


def test_copies_made_by_threads_in_the_middle_of_a_loop_are_plain() -> None:
    unet, x, copies = Tiny(), torch.randn(1, 2, 8, 8), []
    expected = {t: unet(x, t) for t in TIMES}
    before = snapshot(unet)
    with ch.wrap(unet):
        for t in TIMES:
            unet(x, t)
            thread = threading.Thread(target=lambda: copies.append(copy.deepcopy(unet)))
            thread.start()
            thread.join()
        assert all(torch.equal(one(x, t), expected[t]) for one in copies for t in TIMES)
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


def _judged(unet: nn.Module, adaptor: Any, scale: float, *, clock: int, steps: int, branches: int = 2) -> str:
    """Every call is a full pass, or one whose exit is the scaled one of the same branch's step before."""
    plain, exits, letters = Tiny(), {}, ""
    conditions, times = torch.randn(branches, 1, 3), torch.arange(950.0, 950.0 - 50 * steps, -50.0)
    with ch.wrap(unet, adaptor, clock=clock):
        for k in range(steps):
            for b in range(branches):
                x, t = torch.randn(1, 2, 8, 8), times[k]
                output = unet(x, t, conditions[b])
                full, exit = reference(plain, x, t, conditions[b])
                if torch.equal(output, full):
                    exits[b], letters = exit, letters + "F"
                    continue
                exits[b] = exits[b] * scale
                assert torch.equal(output, reference(plain, x, t, conditions[b], exit=exits[b])[0]), f"stale: {k} {b}"
                letters += "A"
    return letters


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clock", [2, 3])
def test_an_adaptor_may_write_to_a_buffer_of_its_own(clock: int, mode: Any) -> None:
    with mode():
        letters = _judged(Tiny(), Buffered(), 0.9, clock=clock, steps=9)
    assert letters.count("A") >= 8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clock", [2, 3])
def test_a_module_of_the_region_may_write_all_its_outputs_to_one_place(clock: int, mode: Any, way: str) -> None:
    unet = Tiny()
    unet.up = Home(unet.up, way)  # type: ignore[assignment]
    with mode():
        letters = _judged(unet, None, 1.0, clock=clock, steps=9)
    assert letters.count("A") >= 6


@pytest.mark.parametrize("c", [torch.ones(1, 3), None], ids=["alike", "without conditions"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_such_memory_is_filled_by_another_loop(mode: Any, way: str, c: Tensor | None) -> None:
    """By a call at which nobody looks, as the next step is full too and nothing is kept; or by one of other inputs."""
    unet, plain = Tiny(), Tiny()
    unet.up = Home(unet.up, way)  # type: ignore[assignment]
    x, conditions = torch.randn(3, 1, 2, 8, 8), torch.zeros(1, 3)
    with ch.wrap(unet, schedule=ch.Schedule.at({3})) as cw, cw.trajectory() as run, mode():

        def other() -> None:
            with cw.trajectory() as another, mode():
                another(x[0] + 1, TIMES[0], c)

        for k in range(2):
            run(x[k], TIMES[k], conditions)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        output = run(x[2], TIMES[2], conditions)
        assert cw.stats.adaptor_passes == 1
    exit = reference(plain, x[1], TIMES[1], conditions)[1]
    torch.testing.assert_close(output, reference(plain, x[2], TIMES[2], conditions, exit=exit)[0])


def test_what_nobody_else_holds_is_no_copy() -> None:
    """Other UNets' exits are kept where they were made."""
    unet, made, given = Tiny(), list[int](), list[int]()

    class Up(nn.ConvTranspose2d):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            output = super().forward(x)
            made.append(output.data_ptr())
            return output

    unet.up = Up(16, 8, 4, 2, 1)

    def adaptor(entry: Any, exit_cached: Tensor, **_: Any) -> Tensor:
        given.append(exit_cached.data_ptr())
        return exit_cached

    with ch.wrap(unet, adaptor, schedule=ch.Schedule.at({3, 5})) as cw, cw.trajectory() as run:
        for k in range(5):
            run(torch.randn(1, 2, 8, 8), TIMES[k], None)
    assert len(given) == 2
    assert given == [made[1], made[2]]


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
        assert judge.letters == "FAFFAFAFA"
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
                inputs = [(x.clone(), c.clone(), _control(where, hint)) for _ in range(2)]
                outputs, right = (
                    one(sample, t, condition, control=control)
                    for one, (sample, condition, control) in zip((unet, plain), inputs, strict=True)
                )
                if differs:
                    assert cw.stats.reasons["calls differed from the traced ones"] == 1
                    assert torch.equal(outputs, right)
                assert torch.equal(inputs[0][0], inputs[1][0])
                assert torch.equal(inputs[0][1], inputs[1][1])
                assert _state(where, inputs[0][2]) == _state(where, inputs[1][2]) or where == "attribute"
                assert where != "attribute" or inputs[0][2].hint is None


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")  # true of a cache that answers every other step
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
            output = unet(x, t)
            assert not unet.answers or bool((output == 1).all())
        assert unet.count == len(TIMES)
        assert cw.stats.adaptor_passes == 2
        for k, t in enumerate(TIMES):  # as often as it likes: what was recorded still holds
            unet.answers = k % 2 == 0
            unet(torch.zeros(1, 2, 8, 8), t)
        assert unet.count == 2 * len(TIMES)


def test_arguments_that_are_gone_are_an_error_and_no_wrong_picture() -> None:
    """A large condition, written to for the first time in a pass that differs: nobody has a copy."""
    unet = Writes()
    c = torch.ones(1, 3)
    with ch.wrap(unet) as cw:
        for t in TIMES[:3]:
            unet(torch.randn(1, 2, 8, 8), t, c)
        unet.another_way, unet.where = True, "condition"
        with pytest.raises(ch.WrapError, match="needs unchanged arguments"):
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
        output: Tensor = self.base(x) + 0.1 * self.extra(x)
        return output


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
                output = unet(x, t)
                if repeat:
                    right, exit = reference(plain, x, t, exit=exit if k % 2 else None)
                    assert torch.equal(output, right)
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


# -- who looks into the region -----------------------------------------------------------------------------------


def _loop(unet: nn.Module, times: Any = TIMES) -> list[Tensor]:
    torch.manual_seed(0)
    return [unet(torch.randn(1, 2, 8, 8), t) for t in times]


def _seen(unet: Tiny, path: str, kind: str) -> tuple[list[Tensor], Any]:
    values: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any = None) -> None:
        values.append((args[0] if output is None else output).clone())

    add = "register_forward_pre_hook" if kind == "pre-hook" else "register_forward_hook"
    return values, getattr(unet.get_submodule(path), add)(look)


@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
@pytest.mark.parametrize("schedule", ["clock", "adaptive", "compiled"])
def test_a_hook_on_a_skipped_module_is_told_and_never_sees_a_stand_in(schedule: str, kind: str, late: bool) -> None:
    unet, plain = Tiny(), Tiny()
    right, _ = _seen(plain, "body", kind)
    _loop(plain)
    when: Any = ch.Schedule.adaptive(threshold=1e9, longest=1) if schedule == "adaptive" else ch.Schedule.every(2)
    with ch.wrap(unet, schedule=when) as cw:
        if schedule == "compiled":
            cw.compile(backend="eager")
        if late:
            _loop(unet)
        values, handle = _seen(unet, "body", kind)
        before = cw.stats.full_passes
        with pytest.warns(ch.SkippedModuleWarning, match=r'body: a forward hook, _seen.*look\n.*keep=\["body"\]'):
            _loop(unet)
        assert [any(torch.equal(one, value) for value in right) for one in values] == [True] * len(values)
        full = cw.stats.full_passes - before
        assert full < len(TIMES)
        assert len(values) == full
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            _loop(unet)  # told once
        handle.remove()


def test_steering_in_place_that_comes_after_the_first_call_works() -> None:
    unet, plain = Tiny(), Tiny()
    with ch.wrap(unet, clock=2) as cw:
        _loop(unet)
        for one in (unet, plain):
            one.body.register_forward_hook(lambda module, args, output: output.add_(0.1))
        with pytest.warns(ch.SkippedModuleWarning):
            outputs = _loop(unet)
        exit = None
        torch.manual_seed(0)
        for k, t in enumerate(TIMES):
            right, exit = reference(plain, torch.randn(1, 2, 8, 8), t, exit=exit if k % 2 else None)
            assert torch.equal(outputs[k], right)
        assert cw.stats.adaptor_passes == 6


class Controller:
    """An attention processor that counts its calls; no library's."""

    def __init__(self) -> None:
        self.calls = 0


class Stateless:
    def __call__(self) -> None:
        return None


@pytest.mark.parametrize(("processor", "warns"), [(Controller(), True), (Stateless(), False), (nn.ReLU(), False)])
@pytest.mark.parametrize(("where", "skipped"), [("body", True), ("head", False)])
def test_attention_processors_with_state_are_told(processor: Any, warns: bool, where: str, skipped: bool) -> None:
    unet = Tiny()
    unet.get_submodule(where).processor = processor
    with ch.wrap(unet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _loop(unet)
    assert [one.category for one in caught] == [ch.SkippedModuleWarning] * (warns and skipped)
    assert all(one.filename == __file__ for one in caught)


def test_hooks_of_libraries_that_look_at_nothing_are_not_told() -> None:
    unet = Tiny()
    nn.utils.spectral_norm(unet.body)
    with ch.wrap(unet), warnings.catch_warnings():
        warnings.simplefilter("error", ch.SkippedModuleWarning)
        _loop(unet)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", ["down", "act", "body"])
def test_kept_modules_run_with_their_true_inputs(keep: str, compiled: bool) -> None:
    """The modules after them are skipped, those before run; no stand-in reaches them, whatever it holds."""
    unet, plain = Tiny(), Tiny()
    right, _ = _seen(plain, keep, "hook")
    _loop(plain)
    order = ["down", "act", "body", "up"]
    with ch.wrap(unet, clock=2, keep=[keep]) as cw, pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_zero", lambda dtype, device: torch.full((), float("nan"), dtype=dtype, device=device))
        if compiled:
            cw.compile(backend="eager")
        values, handle = _seen(unet, keep, "hook")
        outputs = _loop(unet)
        assert len(values) == len(TIMES)
        assert all(torch.equal(one, true) for one, true in zip(values, right, strict=True))
        assert cw.region is not None
        assert [call.path for call in cw.region.skipped] == order[order.index(keep) + 1 :]
        assert cw.region.macs == ch.find_region(Tiny(), torch.randn(1, 2, 8, 8), 5).macs - _macs(order, keep)
        assert cw.stats.macs_saved == 3 * cw.region.macs
        handle.remove()
    exit = None
    torch.manual_seed(0)
    for k, t in enumerate(TIMES):
        expected, exit = reference(plain, torch.randn(1, 2, 8, 8), t, exit=exit if k % 2 else None)
        assert torch.equal(outputs[k], expected)


def _macs(order: list[str], keep: str) -> int:
    """Of the modules up to the one that is kept: 4×4 outputs."""
    cost = {"down": 16 * 16 * 8 * 16, "act": 0, "body": 16 * 16 * 16 * 9}
    return sum(cost[path] for path in order[: order.index(keep) + 1])


class Blocks(nn.Module):
    """What feeds the kept module lies in other blocks, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.low = nn.ModuleDict(
            {
                "way_down": nn.Sequential(nn.Conv2d(8, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)),
                "mid": nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1)),
                "way_up": nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 4, 2, 1)),
            }
        )

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x) + torch.as_tensor(t).float().sin()
        z = self.low["way_down"](h)
        z = self.low["way_up"](torch.cat([z, self.low["mid"](z)], 1))
        output: Tensor = self.head(torch.cat([h, z], 1))
        return output


@pytest.mark.parametrize(
    ("keep", "skipped"),
    [
        (["low.mid.0"], ["low.mid.1", "low.mid.2", "low.way_up"]),
        (["low.mid"], ["low.way_up"]),
        (["low.way_down"], ["low.mid", "low.way_up"]),
        (["low.way_down.0", "low.way_down.1"], ["low.way_down.2", "low.mid", "low.way_up"]),
        (["head"], ["low.way_down", "low.mid", "low.way_up"]),
        (["stem"], ["low.way_down", "low.mid", "low.way_up"]),
    ],
)
def test_what_is_kept_within_blocks(keep: list[str], skipped: list[str]) -> None:
    torch.manual_seed(0)
    unet = Blocks().eval()
    right, _ = _seen(plain := copy.deepcopy(unet), keep[-1], "pre-hook")  # type: ignore[arg-type]
    _loop(plain)
    with ch.wrap(unet, clock=2, keep=keep) as cw, pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_zero", lambda dtype, device: torch.full((), float("nan"), dtype=dtype, device=device))
        values, _ = _seen(unet, keep[-1], "pre-hook")  # type: ignore[arg-type]
        outputs = _loop(unet)
        assert cw.region is not None
        assert [call.path for call in cw.region.skipped] == skipped
        if keep != ["head"]:  # which takes the adaptor's exit
            assert all(torch.equal(one, true) for one, true in zip(values, right, strict=True))
        assert all(bool(one.isfinite().all()) for one in outputs)
        assert cw.stats.adaptor_passes == 3


def test_keep_names_modules_and_leaves_something() -> None:
    with pytest.raises(ch.ArgumentError, match=r"bodi\n  modules with such names: body"):
        ch.wrap(Tiny(), keep=["bodi"])
    with pytest.raises(ch.ArgumentError, match="keep: 5"):
        ch.wrap(Tiny(), keep=5)  # type: ignore[arg-type]
    with pytest.raises(ch.RegionNotFoundError, match="keep: up"):
        _loop(ch.wrap(Tiny(), keep="up").unet)


def test_kept_modules_of_every_signature_and_of_several_clocks() -> None:
    unet = Tiny()
    with ch.wrap(unet, keep="body") as cw:
        for size in (8, 16, 8):
            values, handle = _seen(unet, "body", "hook")
            for t in TIMES:
                unet(torch.randn(1, 2, size, size), t)
            handle.remove()
            assert len(values) == len(TIMES)
        assert cw.stats.adaptor_passes == 8  # the hook holds a placeholder of the other size: it is recorded


# -- nobody is served ---------------------------------------------------------------------------------------------


def test_whoever_gets_no_adaptor_pass_is_told_once_why() -> None:
    """Embeddings that are other ones in each step."""
    unet = Tiny()
    with ch.wrap(unet):
        for t in TIMES[:5]:
            unet(torch.randn(1, 2, 8, 8), t, torch.randn(1, 3))
        with pytest.warns(
            ch.NoEffectWarning, match=r"conditions are new in this step(.|\n)*with cw.branch\(name\)"
        ) as warned:
            unet(torch.randn(1, 2, 8, 8), TIMES[5], torch.randn(1, 3))
        assert warned[0].filename == __file__
        for t in TIMES:
            unet(torch.randn(1, 2, 8, 8), t, torch.randn(1, 3))


def test_a_unet_without_a_time_is_told() -> None:
    class NoTime(Tiny):
        def forward(self, x: Tensor, *more: Any, **others: Any) -> Tensor:
            return super().forward(x, 5)

    unet = NoTime()
    with ch.wrap(unet):
        for _ in range(5):
            unet(torch.randn(1, 2, 8, 8))
        with pytest.warns(ch.NoEffectWarning, match=r"with cw.step\(\):"):
            unet(torch.randn(1, 2, 8, 8))


def _a_run_each_call(unet: nn.Module, cw: ch.ClockworkWrapper, t: Tensor) -> None:
    with cw.trajectory():
        unet(torch.ones(1, 2, 8, 8), t)


def _reset_each_call(unet: nn.Module, cw: ch.ClockworkWrapper, t: Tensor) -> None:
    cw.reset()
    unet(torch.ones(1, 2, 8, 8), t)


def _always_one_time(unet: nn.Module, cw: ch.ClockworkWrapper, t: Tensor) -> None:
    unet(torch.ones(1, 2, 8, 8), TIMES[3].clone())


@pytest.mark.parametrize(("call", "calls"), [(_a_run_each_call, 24), (_reset_each_call, 24), (_always_one_time, 128)])
def test_calls_that_are_all_first_steps_are_told(call: Callable[..., None], calls: int) -> None:
    unet, times = Tiny(), torch.linspace(900.0, 100.0, 160)
    with ch.wrap(unet) as cw:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in times[: calls - 1]:
                call(unet, cw, t)
        with pytest.warns(ch.NoEffectWarning, match="is inside the loop over the steps"):
            call(unet, cw, times[calls - 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in times[calls:]:
                call(unet, cw, t)
        assert cw.stats.adaptor_passes == 0


def test_a_schedule_whose_steps_are_never_reached_is_told() -> None:
    """Two whole runs are waited for: the first one may be a short trial."""
    unet = Tiny()
    with ch.wrap(unet, schedule={9, 10}) as cw:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in (*TIMES[:6], *TIMES[:6]):
                unet(torch.ones(1, 2, 8, 8), t)
        with pytest.warns(ch.NoEffectWarning, match="runs have 6 steps, and the schedule gives none of these"):
            unet(torch.ones(1, 2, 8, 8), TIMES[0])
        assert set(cw.stats.reasons) == {"first step", "scheduled"}


def test_a_run_with_an_adaptor_pass_is_none_of_the_whole_runs_without() -> None:
    """The steps of the schedule are reached in a run of six; a short one after it tells nothing yet."""
    unet = Tiny()
    with ch.wrap(unet, schedule={4, 5}) as cw, warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (6, 3, 6, 3, 6):
            with cw.trajectory():
                for t in TIMES[:steps]:
                    unet(torch.ones(1, 2, 8, 8), t)
        assert cw.stats.adaptor_passes == 6


@pytest.mark.parametrize(
    "schedule", [(), "every(1)", ch.Schedule.spread(1), ch.Schedule.early(1), ch.Schedule.every(1, last_full=2)]
)
def test_a_schedule_without_adaptor_steps_is_told_at_once(schedule: Any) -> None:
    with pytest.warns(ch.NoEffectWarning, match="makes every pass full"):
        ch.wrap(Tiny(), schedule=schedule).remove()


def test_who_learns_or_skips_nothing_is_not_told_of_first_steps() -> None:
    unet = Tiny()
    with pytest.warns(ch.NoEffectWarning, match="without adaptor steps"):  # told at once, and that is all
        cw = ch.wrap(unet, schedule=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cw:
            for t in torch.linspace(900.0, 100.0, 40):
                _a_run_each_call(unet, cw, t)
        with torch.enable_grad(), ch.wrap(unet.train()) as cw:
            for t in torch.linspace(900.0, 100.0, 40):
                _a_run_each_call(unet, cw, t)


@pytest.mark.parametrize(
    "schedule", [ch.Schedule.every(2), ch.Schedule.every(4), {9, 10}, ch.Schedule.adaptive(threshold=1e-6)]
)
@pytest.mark.parametrize("numbers", [False, True], ids=["a list", "numbers"])
def test_who_is_served_or_asked_for_nothing_is_not_told(schedule: Any, numbers: bool) -> None:
    unet = Tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ch.wrap(unet, schedule=schedule):
            for _ in range(3):
                for t in torch.arange(900.0, 0.0, -100.0):
                    unet(torch.randn(1, 2, 8, 8), t.item() ** 1.1 if numbers else t)
        with ch.wrap(unet):
            for _ in range(10):
                for t in TIMES[:1]:  # short ones
                    unet(torch.randn(1, 2, 8, 8), t)
            with torch.enable_grad():
                for t in TIMES:
                    unet.train()(torch.randn(1, 2, 8, 8), t)


def test_forward_called_directly_is_served() -> None:
    """As by samplers that call `self.forward` twice."""

    class Guided(Tiny):
        def guided(self, x: Tensor, t: Any, c: Tensor) -> Tensor:
            return self.forward(x, t, c) + self.forward(x, t, 0 * c)

    unet = Guided()
    c = torch.ones(1, 3)
    with ch.wrap(unet) as cw:
        for t in TIMES:
            unet.guided(torch.randn(1, 2, 8, 8), t, c)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 6)

"""What comes together: named runs and nested branches across threads, and a fault or a change in the middle."""

import contextlib
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny

TIMES = torch.linspace(900, 100, 8)


def sample(rows: int = 1) -> Tensor:
    return torch.randn(rows, 2, 8, 8)


def call(judge: Judge, *args: Any, **keywords: Any) -> None:
    """In any thread: gradients are a thread's own."""
    with torch.no_grad():
        judge.call(*args, **keywords)


def elsewhere(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)


def other_layer() -> nn.Conv2d:
    torch.manual_seed(9)
    return nn.Conv2d(16, 16, 3, padding=1)


def test_named_runs_that_share_times_and_prompt_are_stepped_by_a_pool() -> None:
    unet, plain, prompt = Tiny(), Tiny(), torch.randn(1, 3)
    with ch.wrap(unet) as cw, ThreadPoolExecutor(3) as pool:
        judges = {name: Judge(cw.trajectory(name), plain) for name in "ab"}  # type: ignore[arg-type]
        for k, t in enumerate(TIMES, 1):
            for name in "ab" if k % 2 else "ba":
                pool.submit(call, judges[name], sample(), t, prompt, step=k).result(60)
    assert [judge.letters for judge in judges.values()] == ["FAFAFAFA"] * 2


def test_nested_branches_of_a_named_run_in_any_thread_and_order() -> None:
    unet, prompts = Tiny(), {"cond": torch.randn(1, 3), "uncond": torch.randn(1, 3)}
    judge = Judge(unet, Tiny())
    with ch.wrap(unet) as cw, ThreadPoolExecutor(3) as pool:

        def one(k: int, t: Tensor, tile: int, name: str) -> None:
            with cw.trajectory("run"), cw.branch(f"tile {tile}"), cw.branch(name):
                call(judge, sample(), t, prompts[name], step=k, branch=(tile, name))

        with cw.trajectory("run"):
            for k, t in enumerate(TIMES, 1):
                order = [(tile, name) for tile in range(2) for name in prompts]
                for tile, name in reversed(order) if k % 3 == 0 else order:
                    pool.submit(one, k, t, tile, name).result(60)
    assert judge.letters == "FFFFAAAA" * 4


@pytest.mark.parametrize("how", ["in place", "behind the counter"])
def test_a_prompt_that_changes_in_a_run_that_hops(how: str) -> None:
    unet, prompt = Tiny(), torch.randn(1, 3)
    with ch.wrap(unet) as cw, ThreadPoolExecutor(2) as pool:
        judge = Judge(cw.trajectory(), Tiny())  # type: ignore[arg-type]
        for k, t in enumerate(TIMES, 1):
            if k == 4:
                (prompt if how == "in place" else prompt.data).add_(1)
                judge.forget(0)
            pool.submit(call, judge, sample(), t, prompt, step=k).result(60)
    assert judge.letters == "FAFFFAFA"


@pytest.mark.parametrize("where", ["stem", "body", "head"])
@pytest.mark.parametrize("at", [3, 4])
def test_an_interrupt_in_nested_branches_and_the_run_goes_on(where: str, at: int) -> None:
    unet, prompt = Tiny(), torch.randn(1, 3)
    judge = Judge(unet, Tiny())
    faults: list[BaseException] = []

    def fail(*_: Any) -> None:
        if faults:
            raise faults.pop()

    unet.get_submodule(where).register_forward_pre_hook(fail)
    warned = pytest.warns(ch.SkippedModuleWarning) if where == "body" else contextlib.nullcontext()
    with warned, ch.wrap(unet) as cw, cw.trajectory("run"):
        for k, t in enumerate(TIMES, 1):
            faults[:] = [KeyboardInterrupt()] if k == at else []
            try:
                with cw.branch("a"), cw.branch("b"):
                    call(judge, sample(), t, prompt, step=k)
            except KeyboardInterrupt:
                judge.begin()
            faults.clear()
    assert 3 <= judge.letters.count("A") <= 4


def test_an_error_in_one_of_two_runs_that_take_turns_leaves_the_other_alone() -> None:
    unet, plain, prompt = Tiny(), Tiny(), torch.randn(1, 3)
    broken: list[bool] = []

    def fail(*_: Any) -> None:
        if broken:
            raise RuntimeError(broken.pop())

    unet.head.register_forward_pre_hook(fail)
    with ch.wrap(unet) as cw:
        judges = {name: Judge(cw.trajectory(name), plain) for name in "ab"}  # type: ignore[arg-type]
        for k, t in enumerate(TIMES, 1):
            for name, judge in judges.items():
                broken[:] = [True] if (name, k) == ("a", 4) else []
                with contextlib.suppress(RuntimeError):
                    call(judge, sample(), t, prompt, step=k)
                    continue
                judge.begin()
    assert [judge.letters for judge in judges.values()] == ["FAFFAFA", "FAFAFAFA"]


def test_compiled_named_runs_of_two_batches_take_turns() -> None:
    unet, plain = Tiny(), Tiny()
    with ch.wrap(unet) as cw:
        cw.compile(backend="eager")
        judges = {rows: Judge(cw.trajectory(str(rows)), plain) for rows in (1, 2)}  # type: ignore[arg-type]
        prompts = {rows: torch.randn(rows, 3) for rows in judges}
        for k, t in enumerate(TIMES, 1):
            for rows, judge in judges.items():
                call(judge, sample(rows), t, prompts[rows], step=k)
    assert [judge.letters for judge in judges.values()] == ["FAFAFAFA"] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_is_exchanged_and_put_back(compiled: bool) -> None:
    unet, plain = Tiny(), Tiny()
    before, letters = (unet.body, plain.body), []
    with ch.wrap(unet) as cw:
        if compiled:
            cw.compile(backend="eager")
        for run in range(3):
            new = other_layer()
            unet.body, plain.body = (new, copy.deepcopy(new)) if run == 1 else before
            judge = Judge(unet, plain)
            for k, t in enumerate(TIMES.clone(), 1):
                call(judge, sample(), t, step=k)
            letters.append(judge.letters)
    assert letters == ["FAFAFAFA"] * 3


def test_removed_by_another_thread_in_the_middle_of_an_adaptor_pass() -> None:
    unet, plain = Tiny(), Tiny()
    judge, gate = Judge(unet, plain), []

    def open_gate(*_: Any) -> None:
        if gate:
            gate.pop()
            elsewhere(cw.remove)

    unet.stem.register_forward_hook(open_gate)
    cw = ch.wrap(unet)
    for k, t in enumerate(TIMES, 1):
        gate[:] = [True] if k == 4 else []
        call(judge, sample(), t, step=k)
    assert judge.letters == "FAFFFFFF"
    assert "forward" not in vars(unet) | vars(unet.body) | vars(unet.up)


@pytest.mark.parametrize("how", ["copied in", "behind the counter"])
def test_weights_that_another_thread_averages(how: str) -> None:
    unet, plain = Tiny(), Tiny()
    judge = Judge(unet, plain)

    def average() -> None:
        with torch.no_grad():
            for weight in (*unet.parameters(), *plain.parameters()):
                (weight if how == "copied in" else weight.data).mul_(1.01)

    with ch.wrap(unet):
        for k, t in enumerate(TIMES, 1):
            if k == 4:
                elsewhere(average)
                judge.forget(0)
            call(judge, sample(), t, step=k)
    assert judge.letters == "FAFFFAFA"

"""Several loops at once, copies and files: each one as if it were alone."""

import asyncio
import contextlib
import copy
import gc
import io
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.clock.loops import State
from tests.oracle import Judge
from tests.small_unet import Tiny

RUNS = ((8, 0), (5, 1), (12, 2), (8, 3))  # steps, seed of prompt and noise


def picture(call: Any, steps: int, seed: int) -> Iterator[Tensor]:
    """A sampling loop with guidance in two calls that can be stopped between them."""
    random = torch.Generator().manual_seed(seed)
    x, *pair = torch.randn(1, 2, 8, 8, generator=random), *torch.randn(2, 1, 3, generator=random)
    for t in torch.linspace(900, 0, steps):
        for c in pair:
            with torch.no_grad():
                x = x - 0.1 * call(x, t, c).tanh()
            yield x


def last(loop: Iterator[Tensor]) -> Tensor:
    *_, x = loop
    return x


def alone(steps: int, seed: int) -> Tensor:
    with ch.wrap(Tiny()) as cw:
        return last(picture(cw, steps, seed))


def test_two_threads() -> None:
    """They are made to take turns at every call."""
    unet, outputs = Tiny(), {}
    barrier = threading.Barrier(2)

    def run(steps: int, seed: int) -> None:
        for x in picture(unet, steps, seed):
            outputs[seed] = x
            barrier.wait(30)

    with ch.wrap(unet) as cw:
        for pair in (((8, 0), (8, 1)), ((6, 2), (6, 3))):
            threads = [threading.Thread(target=run, args=options) for options in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            for steps, seed in pair:
                assert torch.equal(outputs[seed], alone(steps, seed))
    assert cw.stats.adaptor_passes == 2 * 2 * (4 + 3)
    assert sorted(one.steps for one in cw.stats.trajectories) == [6, 6, 8, 8]


def test_jobs_of_a_pool() -> None:
    """More jobs than threads, one after another in each; none goes on where the last one stopped."""
    unet = Tiny()
    with ch.wrap(unet), ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(lambda run: last(picture(unet, *run)), run) for run in RUNS * 2]
        for run, job in zip(RUNS * 2, jobs, strict=True):
            assert torch.equal(job.result(60), alone(*run))


def test_asyncio_tasks() -> None:
    """They take turns at every call, in one thread."""
    unet = Tiny()

    async def run(steps: int, seed: int) -> Tensor:
        outputs = []
        for x in picture(unet, steps, seed):
            outputs.append(x)
            await asyncio.sleep(0)
        return outputs[-1]

    async def main() -> list[Tensor]:
        return await asyncio.gather(*(run(*options) for options in RUNS))

    with ch.wrap(unet) as cw:
        for options, x in zip(RUNS, asyncio.run(main()), strict=True):
            assert torch.equal(x, alone(*options))
        assert cw.stats.adaptor_passes == sum(2 * (steps // 2) for steps, _ in RUNS)
        assert cw.report().cache == {}  # the tasks are over


def test_calls_that_are_jobs_of_their_own() -> None:
    """`await asyncio.to_thread(unet, ...)`: whatever worker is free takes the call; the judge sees nothing stale."""
    unet = Tiny()

    async def main() -> str:
        judge = Judge(unet, Tiny())
        for k, t in enumerate((900, 800, 700, 600), 1):
            await asyncio.to_thread(torch.no_grad()(judge.call), torch.randn(1, 2, 8, 8), t, step=k)
        return judge.letters

    with ch.wrap(unet):
        assert asyncio.run(main()).startswith("F")


@pytest.mark.parametrize("conditions", [0, 1])
@pytest.mark.parametrize("times", [(900, 800, 700, 600, 500, 400), torch.arange(900.0, 300, -100)])
def test_calls_that_hop_between_threads(times: Any, conditions: int) -> None:
    """Two workers by turns: each sees every other call, as regular as a loop of its own. Named, all is served."""
    texts = [torch.randn(1, 3)] * conditions
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    for within in (False, True):
        judge = Judge(Tiny())
        with ch.wrap(judge.unet) as cw:
            block = cw.trajectory("client 7")
            judge.unet = block if within else judge.unet  # type: ignore[assignment]
            for k, t in enumerate(times, 1):
                call = torch.no_grad()(judge.call)
                pools[k % 2].submit(call, torch.randn(1, 2, 8, 8), t, *texts, step=k).result()
            block.close()
        assert judge.letters == ("FAFAFA" if within else "FFFFFF"), cw.report()
    for pool in pools:
        pool.shutdown()


def test_generators_that_hold_a_trajectory_are_stepped_by_any_thread() -> None:
    """Three clients at the same times with one prompt, interleaved, each stepped by two workers by turns."""
    judges, c, unet = [Judge(Tiny(), Tiny()) for _ in range(3)], torch.randn(1, 3), Tiny()
    with ch.wrap(unet) as cw, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def stream(judge: Judge, times: Any) -> Iterator[None]:
            with cw.trajectory():
                for k, t in enumerate(times, 1):
                    with torch.no_grad():
                        judge.call(torch.randn(1, 2, 8, 8), t, c, step=k)
                    yield

        for judge in judges:
            judge.unet = unet
        clients = [stream(judge, [900.0, 800.0, 700.0, 600.0]) for judge in judges]
        for k in range(4):
            for n, client in enumerate(clients):
                (one, other)[(k + n) % 2].submit(next, client).result()
        for client in clients:
            client.close()
        assert [judge.letters for judge in judges] == ["FAFA"] * 3
        assert cw.report().cache == {}


def test_names_and_declarations_stay_in_their_thread() -> None:
    """In the other one, times tell the steps: declared ones would stay at the first."""
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    with ch.wrap(unet, region=ch.find_region(unet, x, 900)) as cw, cw.branch("mine"), ThreadPoolExecutor(1) as pool:
        places: list[Any] = []
        unet.stem.register_forward_hook(lambda *_: places.append((cw.position.branch.names, cw.position.step)))
        cw.step()
        for call in (unet, lambda *args: pool.submit(unet, *args).result()):
            for t in (900, 800):
                call(x, t)
        assert places == [(("mine",), 1), (("mine",), 1), ((), 1), ((), 2)]


@torch.no_grad()
def test_a_copy_is_independent() -> None:
    """Made in the middle of a trajectory: it runs its own weights, in full, and can be wrapped by itself."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        cw(torch.randn(1, 2, 8, 8), 900)
        cw(torch.randn(1, 2, 8, 8), 800)
        copied = copy.deepcopy(unet)
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        before, x = cw.stats.full_passes, torch.randn(1, 2, 8, 8)
        expected = Tiny()
        for parameter in expected.parameters():
            parameter.mul_(0.5)
        assert torch.equal(copied(x, 700), expected(x, 700))
        assert cw.stats.full_passes == before
        with ch.wrap(copied) as other:
            assert torch.equal(last(picture(other, 8, 0)), last(picture(ch.wrap(expected), 8, 0)))
        assert torch.equal(last(picture(cw, 8, 0)), alone(8, 0))


@torch.no_grad()
def test_saved_while_wrapped(tmp_path: Path) -> None:
    """`state_dict`, `torch.save` and `save_pretrained` see the UNet as it is without us."""
    from diffusers import UNet2DModel

    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, block_out_channels=(8, 32), norm_num_groups=8, layers_per_block=1, **blocks).eval()
    keys, x = list(unet.state_dict()), torch.randn(1, 3, 8, 8)
    with ch.wrap(unet) as cw, cw.trajectory():
        for t in (900, 800, 700):
            unet(x, t)
        assert list(unet.state_dict()) == keys == list(cw.state_dict())
        unet.save_pretrained(tmp_path / "saved")
        weights, whole = io.BytesIO(), io.BytesIO()
        torch.save(unet.state_dict(), weights)
        torch.save(unet, whole)
    again = UNet2DModel.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False).eval()
    fresh = UNet2DModel.from_config(unet.config).eval()
    fresh.load_state_dict(torch.load(io.BytesIO(weights.getvalue()), weights_only=True))
    pickled = torch.load(io.BytesIO(whole.getvalue()), weights_only=False)
    for one in (again, fresh, pickled):
        pairs = zip(one.state_dict().items(), unet.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(value, own) for (name, value), (other, own) in pairs)
        torch.testing.assert_close(one(x, 500).sample, unet(x, 500).sample)
        if one is not pickled:  # there, a skipped module's forward is its class's, bound to it
            assert not any("forward" in vars(module) for module in one.modules())
        with ch.wrap(one) as cw, cw.trajectory():
            for t in (900, 800):
                one(x, t)
        assert cw.stats.adaptor_passes == 1


@pytest.mark.parametrize("how", ["before", "while wrapped"])
@torch.no_grad()
def test_weights_loaded(how: str) -> None:
    """New weights are a new model: after `reset()`, or in a new trajectory, nothing of the old one is used."""
    unet, other = Tiny(), Tiny(seed=1)
    if how == "before":
        unet.load_state_dict(other.state_dict())
    with ch.wrap(unet) as cw:
        if how == "while wrapped":
            last(picture(cw, 4, 0))
            unet.load_state_dict(other.state_dict())
        with ch.wrap(other) as expected:
            assert torch.equal(last(picture(cw, 8, 0)), last(picture(expected, 8, 0)))


def test_threads_tasks_and_runs_that_end_leave_nothing() -> None:
    """A server that starts a thread for each request; idle workers of a pool keep the features of one step each."""

    def tensors_held() -> int:
        gc.collect()
        return sum(type(one) is Tensor and one.shape == (1, 8, 8, 8) for one in gc.get_objects())

    def loops_held() -> int:
        gc.collect()
        return sum(type(one) is State for one in gc.get_objects())

    def in_threads(count: int) -> None:
        for k in range(count):
            thread = threading.Thread(target=lambda k=k: last(picture(cw, 4 + k % 2, k)))
            thread.start()
            thread.join(60)

    async def task(k: int) -> None:
        loop = picture(cw, 4, k)
        next(loop)
        await asyncio.sleep(0)
        last(loop)

    async def in_tasks(count: int) -> None:
        await asyncio.gather(*(task(k) for k in range(count)))

    def in_runs(count: int) -> None:
        for k in range(count):
            with cw.trajectory(f"client {k}") as run:
                next(picture(run, 4, k))  # given up after one call

    with ch.wrap(Tiny()) as cw:
        last(picture(cw, 4, 0))
        before, here = tensors_held(), loops_held()
        for _ in range(2):
            in_threads(20)
            asyncio.run(in_tasks(20))
            in_runs(20)
            assert tensors_held() <= before
            assert loops_held() == here
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: last(picture(cw, 4, k)), range(40)))
            assert tensors_held() <= before + 4 * 2 * 2  # two branches a worker, of the last step and of the one before
            assert loops_held() <= here + 4
        assert tensors_held() <= before
        assert loops_held() == here


def test_many_loops_that_begin_together_are_told_nothing() -> None:
    """Thirty first steps in a row, of clients of one server, are no run of one step."""
    unet = Tiny()
    with warnings.catch_warnings(), ch.wrap(unet) as cw:
        warnings.simplefilter("error")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(cw.trajectory(f"client {k}")) for k in range(30)]
            loops = [picture(run, 4, k) for k, run in enumerate(clients)]
            for _ in range(3):
                for loop in loops:
                    next(loop)

        async def task(k: int) -> None:
            loop = picture(cw, 4, k)
            for _ in range(3):
                next(loop)
                await asyncio.sleep(0)

        async def tasks() -> None:
            await asyncio.gather(*(task(k) for k in range(30)))

        asyncio.run(tasks())

"""A wrapped UNet under DistributedDataParallel and FSDP2's fully_shard, in two processes; DataParallel is refused."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import clockwork_hooks as ch
from tests.small_unet import Tiny
from tests.snapshot import snapshot

TIMES = (900.0, 800.0, 700.0, 600.0)
RANKS = 2


def replica(unet: nn.Module) -> nn.Module:
    """What DataParallel calls on another device; the weights are others, to be told apart on one device."""
    replicas = {module: module._replicate_for_data_parallel() for module in unet.modules()}
    for module, other in replicas.items():
        other._modules.update({name: replicas[child] for name, child in module.named_children()})
        for name, value in module.named_parameters(recurse=False):
            setattr(other, name, 1.1 * value.detach())
    return replicas[unet]


def test_a_replica_of_data_parallel_is_refused() -> None:
    """Its patched modules are the original's, with the original's weights, on the original's device."""
    unet, x = Tiny(), torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        plain = replica(unet)(x, 900.0)
        with ch.wrap(unet) as cw, cw.trajectory():
            unet(x, 900.0)
            with pytest.raises(ch.WrapError, match="must run as the object that was wrapped") as e:
                replica(unet)(x, 800.0)
            assert "DistributedDataParallel" in e.value.do
            unet(x, 800.0)
            assert cw.stats.adaptor_passes == 1
        assert torch.equal(replica(unet)(x, 900.0), plain)


@pytest.mark.slow  # gloo's threads now and then abort a process that is done: once in four runs of all tests
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # multiprocessing's about threads and fork servers
@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed with gloo")
def test_two_processes(tmp_path: Path) -> None:
    """In one go, as starting them costs the most; an assertion that fails there is raised here with its trace."""
    mp.spawn(in_a_process, (str(tmp_path / "store"),), nprocs=RANKS)


def in_a_process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        torch.manual_seed(rank)  # each process denoises a picture of its own
        xs, text = torch.randn(4, 1, 2, 8, 8), torch.randn(1, 3)
        for check in (under_ddp, ddp_wrapped, training_under_ddp, under_fsdp, training_under_fsdp):
            check(xs, text)
            dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # all is checked: no teardown of modules that hold gloo's threads


@torch.no_grad()
def sample(model: Any, xs: Tensor, text: Tensor) -> list[Tensor]:
    return [model(x, t, text) for x, t in zip(xs, TIMES, strict=True)]


def train(model: Any, xs: Tensor, text: Tensor) -> None:
    sum(model(x, t, text).square().sum() for x, t in zip(xs, TIMES, strict=True)).backward()


def expected(xs: Tensor, text: Tensor) -> list[Tensor]:
    """A wrapped UNet in one process."""
    with ch.wrap(Tiny()) as cw, cw.trajectory():
        outputs = sample(cw, xs, text)
        assert cw.stats.adaptor_passes == 2
    return outputs


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def mean_gradients(xs: Tensor, text: Tensor) -> list[Tensor]:
    """Those of a plain UNet, over both processes."""
    plain = Tiny().train()
    train(plain, xs, text)
    gradients = [parameter.grad for parameter in plain.parameters()]
    for grad in gradients:
        dist.all_reduce(grad)
    return [grad / RANKS for grad in gradients]


def under_ddp(xs: Tensor, text: Tensor) -> None:
    for wrapped_first in (True, False):
        unet = Tiny()
        cw = ch.wrap(unet) if wrapped_first else None
        model = DistributedDataParallel(unet)
        before = snapshot(unet)
        cw = cw or ch.wrap(unet)
        with cw.trajectory():
            outputs = sample(model, xs, text)
        assert equal(outputs, expected(xs, text))
        assert cw.stats.adaptor_passes == 2
        cw.remove()
        assert equal(sample(model, xs, text), sample(Tiny(), xs, text))
        if not wrapped_first:
            assert snapshot(unet) == before


def ddp_wrapped(xs: Tensor, text: Tensor) -> None:
    """`wrap(ddp)` finds the region one module deeper."""
    model = DistributedDataParallel(Tiny())
    with ch.wrap(model) as cw:
        with cw.trajectory():
            outputs = sample(model, xs, text)
        assert equal(outputs, expected(xs, text))
        assert cw.stats.adaptor_passes == 2
        assert cw.region is not None
        assert cw.region.exit.path == "module.up"


def training_under_ddp(xs: Tensor, text: Tensor) -> None:
    """All passes are full, and the gradients are the mean over the processes."""
    unet = Tiny().train()
    model = DistributedDataParallel(unet)
    with ch.wrap(unet) as cw, cw.trajectory():
        train(model, xs, text)
        assert cw.stats.reasons == {"first step": 1, "training": 2, "scheduled": 1}
    for parameter, grad in zip(unet.parameters(), mean_gradients(xs, text), strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def sharded(unet: nn.Module, parts: tuple[str, ...]) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in parts:
        fully_shard(unet.get_submodule(part), mesh=mesh)
    fully_shard(unet, mesh=mesh)
    return unet


def under_fsdp(xs: Tensor, text: Tensor) -> None:
    """Sharded as a whole, and with shards of its own for modules that adaptor passes skip."""
    for wrapped_first in (True, False):
        for parts in ((), ("down", "body", "up")):
            unet = Tiny()
            cw = ch.wrap(unet) if wrapped_first else None
            sharded(unet, parts)
            cw = cw or ch.wrap(unet)
            with cw.trajectory():
                outputs = sample(unet, xs, text)
            assert equal(outputs, expected(xs, text))
            assert cw.stats.adaptor_passes == 2
            cw.remove()
            assert equal(sample(unet, xs, text), sample(Tiny(), xs, text))


def training_under_fsdp(xs: Tensor, text: Tensor) -> None:
    unet = sharded(Tiny().train(), ("body",))
    with ch.wrap(unet):
        train(unet, xs, text)
    for parameter, grad in zip(unet.parameters(), mean_gradients(xs, text), strict=True):
        assert torch.allclose(parameter.grad.full_tensor(), grad, rtol=1e-4, atol=1e-6)

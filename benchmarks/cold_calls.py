"""What small questions to torch and Python cost between two calls of a UNet, whose kernels have emptied the caches.

    python benchmarks/cold_calls.py

One thread; medians in microseconds, those of a call that does nothing taken off; beside them the same in a loop.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import torch

from clockwork_hooks.demo import load_demo

ROUNDS = 25


@contextlib.contextmanager
def _block() -> Iterator[None]:
    yield


def _blocks() -> None:
    with _block():
        pass


def snippets() -> dict[str, Callable[[], object]]:
    """Name → what is asked."""
    x, times = torch.randn(2, 18, 128), torch.linspace(900.0, 100.0, 9)
    copy, parameter, local = x.clone(), torch.nn.Parameter(torch.randn(64, 64)), threading.local()
    local.one = 1
    return {
        "nothing": lambda: None,
        "x.shape": lambda: x.shape,
        "x._version": lambda: x._version,
        "x.is_contiguous()": lambda: x.is_contiguous(),
        "x.device": lambda: x.device,
        "x.device.type": lambda: x.device.type,
        "x.untyped_storage().nbytes()": lambda: x.untyped_storage().nbytes(),
        "x.view(torch.int64)": lambda: x.view(torch.int64),
        "x.clone()": lambda: x.clone(),
        "torch.equal, 18 KiB": lambda: torch.equal(x, copy),
        "three values of a parameter": lambda: parameter.data.as_strided((3,), (9,)).tolist(),
        "times[3].tolist()": times[3].tolist,
        "torch.is_autocast_enabled": lambda: torch.is_autocast_enabled("cpu"),
        "torch.compiler.is_compiling": torch.compiler.is_compiling,
        "an attribute of threading.local": lambda: local.one,
        "a block of contextlib.contextmanager": _blocks,
    }


@torch.no_grad()
def measured() -> dict[str, tuple[float, float]]:
    """Name → microseconds after a UNet's call, and in a loop."""
    demo, asked = load_demo(), snippets()
    sample, hidden = demo.noise(2, seed=0), demo.encode_prompts(["a red square"])
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(ROUNDS):
        for name, ask in asked.items():
            demo.unet(sample, torch.tensor(500.0), encoder_hidden_states=hidden)
            start = time.perf_counter()
            ask()
            spent[name].append(1e6 * (time.perf_counter() - start))
    cold = {name: statistics.median(values) for name, values in spent.items()}
    return {name: (cold[name] - cold["nothing"], _in_a_loop(ask)) for name, ask in asked.items()}


def _in_a_loop(ask: Callable[[], object], times: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(times):
        ask()
    return 1e6 * (time.perf_counter() - start) / times


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (cold, warm) in measured().items():
        print(f"{name:38} {cold:6.1f} {warm:6.2f}")

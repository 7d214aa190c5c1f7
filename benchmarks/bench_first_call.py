"""What the first call of a wrapped UNet costs, and the first of other sizes.

    python -m pytest -n 0 -s benchmarks/bench_first_call.py

One thread of this CPU; sides run in turns, and what is measured is the thread's own CPU time, so other processes
disturb little. "First call" is that of a UNet wrapped anew, in a process that has wrapped others: its call is recorded,
its region found. "Cold" is the first in a fresh interpreter, with all that is imported on the way. "Other sizes" are
calls of another prompt length, batch or resolution than the recorded one. "Collections" are first calls in a process
that has imported what pipelines import, with the garbage collector left alone and not. Ratios to the same calls go
to benchmarks/results/first_call.json (or where FIRST_CALL_OUT says).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from benchmarks.harness import Results
from benchmarks.setting import Model, build

COMMAND = "python -m pytest -n 0 -s benchmarks/bench_first_call.py"
OUT = Path(os.environ.get("FIRST_CALL_OUT", Path(__file__).parent / "results" / "first_call.json"))
pytestmark = pytest.mark.usefixtures("one_thread")
# name → (preset, narrow, size of the latents, rounds)
MODELS = {
    "demo": ("demo", False, (32, 32), 9),
    "sd15, a tenth as wide": ("sd15", True, (16, 16), 9),
    "small SD": ("small SD", False, (32, 32), 5),
    "sd15": ("sd15", False, (32, 32), 2),
}
COLD = """
import json, sys, time, torch
from benchmarks.bench_first_call import MODELS, call_of
from benchmarks.setting import build
torch.set_num_threads(1)
preset, narrow, size, _ = MODELS[sys.argv[1]]
model = build(preset, "cpu", torch.float32, tiny=narrow)
call, unet = call_of(model, size), model.twin()
with torch.no_grad():
    call(model.unet)
    before = time.thread_time()
    call(model.unet)
    plain = time.thread_time() - before
    before = time.thread_time()
    import clockwork_hooks as ch
    cw = ch.wrap(unet)
    wrapping = time.thread_time() - before
    before = time.thread_time()
    call(unet)
    print(json.dumps({"plain": plain, "wrapping": wrapping, "first": time.thread_time() - before}))
"""


def call_of(model: Model, size: tuple[int, ...], batch: int = 2, tokens: int = 77) -> Callable[[Any], Any]:
    """One call of such a UNet, on inputs of these sizes."""
    generator, config = torch.Generator().manual_seed(batch + tokens), model.unet.config
    sample = torch.randn(batch, config.in_channels, *size, generator=generator)
    text = torch.randn(batch, tokens, config.cross_attention_dim, generator=generator)
    return lambda unet: unet(sample, torch.tensor(500.0), encoder_hidden_states=text, return_dict=False)[0]


def seconds(call: Callable[[Any], Any], unet: Any) -> float:
    """This thread's CPU time of one call."""
    start = time.thread_time()
    call(unet)
    return time.thread_time() - start


@pytest.mark.parametrize("name", MODELS)
def test_first_call(name: str, benchmark: Any, results: Results) -> None:
    """The first call against the same of the plain UNet; then those of other sizes."""
    preset, narrow, size, rounds = MODELS[name]
    model = build(preset, "cpu", torch.float32, tiny=narrow)
    call = call_of(model, size)
    call(model.unet)
    wrapped: list[Any] = []

    def first() -> float:
        unet = model.twin()
        wrapped.append(ch.wrap(unet))
        return seconds(call, unet)

    first()
    plain, traced = zip(*((seconds(call, model.unet), first()) for _ in range(rounds)), strict=True)
    _row(results, "first call", name, plain, traced)
    cw = wrapped[-1]
    others = {
        "tokens": [{"tokens": 5 + 3 * k} for k in range(rounds)],
        "batch": [{"batch": 3 + k} for k in range(rounds if rounds > 2 else 1)],
        "resolution": [{"size": (size[0] + 8 * (k + 1), size[1])} for k in range(rounds if rounds > 2 else 1)],
    }
    before = len(cw._engine._recordings)
    for what, changes in others.items():
        pairs = []
        for change in changes:
            other = call_of(model, **{"size": size, **change})
            other(model.unet)  # the sizes are new to torch, too
            pairs.append((seconds(other, model.unet), seconds(other, cw.unet), seconds(other, model.unet)))
        _row(results, f"other {what}", name, [(one + two) / 2 for one, _, two in pairs], [pair[1] for pair in pairs])
    assert len(cw._engine._recordings) == before, "a call was recorded"
    benchmark.pedantic(call, (cw.unet,), rounds=1)


@pytest.mark.parametrize("name", ["demo", "sd15, a tenth as wide", "small SD"])
def test_collections(name: str, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """First calls, collections after them included: as they are, and with the collector left alone."""
    import diffusers  # noqa: F401  # half a million objects, which a full collection looks at
    import transformers  # noqa: F401

    preset, narrow, size, rounds = MODELS[name]
    model = build(preset, "cpu", torch.float32, tiny=narrow)
    call = call_of(model, size)

    def first() -> float:
        unet = model.twin()
        with ch.wrap(unet):
            start = time.thread_time()
            call(unet)
            _ = [[k] for k in range(2000)]  # what was put off comes now
            return time.thread_time() - start

    first()
    before, after = [], []
    for _ in range(max(rounds, 9)):
        with monkeypatch.context() as left_alone:
            left_alone.setattr(gc, "disable", lambda: None)
            before.append(first())
        after.append(first())
    results.add(
        "collections", model=name, left_alone_ms=1e3 * statistics.median(before), ms=1e3 * statistics.median(after),
        left_alone_worst_ms=1e3 * max(before), worst_ms=1e3 * max(after), rounds=len(before),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "sd15, a tenth as wide"])
def test_cold(name: str, results: Results) -> None:
    """The first call in a fresh interpreter, with its imports."""
    rows = []
    for _ in range(3):
        process = subprocess.run([sys.executable, "-c", COLD, name], capture_output=True, text=True, check=True)
        rows.append(json.loads(process.stdout.splitlines()[-1]))
    _row(results, "cold", name, [row["plain"] for row in rows], [row["first"] + row["wrapping"] for row in rows])


def test_soak(results: Results) -> None:
    """300 trajectories of 100 prompt lengths, in batches of two and three: memory is what it was after a hundred."""
    model = build("sd15", "cpu", torch.float32, tiny=True)
    unet = model.twin()
    resident = []
    with ch.wrap(unet) as cw:
        for k in range(300):
            text = torch.randn(2 + k % 2, 1 + k % 100, model.unet.config.cross_attention_dim)
            with cw.trajectory(steps=4):
                for t in (900.0, 600.0, 300.0, 100.0):
                    unet(torch.randn(len(text), 4, 8, 8), torch.tensor(t), encoder_hidden_states=text)
            if k % 100 == 99:
                gc.collect()
                resident.append(_resident())
        recorded, signatures = len(cw._engine._signatures._recorded), len(cw._engine._signatures)
    results.add(
        "soak", trajectories=300, prompt_lengths=100, mib_after_100=resident[0], mib_after_300=resident[-1],
        recorded=recorded, signatures=signatures, reasons=dict(cw.stats.reasons), adaptor=cw.stats.adaptor_passes,
    )  # fmt: skip
    assert resident[-1] < resident[0] + 8


def _resident() -> float:
    """MiB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _row(results: Results, table: str, name: str, plain: Any, other: Any) -> None:
    ms = [1e3 * statistics.median(values) for values in (plain, other)]
    extra = 1e3 * statistics.median(b - a for a, b in zip(plain, other, strict=True))
    ratio = statistics.median(b / a for a, b in zip(plain, other, strict=True))
    results.add(table, model=name, plain_ms=ms[0], ms=ms[1], extra_ms=extra, ratio=ratio, rounds=len(plain))

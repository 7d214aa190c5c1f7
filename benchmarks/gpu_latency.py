"""Latency of Clockwork, of the ideal and of the peers on a GPU, through a real scheduler loop.

    python benchmarks/gpu_latency.py --out DIR --minutes 8.5        on a GPU
    python benchmarks/gpu_latency.py --out DIR --tiny --device cpu  a rehearsal in miniature

One process does all of it, in order of importance, and writes DIR/gpu_latency.json after every row. Where a side
fails in a mode, the reason is a row too. `--resume FILE` leaves out what an earlier run has done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_checks
from benchmarks.harness import reason, say
from benchmarks.latency import PLAIN, Latency
from benchmarks.setting import Loop
from benchmarks.sides import Variant

OURS = [
    Variant("clockwork", clock, adaptor, cut)
    for clock, adaptor, cut in itertools.product((2, 3, 4), ("identity", "ResNet"), ("outer", "paper"))
]
WIDE = [Variant("clockwork", clock, "identity", "widest") for clock in (2, 3)]
IDEAL = [Variant("ideal", 2), Variant("ideal", 2, cut="paper"), Variant("ideal", 3), Variant("ideal", 4)]
DEEP = [Variant("DeepCache", interval) for interval in (2, 3)]
BY_HAND = [Variant("DeepCache, static by hand", interval) for interval in (2, 3)]
TOME, TOME_FIXED = Variant("tomesd"), Variant("tomesd, nothing random")
TWO, FOUR = Variant("clockwork", 2), Variant("clockwork", 4)
SHORT = [PLAIN, TWO, Variant("ideal", 2)]

Section = tuple[str, float, Callable[[], Any]]


def plan(run: Latency) -> list[Section]:
    """(name, seconds it needs at least, what it does), the most important first."""
    few, more = (2, 2) if run.tiny else (5, 12)
    compiled: dict[str, Any] = run.compile_options
    trajectories, passes = run.trajectories, run.passes

    def equal(mode: str, options: dict[str, Any], *dtypes: torch.dtype) -> None:
        for dtype in dtypes if run.device != "cpu" else (torch.float32,):
            gpu_checks.equality(run.results, run.device, mode, options, dtype)

    def checks() -> None:
        bench = run.bench("sd15")
        gpu_checks.model_equality(run.results, bench, Loop(bench.model, 2, 8), "cudagraphs")
        for mode in ("eager", "cudagraphs"):
            gpu_checks.waits(run.results, bench, Loop(bench.model, 2, 8), mode)

    half, single = torch.float16, torch.float32
    return [
        ("capture equals eager", 10, lambda: equal("cudagraphs", {"mode": "cudagraphs"}, single, half)),
        (
            "sd15 eager",
            20,
            lambda: trajectories(
                "sd15", 2, 8, "eager", [*SHORT, *DEEP, TOME, *WIDE, *IDEAL[1:], *OURS[1:]], rounds=few, limit=70
            ),
        ),
        (
            "sd15 cudagraphs",
            20,
            lambda: trajectories(
                "sd15",
                2,
                8,
                "cudagraphs",
                [*SHORT, *BY_HAND, TOME_FIXED, *WIDE, *IDEAL[1:], *OURS[1:], TOME, *DEEP[:1]],
                rounds=more,
                limit=55,
            ),
        ),
        ("sd15 passes cudagraphs", 15, lambda: passes("sd15", 2, "cudagraphs", rounds=more, limit=20)),
        ("sd15 passes eager", 20, lambda: passes("sd15", 2, "eager", rounds=few, limit=25)),
        ("sd15 checks", 10, checks),
        ("sd15 profile", 10, lambda: run.profile("sd15", 2, "cudagraphs")),
        (
            "sd15 50 steps",
            15,
            lambda: (
                trajectories("sd15", 2, 50, "eager", [PLAIN, TWO, *DEEP[1:]], rounds=2, limit=20),
                trajectories("sd15", 2, 50, "cudagraphs", [*SHORT, FOUR, *BY_HAND[1:]], rounds=few, limit=20),
            ),
        ),
        (
            "sdxl",
            40,
            lambda: (
                trajectories(
                    "sdxl",
                    2,
                    8,
                    "cudagraphs",
                    [
                        *SHORT,
                        Variant("clockwork", 2, "ResNet"),
                        Variant("clockwork", 4),
                        WIDE[0],
                        BY_HAND[0],
                        TOME_FIXED,
                    ],
                    rounds=few,
                    limit=40,
                ),
                trajectories("sdxl", 2, 8, "eager", [*SHORT, DEEP[0]], rounds=3, limit=20),
                trajectories("sdxl", 8, 8, "cudagraphs", SHORT[:2], rounds=3, limit=20),
                passes("sdxl", 2, "cudagraphs", rounds=3, limit=15),
            ),
        ),
        (
            "sd15 batch 8",
            20,
            lambda: (
                trajectories(
                    "sd15", 8, 8, "cudagraphs", [*SHORT, OURS[3], WIDE[0], BY_HAND[0], TOME_FIXED], rounds=few, limit=25
                ),
                trajectories("sd15", 8, 8, "eager", [*SHORT, DEEP[0]], rounds=3, limit=15),
            ),
        ),
        ("sd15 throughput", 20, lambda: run.throughput("sd15", (2, 8, 32), "cudagraphs", rounds=3)),
        ("sd15 choices", 15, lambda: run.choices("sd15", 2, "cudagraphs", rounds=few)),
        ("compiled equals eager", 40, lambda: equal("compile", compiled, half, single)),
        (
            "sd15 compile",
            60,
            lambda: trajectories(
                "sd15",
                2,
                8,
                "compile",
                [PLAIN, TWO, Variant("ideal", 2), *DEEP[:1]],
                rounds=more,
                limit=run.left() - 5,
            ),
        ),
    ]


def execute(run: Latency, sections: list[Section], done: dict[str, float]) -> None:
    """One section after the other; one that fails is a row, and the next one begins."""
    for name, least, act in sections:
        if name in done:
            continue
        if run.left() < least:
            run.results.add("failures", side=name, reason=f"only {run.left():.0f} s were left")
            continue
        say(f"== {name} ({run.left():.0f} s left)")
        start = time.monotonic()
        try:
            act()
        except Exception as error:
            run.results.add("failures", side=name, reason=reason(error))
        else:
            done[name] = round(time.monotonic() - start, 1)
        run.free()
        run.results.data["seconds"] = done
        run.results.write()


def _stop(*_: Any) -> None:
    raise TimeoutError("the time was up")


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for gpu_latency.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="wall-clock time, all in all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a tenth of the width: a rehearsal")
    parser.add_argument("--only", help="only the sections with this in their name")
    parser.add_argument("--resume", type=Path, help="an earlier gpu_latency.json of the same device")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    compiled: dict[str, Any] = {"backend": "aot_eager"} if options.tiny else {"mode": "reduce-overhead"}
    path = Path(options.out) / "gpu_latency.json"
    run = Latency(path, device=options.device, minutes=options.minutes, tiny=options.tiny, compile_options=compiled)
    done: dict[str, float] = {}
    if options.resume:
        run.take(json.loads(options.resume.read_text(encoding="utf-8")))
        done = dict(run.results.data.get("seconds", {}))
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, max(run.left(), 1))
    try:
        execute(run, [one for one in plan(run) if not options.only or options.only in one[0]], done)
    except TimeoutError as error:
        run.results.add("failures", side="the run", reason=reason(error))
    say(f"done: {run.results.path}")
    sys.stdout.flush()
    os._exit(0)  # compiler workers need not be waited for


if __name__ == "__main__":
    main()

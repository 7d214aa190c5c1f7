"""What `gpu_latency.py` measures, the most important first: nine minutes on a GPU whose compile cache is warm.

Sections are left out when time is short. The eager ones come before the others of the same model: MACs of plain, of
the ideal and of the peers are counted there. The compiled ones come last, so that a compile cache can be filled beside
the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_checks
from benchmarks.latency import PLAIN, Latency
from benchmarks.setting import Loop
from benchmarks.sides import Variant

__all__ = ["Section", "plan"]

OURS = [
    Variant("clockwork", clock, adaptor, cut)
    for clock, adaptor, cut in itertools.product((2, 3, 4), ("identity", "ResNet"), ("outer", "paper"))
]
TWO, PAPER, RESNET, RESNET_PAPER, *MORE = OURS
FOUR = Variant("clockwork", 4)
WIDE = [Variant("clockwork", clock, "identity", "widest") for clock in (2, 3)]
IDEAL, IDEAL_PAPER = Variant("ideal", 2), Variant("ideal", 2, cut="paper")
IDEALS = [IDEAL_PAPER, *(Variant("ideal", clock, cut=cut) for clock in (3, 4) for cut in ("outer", "paper"))]
DEEP = [Variant("DeepCache", interval) for interval in (2, 3)]
BY_HAND = [Variant("DeepCache, static by hand", interval) for interval in (2, 3)]
TOME, TOME_FIXED = Variant("tomesd"), Variant("tomesd, nothing random")
SHORT = [PLAIN, TWO, IDEAL]

Section = tuple[str, float, Callable[[], Any]]


def plan(run: Latency) -> list[Section]:
    """(name, seconds it needs at least, what it does)."""
    few, more = (2, 2) if run.tiny else (5, 12)

    def rows(model: str, batch: int, steps: int, mode: str, variants: list[Variant], rounds: int, limit: float) -> None:
        run.trajectories(model, batch, steps, mode, variants, rounds=rounds, limit=limit)

    def passes(model: str, mode: str, rounds: int, limit: float) -> None:
        run.passes(model, 2, mode, rounds=rounds, limit=limit)

    def equal(mode: str, options: dict[str, Any]) -> None:
        for dtype in (torch.float16, torch.float32) if run.device != "cpu" else (torch.float32,):
            gpu_checks.equality(run.results, run.device, mode, options, dtype)

    def checks() -> None:
        bench = run.bench("sd15")
        gpu_checks.model_equality(run.results, bench, Loop(bench.model, 2, 8), "cudagraphs")
        for mode in ("eager", "cudagraphs"):
            gpu_checks.waits(run.results, bench, Loop(bench.model, 2, 8), mode)

    def sd15_50() -> None:
        rows("sd15", 2, 50, "eager", [PLAIN, TWO], 2, 12)
        rows("sd15", 2, 50, "cudagraphs", [*SHORT, FOUR, WIDE[1], BY_HAND[1]], few, 20)

    def sdxl() -> None:
        rows("sdxl", 2, 8, "eager", [*SHORT, DEEP[0], TOME], 3, 25)
        captured = [*SHORT, WIDE[0], BY_HAND[0], RESNET, FOUR, TOME_FIXED]
        rows("sdxl", 2, 8, "cudagraphs", captured, more, 35)
        rows("sdxl", 8, 8, "cudagraphs", SHORT, 3, 15)

    def sd15_8() -> None:
        captured = [*SHORT, WIDE[0], BY_HAND[0], RESNET_PAPER, TOME_FIXED]
        rows("sd15", 8, 8, "eager", [*SHORT, DEEP[0]], 3, 12)
        rows("sd15", 8, 8, "cudagraphs", captured, few, 20)

    eager = [*SHORT, *DEEP, *WIDE, IDEAL_PAPER, PAPER, RESNET, FOUR, TOME]
    captured = [*SHORT, *WIDE, *BY_HAND, TOME_FIXED, *IDEALS, *OURS[1:], TOME, DEEP[0]]
    compiled = [*SHORT, RESNET, WIDE[0], BY_HAND[0], DEEP[0], TOME_FIXED, FOUR]
    if run.tiny:  # a rehearsal need not compile for long
        compiled = [PLAIN, TWO, BY_HAND[0], DEEP[0]]
    sections = [
        ("capture equals eager", 10, lambda: equal("cudagraphs", {"mode": "cudagraphs"})),
        ("sd15 eager", 20, lambda: rows("sd15", 2, 8, "eager", eager, 7, 45)),
        ("sd15 cudagraphs", 20, lambda: rows("sd15", 2, 8, "cudagraphs", captured, more, 45)),
        ("sd15 passes cudagraphs", 15, lambda: passes("sd15", "cudagraphs", more, 25)),
        ("sdxl", 40, sdxl),
        ("sdxl passes cudagraphs", 12, lambda: passes("sdxl", "cudagraphs", few, 20)),
        ("sd15 50 steps", 15, sd15_50),
        ("sd15 batch 8", 15, sd15_8),
        ("sd15 checks", 8, checks),
        ("sd15 passes eager", 20, lambda: passes("sd15", "eager", few, 20)),
        ("sd15 choices", 10, lambda: run.choices("sd15", 2, "cudagraphs", rounds=few)),
        ("sd15 throughput", 15, lambda: run.throughput("sd15", (2, 8, 32), "cudagraphs", rounds=3)),
        ("sd15 profile", 4, lambda: run.profile("sd15", 2, "cudagraphs")),
        ("sd15 compile", 30, lambda: rows("sd15", 2, 8, "compile", compiled, more, run.left() - 110)),
        ("sd15 passes compile", 30, lambda: passes("sd15", "compile", more, run.left() - 70)),
        ("compiled equals eager", 15, lambda: equal("compile", run.compile_options)),
        ("sdxl compile", 45, lambda: rows("sdxl", 2, 8, "compile", [*SHORT, RESNET], few, run.left() - 10)),
    ]
    return [one for one in sections if not run.tiny or one[0] not in ("sd15 passes compile", "sdxl compile")]

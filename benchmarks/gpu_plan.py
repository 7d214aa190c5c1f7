"""What `gpu_latency.py` measures, the most important first: eight minutes on a GPU whose compile cache is warm.

Sections are left out when time is short, and `--resume` makes up for them. The eager ones come before the others of the
same model: MACs of plain, of the ideal and of the peers are counted there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import clockwork_hooks as ch
from benchmarks import gpu_checks
from benchmarks.latency import PLAIN, Group, Latency
from benchmarks.setting import Loop
from benchmarks.sides import Variant, clockwork_options

__all__ = ["Section", "plan"]

OURS = [
    Variant("clockwork", clock, adaptor, cut)
    for clock, adaptor, cut in itertools.product((2, 3, 4), ("identity", "ResNet"), ("outer", "paper"))
]
TWO, RESNET = Variant("clockwork", 2), Variant("clockwork", 2, "ResNet")
THREE, FOUR = Variant("clockwork", 3), Variant("clockwork", 4)
WIDE = [Variant("clockwork", clock, "identity", "widest") for clock in (2, 3)]
IDEAL, IDEAL_PAPER = Variant("ideal", 2), Variant("ideal", 2, cut="paper")
IDEALS = [IDEAL_PAPER, *(Variant("ideal", clock, cut=cut) for clock in (3, 4) for cut in ("outer", "paper"))]
DEEP = [Variant("DeepCache", interval) for interval in (2, 3)]
BY_HAND = [Variant("DeepCache, static by hand", interval) for interval in (2, 3)]
TOME, TOME_FIXED = Variant("tomesd"), Variant("tomesd, nothing random")
SHORT = [PLAIN, TWO, IDEAL]


def planned(adaptor: str) -> Variant:
    """The planned schedule, in the widest region."""
    return Variant("clockwork", adaptor=adaptor, cut="widest", planned=True)


BEST = [planned("exit+entry"), planned("affine")]  # at 8 steps, as docs/calibration.md has it
LONG = [planned("exit+entry+before+trend"), planned("affine+trend")]  # at 50
MORE = [planned("identity"), planned("exit+entry+before")]
FEWER = {8: [Variant(steps=4), Variant(steps=5)], 50: [Variant(steps=16)]}
SOLVED = [Variant("clockwork", 2, kind, cut) for cut in ("outer", "widest") for kind in ("affine", "exit+entry")]

Section = tuple[str, float, Callable[[], Any]]


def plan(run: Latency) -> list[Section]:
    """(name, seconds it needs at least, what it does)."""
    few, more = (1, 1) if run.tiny else (5, 12)

    def group(steps: int, variants: Sequence[Variant], rounds: int, limit: float) -> Group:
        return Group(steps, variants, min(rounds, more), 9 * limit if run.tiny else limit)  # a CPU is slow, and busy

    def passes(model: str, mode: str, rounds: int, limit: float) -> None:
        run.passes(model, 2, mode, rounds=rounds, limit=9 * limit if run.tiny else limit)

    def equal(mode: str, options: dict[str, Any]) -> None:
        if run.device != "cpu":
            gpu_checks.equality(run.results, run.device, mode, options, torch.float16)
        for way in gpu_checks.WAYS:
            gpu_checks.equality(run.results, run.device, mode, options, torch.float32, way)

    def checks() -> None:
        bench = run.bench("sd15")
        for variant in (TWO, LONG[0]):
            gpu_checks.model_equality(run.results, bench, Loop(bench.model, 2, 8), "cudagraphs", variant)
        for mode in ("eager", "cudagraphs"):
            gpu_checks.waits(run.results, bench, Loop(bench.model, 2, 8), mode)

    def calibrate(model: str, schedule: ch.Schedule) -> None:
        prompts, images, steps = (8, 4, 6) if run.tiny else (64, 8, 20)
        run.calibrate(model, schedule, prompts=prompts, images=images, steps=steps)

    def sd15_eager() -> None:
        sides = [PLAIN, TWO, *BEST, *WIDE, *DEEP, IDEAL, *FEWER[8], TOME, MORE[0], RESNET]
        run.trajectories("sd15", 2, "eager", [group(8, sides, few, 28), group(50, [PLAIN, LONG[0]], 3, 14)])

    def sd15_captured() -> None:
        sides = [PLAIN, *BEST, *WIDE, *BY_HAND, *SHORT[1:], *MORE, *FEWER[8], *SOLVED, THREE, RESNET]
        longer = [PLAIN, *LONG, *BY_HAND, *WIDE, *FEWER[50], MORE[0], TWO, IDEAL]
        run.trajectories("sd15", 2, "cudagraphs", [group(8, sides, more, 40), group(50, longer, few, 34)])

    def sd15_compiled() -> None:
        torchs = [replace(one, torchs=True) for one in (BEST[1], TWO)]
        sides = [PLAIN, *FEWER[8], *BEST, TWO, BY_HAND[0], MORE[0], IDEAL, WIDE[0], *torchs, RESNET]
        longer = [PLAIN, *FEWER[50], *LONG, TWO, BY_HAND[0], WIDE[0]]
        if run.tiny:  # a rehearsal need not compile for long
            sides, longer = [PLAIN, BEST[0], BY_HAND[0], DEEP[0], FEWER[8][0]], [PLAIN, *FEWER[50]]
        run.trajectories("sd15", 2, "compile", [group(8, sides, more, 150), group(50, longer, few, 90)])

    def sdxl_captured() -> None:
        run.trajectories("sdxl", 2, "eager", [group(8, [PLAIN, BEST[0], DEEP[0], TWO], 3, 16)])
        sides = [PLAIN, *BEST, *WIDE, BY_HAND[0], *FEWER[8], *SHORT[1:], *MORE, *SOLVED[2:], RESNET]
        run.trajectories("sdxl", 2, "cudagraphs", [group(8, sides, few, 34)])

    def sdxl_compiled() -> None:
        sides = [PLAIN, *FEWER[8], *BEST, TWO, BY_HAND[0]]
        if run.tiny:
            sides = [PLAIN, BEST[0]]
        run.trajectories("sdxl", 2, "compile", [group(8, sides, few, 240)])

    def sdxl_longer(mode: str) -> None:
        sides = [PLAIN, *LONG, *FEWER[50], BY_HAND[0], WIDE[0]]
        run.trajectories("sdxl", 2, mode, [group(50, sides[: 4 if run.tiny or mode == "compile" else None], 3, 60)])

    def batch_8() -> None:
        sides = [PLAIN, BEST[0], WIDE[0], BY_HAND[0], TWO, IDEAL]
        run.trajectories("sd15", 8, "cudagraphs", [group(8, sides, few, 20)])
        run.trajectories("sdxl", 8, "cudagraphs", [group(8, [PLAIN, BEST[0], TWO], 3, 20)])

    def rest() -> None:
        sides = [PLAIN, IDEAL, *OURS, *IDEALS, TOME_FIXED, TOME, DEEP[0]]
        run.trajectories("sd15", 2, "cudagraphs", [group(8, sides, few, 40)])

    clock, spread = ch.Schedule.every(2), ch.Schedule.spread(2)
    sections: list[Section] = [
        ("sd15 eager", 15, sd15_eager),
        ("sd15 captured", 20, sd15_captured),
        ("sd15 compiled", 30, sd15_compiled),
        ("sdxl captured", 25, sdxl_captured),
        ("sdxl calibrate, clock", 75, lambda: calibrate("sdxl", clock)),
        ("sdxl compiled", 45, sdxl_compiled),
        ("sd15 calibrate, clock", 15, lambda: calibrate("sd15", clock)),
        ("sd15 passes captured", 12, lambda: passes("sd15", "cudagraphs", more, 60)),
        ("sd15 passes eager", 10, lambda: passes("sd15", "eager", few, 24)),
        ("checks captured", 12, lambda: (equal("cudagraphs", {"mode": "cudagraphs"}), checks())),
        ("sdxl passes captured", 12, lambda: passes("sdxl", "cudagraphs", few, 75)),
        ("sdxl 50 captured", 15, lambda: sdxl_longer("cudagraphs")),
        ("checks compiled", 10, lambda: equal("compile", clockwork_options(run.compile_options))),
        ("sd15 passes compiled", 40, lambda: passes("sd15", "compile", more, 150)),
        ("sdxl passes compiled", 60, lambda: passes("sdxl", "compile", few, 200)),
        ("batch 8 captured", 15, batch_8),
        ("sdxl 50 compiled", 40, lambda: sdxl_longer("compile")),
        ("sd15 calibrate, spread", 30, lambda: calibrate("sd15", spread)),
        ("sdxl calibrate, spread", 130, lambda: calibrate("sdxl", spread)),
        ("sd15 choices", 8, lambda: run.choices("sd15", 2, "cudagraphs", rounds=few)),
        ("sd15 throughput", 15, lambda: run.throughput("sd15", (2, 8, 32), "cudagraphs", rounds=3)),
        ("sd15 profile", 4, lambda: run.profile("sd15", 2, "cudagraphs")),
        ("sd15 rest", 20, rest),
    ]
    slow = ("sd15 passes compiled", "sdxl passes compiled", "sdxl 50 compiled")  # in a rehearsal, on a CPU
    return [one for one in sections if not run.tiny or one[0] not in slow]

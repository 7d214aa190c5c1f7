"""Which steps shall be full? A search for a number of full steps, by what it does to the pictures.

    python -m benchmarks.spacing --steps 20 --full 1 2 4 6 9 12 15 18 20 --seconds 60 --out DIR

Adaptors are calibrated on training captions and tried on others of them, so no held-out caption is seen. A full step is
moved by one to three places; a move stays if the pictures come nearer to the plain ones (relative L2 distance). The
first two steps are full always. In miniature, on a CPU: `--captions 4 --seconds 60`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import clockwork_hooks as ch
from benchmarks.calibration import FREE, Judge, Row
from benchmarks.fidelity_plan import Sampler
from benchmarks.harness import environment, say

_NOISE = 5_000_000  # seed: none of those that are calibrated or judged on


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of spacing.json")
    parser.add_argument("--steps", type=int, default=20, help="of DPM++")
    parser.add_argument("--full", type=int, nargs="+", required=True, help="full steps to begin with")
    parser.add_argument("--kind", default=FREE, help="of adaptor")
    parser.add_argument("--captions", type=int, default=256, help="to calibrate on, and as many to try them on")
    parser.add_argument("--seconds", type=float, default=60, help="begin no trial after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    dtype = torch.float16 if options.device.startswith("cuda") else torch.float32
    judge = Judge.make(options.device, dtype, 8, options.captions, 1, 2 * options.captions)
    trials = Trials(judge, options.steps, options.kind, options.captions)
    until = time.monotonic() + options.seconds
    best = tuple(sorted(set(options.full) | {1, 2}))
    error = trials(best)
    better = True
    while better and time.monotonic() < until:
        better = False
        for moved in moves(best, options.steps):
            if time.monotonic() >= until:
                break
            if moved not in trials.errors and trials(moved) < error:
                best, error, better = moved, trials.errors[moved], True
                say(f"{error:.4f} after {len(trials.errors)} trials: {' '.join(map(str, best))}")
                break
    path = options.out / f"spacing-{options.steps}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = [{"full": full, "relative L2": value} for full, value in trials.errors.items()]
    facts = {**environment(options.device, 0), "kind": options.kind, "captions": options.captions}
    path.write_text(
        json.dumps({"environment": facts, "best": best, "trials": tried}, indent=1) + "\n", encoding="utf-8"
    )
    say(f"{len(tried)} trials; best {' '.join(map(str, best))}: {error:.4f}")
    return 0


class Trials:
    """Full steps → relative L2 distance of the pictures to the plain ones; each is tried once."""

    def __init__(self, judge: Judge, steps: int, kind: str, captions: int) -> None:
        self.judge, self.steps, self.kind, self.captions = judge, steps, kind, captions
        self.sampler, self.errors = Sampler(steps=steps), dict[tuple[int, ...], float]()
        self.shown = judge.captions[captions : 2 * captions]
        self.plain = self._sample()

    def _sample(self) -> torch.Tensor:
        with torch.no_grad():
            return self.judge.bench.sample(self.shown, _NOISE, self.sampler).float()

    def __call__(self, full: tuple[int, ...]) -> float:
        """Calibrate an adaptor for these full steps, and sample with it."""
        at = tuple(step for step in range(1, self.steps + 1) if step not in full)
        row = Row("", self.kind, "widest", at, captions=self.captions)
        adaptor, _ = self.judge.adaptor(self.sampler, row)
        options = {"schedule": ch.Schedule.at(at), "region": self.judge.region("widest")}
        with ch.wrap(self.judge.bench.model.unet, adaptor, **options):
            difference = self._sample() - self.plain
        self.errors[full] = float(difference.norm() / self.plain.norm())
        return self.errors[full]


def moves(full: tuple[int, ...], steps: int) -> Iterator[tuple[int, ...]]:
    """One full step after the second elsewhere, no more than three places away."""
    for far in (1, 2, 3):
        for step in full[2:]:
            for there in (step - far, step + far):
                if 2 < there <= steps and there not in full:
                    yield tuple(sorted({*full, there} - {step}))


if __name__ == "__main__":
    raise SystemExit(main())

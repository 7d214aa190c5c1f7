"""Calibrated adaptors on the demo model, by the judges of fidelity.py: rows chosen on some captions, judged on others.

    python -m benchmarks.calibration run --out DIR --minutes 9     # again and again until it says that all is there
    python -m benchmarks.calibration table DIR/calibration.json    # as Markdown

Every row is written as soon as it is there, the most important ones first; what is in DIR/calibration.json, or in the
file that `--resume` names, is not measured again. Each row is measured on two sets of held-out captions of the same
size: on the one called "choose" with one seed, on the one called "judge" with all seeds. Calibration uses training
captions alone. In miniature, on a CPU: `--captions 8 --seeds 1 --match "main-8/plain|main-8/.*3 5 7"`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from benchmarks.fidelity_bench import Bench, Judged
from benchmarks.fidelity_plan import Sampler
from benchmarks.harness import environment, say, student
from clockwork_hooks._numbers import percent
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.flops import counting
from clockwork_hooks.demo.evaluate import held_out_prompts, reference_statistics
from clockwork_hooks.demo.model import GUIDANCE, load_demo
from clockwork_hooks.demo.recipe import Recipe
from clockwork_hooks.metrics import Frechet, Paired
from clockwork_hooks.reports.tables import table

IDENTITY, AFFINE, EXIT, ENTRY, BEFORE = "identity", "affine", "exit", "exit+entry", "exit+entry+before"
FREE, TREND = "affine+trend", "exit+entry+before+trend"
_SEED = 1_000_000  # of the noise that adaptors are calibrated on: none of the judged ones


@dataclass(frozen=True, slots=True)
class Row:
    """One way of sampling.

    Attributes:
        label: within its group.
        kind: of adaptor; None for plain, "deepcache" for the peer.
        region: "default" or "widest".
        at: the adaptor steps.
        taken: steps of the sampler, where they are not the group's; an adaptor is calibrated with as many.
        captions: that the adaptor is calibrated on.
        calibrated_at: steps of the sampler that it is calibrated with, where they are not the group's: all of them.
        refit: fitted again on what the student reaches.
        branch, interval: of DeepCache.
    """

    label: str
    kind: str | None = None
    region: str = "widest"
    at: tuple[int, ...] = ()
    taken: int | None = None
    captions: int = 512
    calibrated_at: int | None = None
    refit: bool = True
    branch: int = 0
    interval: int = 2


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with one sampler, judged against its plain pictures."""

    name: str
    sampler: Sampler
    rows: tuple[Row, ...]


_SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler", "unipc": "UniPC", "pndm": "PNDM"}


def called(group: Group) -> str:
    """The sampler of a group in words."""
    sampler = group.sampler
    usual = "" if sampler.guidance == GUIDANCE else f", guidance {sampler.guidance:g}"
    return f"{_SAMPLERS[sampler.scheduler]}, {sampler.steps} steps{usual}"


# -- the plan --------------------------------------------------------------------------------------------------------


def every(steps: int, clock: int, first: int = 1, last: int = 0) -> tuple[int, ...]:
    """Adaptor steps of a clock that begins to tick at the last of the first full steps."""
    return tuple(s for s in range(first + 1, steps + 1 - last) if (s - first) % clock)


def fewer(*steps: int) -> list[Row]:
    """The plain sampler with fewer steps."""
    return [Row(f"plain, {count} steps", taken=count) for count in steps]


def deepcache(*pairs: tuple[int, int], taken: int | None = None) -> list[Row]:
    """(branch, interval) of the peer; it may take more steps too."""
    name = "DeepCache" if taken is None else f"DeepCache, {taken} steps"
    return [Row(f"{name}, branch {b}, interval {n}", "deepcache", taken=taken, branch=b, interval=n) for b, n in pairs]


def kinds(region: str, at: tuple[int, ...], *names: str, what: str = "", **more: Any) -> list[Row]:
    """One schedule with several kinds."""
    steps = what or " ".join(map(str, at))
    return [Row(f"{name}, {region}, {steps}", name, region, at, **more) for name in names]


def other_steps(steps: int, full: Sequence[int], *names: str, region: str = "widest") -> list[Row]:
    """The sampler with another number of steps, of which these are full: the best for its MACs, not for its steps."""
    at = tuple(step for step in range(1, steps + 1) if step not in full)
    return kinds(region, at, *names, what=f"{steps} steps, full {' '.join(map(str, full))}", taken=steps)


ALL = (IDENTITY, AFFINE, ENTRY, BEFORE)
CLOCK2, BOTH, INNER, OTHER = every(8, 2), (3, 4, 6, 7), (3, 5, 7), (3, 5, 6, 8)


def _main() -> Group:
    rows = [*kinds("widest", BOTH, *ALL), *kinds("default", CLOCK2, *ALL), *fewer(5, 4, 6, 7, 3)]
    rows += [*kinds("widest", OTHER, *ALL), *kinds("widest", INNER, *ALL)]
    rows += [*deepcache((0, 2), (1, 2), (0, 3)), *kinds("default", BOTH, *ALL), *kinds("default", INNER, *ALL)]
    for count in (16, 64):
        for region, at, kind in (("widest", BOTH, BEFORE), ("widest", BOTH, AFFINE), ("default", CLOCK2, BEFORE)):
            what = f"{' '.join(map(str, at))}, {count} captions"
            rows += kinds(region, at, kind, what=what, captions=count)
    rows += kinds("widest", BOTH, BEFORE, "auto", what="3 4 6 7, not fitted again", refit=False)
    rows += [*kinds("widest", BOTH, FREE, TREND), *kinds("widest", INNER, FREE, TREND)]
    rows += [*kinds("default", BOTH, FREE, TREND), *kinds("widest", OTHER, FREE, TREND)]
    rows += [*kinds("default", CLOCK2, FREE, TREND)]
    rows += [*kinds("widest", BOTH, EXIT), *kinds("widest", CLOCK2, *ALL), *kinds("default", OTHER, *ALL)]
    for at in ((3, 4, 6, 7, 8), (3, 4, 5, 7, 8)):
        rows += [*kinds("widest", at, BEFORE, TREND, ENTRY), *kinds("default", at, BEFORE)]
    for steps, clock in ((16, 4), (16, 3), (12, 3), (20, 5), (12, 2), (10, 3), (20, 4)):
        rows += other_steps(steps, early(steps, clock), TREND)
    rows += other_steps(12, (1, 2, 3, 8), BEFORE, TREND)  # what `ch.tune(saving=0.6)` finds
    rows += other_steps(10, (1, 2, 3, 7), BEFORE)
    rows += [*deepcache((0, 3), taken=12), *deepcache((0, 2), taken=12), *deepcache((0, 3), taken=16)]
    return Group("main-8", Sampler(), tuple(rows))


def early(steps: int, clock: int) -> tuple[int, ...]:
    """Full steps of `Schedule.early`."""
    at = ch.Schedule.early(clock).adaptor_steps(steps)
    return tuple(step for step in range(1, steps + 1) if step not in at)


def _guided() -> Group:
    """Guidance 4, where the plain sampler is better with 5 steps than with 8."""
    group = _other("guidance-4", Sampler(guidance=4.0))
    rows = [*group.rows, *fewer(6, 3)]
    for steps, full in (
        (5, (1, 2, 4, 5)),
        (5, (1, 2, 4)),
        (6, (1, 2, 4, 6)),
        (6, (1, 2, 3, 5)),
        (6, (1, 3, 5)),
        (5, (1, 3, 5)),
    ):
        rows += other_steps(steps, full, BEFORE, AFFINE)
    rows += other_steps(5, (1, 2, 4, 5), TREND, FREE)
    for steps, full in (
        (6, (1, 3, 5)),
        (5, (1, 3, 5)),
        (7, (1, 3, 5, 7)),
        (6, (1, 3, 5, 6)),
        (5, (1, 3, 4, 5)),
        (7, (1, 3, 5)),
    ):
        rows += other_steps(steps, full, BEFORE, region="default")
    rows += other_steps(5, (1, 3, 4, 5), BEFORE, AFFINE)
    for steps, full in (
        (6, (1, 3, 4, 5, 6)),
        (5, (1, 2, 3, 5)),
        (5, (1, 2, 3, 4)),
        (5, (1, 2, 4, 5)),
        (6, (1, 2, 4, 5, 6)),
        (6, (1, 2, 3, 4, 6)),
    ):
        rows += other_steps(steps, full, BEFORE, region="default")
    for full in ((1, 2, 3, 5), (1, 2, 3, 4)):
        rows += other_steps(5, full, BEFORE)
    rows += other_steps(5, (1, 2, 3, 5), TREND, ENTRY)
    for full in ((1, 2, 3, 5, 6), (1, 2, 4, 5, 6), (1, 2, 3, 4, 6)):
        rows += other_steps(6, full, BEFORE)
    rows += other_steps(6, (1, 2, 3, 5, 6), BEFORE, region="default")
    rows += [*other_steps(6, (1, 2, 3, 4, 6), ENTRY, TREND), *other_steps(5, (1, 2, 3, 5), EXIT)]
    for steps, full in ((5, (1, 3)), (6, (1, 3)), (6, (1, 4)), (4, (1, 3))):
        rows += other_steps(steps, full, BEFORE)
    return dataclasses.replace(group, rows=tuple(rows))


def _long(
    steps: int,
    spaced: Sequence[tuple[int, int, int]],
    names: Sequence[str],
    *more: Row,
    spaced_by_hand: Mapping[str, Sequence[int]] = {},
) -> Group:
    """Rows of clocks (clock, full steps first, full steps last), and of full steps that are named."""
    rows = []
    for clock, first, last in spaced:
        what = f"clock {clock}, first {first} and last {last} full"
        rows += kinds("widest", every(steps, clock, first, last), *names, what=what)
    for what, full in spaced_by_hand.items():
        at = tuple(step for step in range(1, steps + 1) if step not in full)
        rows += kinds("widest", at, FREE, TREND, what=f"{len(full)} full steps, {what}")
    return Group(f"main-{steps}", Sampler(steps=steps), (*rows, *more))


def _transfer(steps: int) -> list[Row]:
    """Calibrated at all of 8 steps, and of as many as are taken."""
    at = every(steps, 2, 2, 1)
    rows = []
    for source in (8, steps):
        what = f"clock 2, first 2 and last 1 full, calibrated with {source} steps"
        rows += kinds("widest", at, AFFINE, BEFORE, FREE, TREND, what=what, calibrated_at=source)
    return rows


def _other(name: str, sampler: Sampler) -> Group:
    if sampler.steps == 8:
        rows = [*kinds("widest", BOTH, IDENTITY, AFFINE, BEFORE, TREND), *kinds("default", CLOCK2, IDENTITY, BEFORE)]
        return Group(name, sampler, (*rows, *fewer(5, 4), *deepcache((0, 2))))
    spaced = {
        name: tuple(s for s in range(1, sampler.steps + 1) if s not in EARLY_20[name])
        for name in ("early(2)", "searched for")
    }
    rows = kinds("widest", spaced["early(2)"], TREND, what="10 full steps, early(2)")
    rows += [*kinds("widest", spaced["searched for"], TREND, FREE, what="9 full steps, searched for"), *fewer(10)]
    rows += kinds("widest", every(sampler.steps, 2, 2, 1), IDENTITY, what="clock 2, first 2 and last 1 full")
    return Group(name, sampler, (*rows, *deepcache((0, 2))))


SHORT = ((6, (1, 3)), (5, (1, 3)), (6, (1, 2)), (8, (1, 3)), (5, (1, 2)), (8, (1, 4)))
EARLY_20 = {
    "denser early": (1, 2, 4, 6, 9, 12, 15, 18, 20),
    "denser late": (1, 2, 5, 8, 11, 14, 16, 18, 20),
    "searched for": (1, 2, 3, 4, 6, 9, 14, 18, 20),  # by benchmarks/spacing.py, on training captions
    "early(2)": (1, 2, 3, 4, 5, 7, 9, 12, 16, 20),
}
EARLY_16 = {"early(2)": (1, 2, 3, 4, 6, 9, 12, 16)}
EARLY_50 = {
    "denser early": (1, 2, 3, 6, 10, 14, 18, 22, 27, 32, 37, 42, 46, 50),
    "searched for": (1, 2, 3, 5, 7, 13, 18, 22, 27, 32, 37, 42, 46, 50),  # likewise, 23 trials
    "spaced as at 20 steps": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 36, 44, 50),
    "early(4)": (1, 2, 3, 4, 6, 10, 13, 18, 23, 29, 35, 42, 50),
    "early(5)": (1, 2, 3, 6, 11, 16, 23, 31, 40, 50),
    "early(6)": (1, 2, 4, 8, 13, 20, 29, 39, 50),
    "early(7)": (1, 2, 5, 10, 17, 26, 37, 50),
}

GROUPS: tuple[Group, ...] = (
    _main(),
    _long(20, ((3, 2, 1), (2, 2, 1), (4, 2, 1)), (IDENTITY, AFFINE, BEFORE, FREE, TREND),
          *fewer(10, 9, 12, 8), *deepcache((0, 2), (0, 3)), *_transfer(20), spaced_by_hand=EARLY_20),
    _long(50, ((5, 3, 1), (4, 2, 1)), (AFFINE, IDENTITY, BEFORE, FREE, TREND),
          *fewer(19, 16, 13, 12, 11), *deepcache((0, 3), (0, 5)), spaced_by_hand=EARLY_50),
    _guided(),
    *(_other(f"{name}-8", Sampler(name)) for name in ("ddim", "euler", "unipc", "pndm")),
    _long(16, ((2, 2, 1),), (TREND, IDENTITY, AFFINE, BEFORE, FREE), *fewer(8, 9), spaced_by_hand=EARLY_16),
    Group("main-4", Sampler(steps=4), (*kinds("widest", (3,), IDENTITY, AFFINE, BEFORE, FREE, TREND), *fewer(3),
                                       *kinds("default", (2, 4), IDENTITY, BEFORE),
                                       *kinds("widest", (3, 4), AFFINE, ENTRY, BEFORE, FREE, TREND),
                                       *kinds("widest", (2, 4), AFFINE, ENTRY, BEFORE),
                                       *kinds("default", (3, 4), AFFINE, ENTRY, BEFORE),
                                       *(row for steps, full in SHORT for row in other_steps(steps, full, BEFORE)),
                                       *other_steps(6, (1, 3), TREND, ENTRY), *other_steps(12, early(12, 4), TREND))),
    *(_other(f"{name}-20", Sampler(name, 20)) for name in ("ddim", "euler", "unipc", "pndm")),
)  # fmt: skip


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Measures rows of one group after the other; plain pictures are kept for the group that is under way.

    Attributes:
        bench: the demo model, and what it is judged by; its batches are those of "judge", then those of "choose".
        seeds: of "judge".
        captions: that adaptors are calibrated on.
    """

    bench: Bench
    seeds: int
    captions: Sequence[str]
    _plain: dict[tuple[Sampler, str, int], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, captions: int, batch: int, seeds: int, most: int) -> Judge:
        """Load the model and draw captions: so many for each set; `most` to calibrate on."""
        model = load_demo(device, dtype)
        prompts = held_out_prompts(2 * captions)
        batches = tuple(tuple(prompts[at : at + batch]) for at in range(0, len(prompts), batch))
        reference = reference_statistics(model, 8192 if captions > 1024 else max(captions, 64))
        metrics = (Frechet(model.classifier.features, reference), Judged(model.classifier), Paired())
        training = Recipe.of(captions=most, seed=11).captions
        return cls(Bench(model, batches, tuple(range(seeds)), metrics), seeds, training)

    def runs(self, part: str) -> list[tuple[tuple[str, ...], int, int]]:
        """(captions, seed of the noise, seed of the evaluation) of the batches of "judge" or "choose"."""
        half = len(self.bench.batches) // 2
        batches = self.bench.batches[:half] if part == "judge" else self.bench.batches[half:]
        seeds = range(self.seeds) if part == "judge" else range(1)
        return [(batch, seed * half + k, seed) for seed in seeds for k, batch in enumerate(batches)]

    def plain(self, sampler: Sampler, part: str) -> list[Tensor]:
        """The group's plain pictures, on the device."""
        if any(key[0] != sampler for key in self._plain):
            self._plain.clear()
        key = (sampler, part, self.seeds)
        if key not in self._plain:
            runs = self.runs(part)
            self._plain[key] = [self.bench.sample(batch, seed, sampler) for batch, seed, _ in runs]
        return self._plain[key]

    def region(self, name: str) -> ch.Region:
        """The default region, or the widest one."""
        group = SimpleNamespace(region="outer" if name == "default" else 0)
        return self.bench.region(group)  # type: ignore[arg-type]  # all that it reads

    def measure(self, group: Group, row: Row) -> dict[str, Any]:
        """All there is to say about a row."""
        adaptor, told = self.adaptor(group.sampler, row)
        scores: dict[str, Any] = {}
        for part in ("choose", "judge"):
            scores[part], costs = self.scores(group.sampler, row, adaptor, part)
        return {**_plain(row), **told, **costs, "scores": scores, "sampler": _plain(group.sampler)}

    def adaptor(self, sampler: Sampler, row: Row) -> tuple[Any, dict[str, Any]]:
        """The calibrated adaptor of a row, and what its calibration says."""
        if row.kind in (None, IDENTITY, "deepcache"):
            return row.kind, {}
        model, steps = self.bench.model, row.calibrated_at or row.taken or sampler.steps
        batches, noises = [], iter(range(_SEED, 2 * _SEED))
        for at in range(0, min(row.captions, len(self.captions)), 256):
            batches.append(self.captions[at : min(at + 256, row.captions)])

        def generate(batch: Sequence[str]) -> Tensor:
            noise, hidden = model.noise(len(batch), next(noises)), model.encode_prompts(batch)
            options: dict[str, Any] = {"guidance": sampler.guidance, "scheduler": sampler.scheduler}
            return model.denoise(noise, hidden, steps=steps, **options)

        schedule = None if row.calibrated_at else ch.Schedule.at(row.at)
        options: dict[str, Any] = {"kind": row.kind, "refit": row.refit, "log_snr": model.scheduler(sampler.scheduler)}
        if steps > 20:  # several batches of a long sampler say more than enough
            batches = batches[:1]
        self._wait()
        adaptor = calibrate(
            model.unet, generate, batches, guidance=sampler.guidance, schedule=schedule,
            region=self.region(row.region), **options,
        )  # fmt: skip
        return adaptor, {"calibration": adaptor.report.to_dict()}

    @torch.no_grad()
    def scores(self, sampler: Sampler, row: Row, adaptor: Any, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Name of a score → one value a seed; and what a picture costs."""
        bench, seconds = self.bench, list[float]()
        observed: dict[tuple[int, int], list[Any]] = {}
        plain, runs = self.plain(sampler, part), self.runs(part)
        with self._running(sampler, row, adaptor) as macs:
            pictures = 0
            for (batch, seed, number), reference in zip(runs, plain, strict=True):
                images = reference
                if not (row.label == "plain" and len(seconds) == 2):  # two batches tell what the plain ones cost
                    started = time.perf_counter()
                    images = bench.sample(batch, seed, sampler, row.taken)
                    self._wait()
                    seconds.append((time.perf_counter() - started) / len(batch))
                    pictures += len(batch)
                for k, metric in enumerate(bench.metrics):
                    observed.setdefault((k, number), []).append(metric.observe(images, reference, batch))
            cost = macs(pictures)
        found: dict[str, list[float]] = {}
        for (k, _), rows in sorted(observed.items()):
            whole = torch.cat([one.detach().double().cpu() for one in rows if one is not None])
            for name, value in bench.metrics[k].score(whole).items():
                found.setdefault(name, []).append(float(value))
        return found, {"macs_per_image": round(cost), "seconds_per_image": statistics.median(seconds[1:] or seconds)}

    @contextmanager
    def _running(self, sampler: Sampler, row: Row, adaptor: Any) -> Iterator[Callable[[int], float]]:
        """While a row's way of sampling is in place; tells the MACs of one of so many pictures."""
        unet = self.bench.model.unet
        if row.kind == "deepcache":
            few = self.bench.batches[0][:8]
            with _deepcache(self.bench, sampler, row), counting(unet) as calls:
                self.bench.sample(few, 0, sampler, row.taken)
            with _deepcache(self.bench, sampler, row):
                yield lambda pictures: sum(calls) / len(few)
            return
        options: dict[str, Any] = {"schedule": ch.Schedule.at(row.at), "region": self.region(row.region)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ch.NoEffectWarning)  # plain rows have no adaptor steps
            warnings.filterwarnings("ignore", "a calibrated adaptor works at the times that it was calibrated at")
            with ch.wrap(unet, adaptor, **options) as cw:
                yield lambda pictures: cw.stats.macs_run / pictures

    def _wait(self) -> None:
        if self.bench.model.device.type == "cuda":
            torch.cuda.synchronize(self.bench.model.device)


@contextmanager
def _deepcache(bench: Bench, sampler: Sampler, row: Row) -> Iterator[None]:
    """The peer's own package on the same UNet: DeepCache 0.1.1 (arXiv 2312.00858)."""
    from DeepCache import DeepCacheSDHelper

    solver = bench.model.scheduler(sampler.scheduler)
    solver.set_timesteps(row.taken or sampler.steps)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=bench.model.unet, scheduler=solver))
    helper.set_params(cache_interval=row.interval, cache_branch_id=row.branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def _plain(value: Any) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(value))))


# -- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", formatter_class=argparse.ArgumentDefaultsHelpFormatter, help=run.__doc__)
    one.set_defaults(act=run)
    one.add_argument("--out", type=Path, required=True, help="folder of calibration.json")
    one.add_argument("--resume", type=Path, help="rows of an earlier run")
    one.add_argument("--minutes", type=float, default=9.0, help="begin no row that may not end within these")
    one.add_argument("--captions", type=int, default=5120, help="held-out captions of each of the two sets")
    one.add_argument("--calibration", type=int, default=512, help="training captions, at most")
    one.add_argument("--seeds", type=int, default=3, help="evaluation seeds")
    one.add_argument("--batch", type=int, default=1024, help="pictures sampled at once")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    one.add_argument(
        "--match", action="append", help="only rows whose group/label has this, a regular expression; of several, the "
        "rows of the first come first",
    )  # fmt: skip
    other = commands.add_parser("table", help=show.__doc__)
    other.set_defaults(act=show)
    other.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    return int(options.act(options))


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, the most important rows first."""
    started, path = time.monotonic(), options.out / "calibration.json"
    data = _read(path) or _read(options.resume) or {"runs": [], "rows": {}}
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    cuda = str(options.device).startswith("cuda")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows = {f"{group.name}/{row.label}": (group, row) for group in GROUPS for row in (Row("plain"), *group.rows)}
    wanted = dict.fromkeys(name for one in options.match or [""] for name in rows if re.search(one, name))
    left = [rows[name] for name in wanted if name not in data["rows"]]
    say(f"{len(left)} of {len(wanted)} rows to do")
    if not left:
        return 0
    batch, most = min(options.batch, options.captions), min(options.calibration, 8 * options.captions)
    dtype = torch.float16 if cuda else torch.float32
    judge = Judge.make(options.device, dtype, options.captions, batch, options.seeds, most)
    data["runs"].append({**environment(str(options.device), 0), **_settings(options), "dtype": str(dtype)})
    pace, last, late = 0.0, "", 0  # seconds for a step of the sampler, in the row before; its group; rows left out
    while left:
        group, row = left.pop(0)
        needs = pace * (row.taken or group.sampler.steps) + (0 if group.name == last else pace * group.sampler.steps)
        if time.monotonic() - started + needs > 60 * options.minutes:
            late += 1  # a shorter one may fit
            continue
        begun = time.monotonic()
        try:
            found = judge.measure(group, row)
        except ImportError as error:  # a peer that is not installed
            say(f"{group.name}/{row.label}: {error}")
            continue
        plain = 0 if group.name == last else group.sampler.steps  # the group's plain pictures came first
        pace, last = (time.monotonic() - begun) / ((row.taken or group.sampler.steps) + plain), group.name
        data["rows"][f"{group.name}/{row.label}"] = {**found, "run": len(data["runs"]) - 1}
        _write(path, data)
        distance, seconds = statistics.fmean(found["scores"]["judge"]["Fréchet"]), time.monotonic() - begun
        say(f"{group.name}/{row.label}: Fréchet {distance:.1f} in {seconds:.1f} s")
    say(f"{late} rows are not there yet" if late else "all is there")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print a file as Markdown tables."""
    print(markdown(json.loads(options.file.read_text(encoding="utf-8"))))
    return 0


def markdown(data: Mapping[str, Any]) -> str:
    """A table a group: MACs saved, Fréchet distance, attributes and PSNR, on "judge"; and Fréchet on "choose"."""
    parts = []
    for group in GROUPS:
        rows = {key.split("/", 1)[1]: row for key, row in data["rows"].items() if key.split("/", 1)[0] == group.name}
        plain = rows.get("plain")
        if plain is None:
            continue
        cells = []
        for label, row in rows.items():
            judged, chosen = row["scores"]["judge"], row["scores"]["choose"]
            gap = paired(judged["Fréchet"], plain["scores"]["judge"]["Fréchet"])
            cells.append(
                (
                    label,
                    percent(1 - row["macs_per_image"] / plain["macs_per_image"]),
                    f"{statistics.fmean(judged['Fréchet']):.1f}",
                    "" if row is plain else interval(gap),
                    f"{statistics.fmean(judged['attributes right']):.2f}%",
                    "" if "PSNR" not in judged or row is plain else f"{statistics.fmean(judged['PSNR']):.1f}",
                    f"{statistics.fmean(chosen['Fréchet']):.1f}",
                )
            )
        heads = ("row", ">MACs saved", ">Fréchet", ">less plain's", ">attributes", ">PSNR", ">Fréchet, to choose by")
        parts.append(table(group.name, heads, cells).to_markdown())
    return "\n\n".join(parts)


def paired(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Differences of two rows' values, one a seed; of the first seeds, where a row was judged on more of them."""
    return [a - b for a, b in zip(one, other, strict=False)]


def interval(gap: Sequence[float]) -> str:
    """Mean, and the 95% interval of a paired difference, Student's t."""
    mean = statistics.fmean(gap)
    if len(gap) < 2:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ({mean - half(gap):+.1f} to {mean + half(gap):+.1f})"


def half(gap: Sequence[float]) -> float:
    """Half of the 95% interval of paired differences, Student's t; 0 of a single one."""
    if len(gap) < 2:
        return 0.0
    return student(len(gap)) * statistics.stdev(gap) / len(gap) ** 0.5


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("captions", "calibration", "seeds", "batch")
    return {name: getattr(options, name) for name in names}


def _read(path: Path | None) -> dict[str, Any] | None:
    return None if path is None or not path.exists() else dict(json.loads(path.read_text(encoding="utf-8")))


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())

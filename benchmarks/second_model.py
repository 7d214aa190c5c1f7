"""The main rows of `benchmarks/calibration.py` on a model that is not ours in kind: an unconditional EDM UNet.

    python -m benchmarks.second_model train --out DIR --minutes 5                      # on a GPU
    python -m benchmarks.second_model plan --model DIR/second_model.safetensors       # which steps: before `run`
    python -m benchmarks.second_model run --out DIR --model DIR/second_model.safetensors --minutes 4
    python -m benchmarks.second_model table DIR/second_model.json                      # as Markdown
    python -m benchmarks.second_model render [DIR/second_model.json]                   # into docs/calibration*.md

The network is denoising-diffusion-pytorch's `Unet` (`benchmarks/second_model_training.py`), the sampler a loop of our
own, and `ch.calibrate` is given both. Rows are judged as in `benchmarks/calibration.py`: chosen on some noises, judged
on others, every row written as soon as it is there, the most important ones first, none measured again. There is no row
of DeepCache: its package knows diffusers' UNets only, and its arithmetic (the cached feature as it is, one full step in
`interval`) is that of the identity at the same cut and clock. `plan` asks `ch.plan` for adaptor steps, on noises that
judge nothing, and writes them to `benchmarks/results/second_model_plan.json`; rows at those steps come first. In
miniature, on a CPU: `train --minutes 0.1 --dim 8 --batch 8 --pool 64`, `plan --noises 2 --steps 8 --out DIR`, then `run
--pictures 4 --seeds 1 --match "edm-8/(plain|affine, widest, 3 4 6 7)$"`.
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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from benchmarks.calibration import (
    AFFINE,
    BEFORE,
    BOTH,
    CLOCK2,
    FREE,
    IDENTITY,
    INNER,
    OTHER,
    TREND,
    Row,
    every,
    fewer,
    interval,
    kinds,
)
from benchmarks.calibration_results import TABLES, Rows, half, load, peers, rewrite
from benchmarks.harness import environment, say
from benchmarks.second_model_training import SIGMA_MAX, SIGMA_MIN, SecondModel, log_snr, train
from clockwork_hooks._numbers import percent
from clockwork_hooks.demo.classifier import UNREADABLE, AttributeClassifier
from clockwork_hooks.demo.evaluate import reference_statistics
from clockwork_hooks.demo.weights import WEIGHTS, load_module
from clockwork_hooks.metrics import Better, Frechet, Paired
from clockwork_hooks.reports.tables import table

RESULT = Path(__file__).parent / "results" / "second_model.json"
PLANNED = RESULT.with_name("second_model_plan.json")
BEGIN, END = "<!-- second model: python -m benchmarks.second_model render -->", "<!-- end of second model -->"
BEGIN_ROWS, END_ROWS = "<!-- second model's rows: python -m benchmarks.second_model render -->", "<!-- end of rows -->"
_SEED = 1_000_000  # of the noise that adaptors are calibrated on: none of the judged ones
_JUDGING = 5  # judging pictures takes about as long as so many steps
_SMALLEST = 0.2  # share of the MACs of a region that has rows


# -- the plan --------------------------------------------------------------------------------------------------------


def _spaced(steps: int, clock: int, first: int, *names: str) -> list[Row]:
    what = f"clock {clock}, first {first} and last 1 full"
    return kinds("widest", every(steps, clock, first, 1), *names, what=what)


SAVINGS = {8: (0.2, 0.32, 0.43), 20: (0.4, 0.5), 50: (0.65, 0.72)}  # steps of the sampler → asked of `ch.plan`
_PLANNING = 7_100_000  # seed of the noise that is planned with: none of the judged or calibrated ones


def _planned(steps: int, instead_of: int | None = None) -> list[Row]:
    """Rows at the steps that were found for this model: by `search`, which looks at pictures, and by `ch.plan`.

    Args:
        steps: of the sampler.
        instead_of: the rows take more steps than their group, which has so many, and few full ones.
    """
    if not PLANNED.exists():
        return []
    rows, found = list[Row](), json.loads(PLANNED.read_text(encoding="utf-8"))
    for by, sets in (("searched for", found.get("searches", [])), ("planned", found["plans"])):
        for one in (one for one in sets if one["steps"] == steps):
            at = tuple(one["adaptor steps"])
            what = f"{by}, {len(at)} adaptor steps"
            what = what if instead_of is None else f"{steps} steps, {what}"
            names = (TREND, BEFORE, AFFINE) if instead_of is None else (TREND, BEFORE)
            rows += kinds(one["region"], at, *names, what=what, taken=None if instead_of is None else steps)
    return list({row.label: row for row in rows}.values())


def _early(steps: int, clock: int, *names: str) -> list[Row]:
    rule = ch.Schedule.early(clock)
    return kinds("widest", rule.adaptor_steps(steps), *names, what=str(rule))


def _plan() -> list[tuple[int, Row]]:
    """(steps of the sampler, row), the most important first."""
    usual, plain = (IDENTITY, AFFINE, FREE, BEFORE, TREND), Row("plain")
    plan: list[tuple[int, Sequence[Row]]] = [
        *((steps, (plain, *_planned(steps))) for steps in SAVINGS),
        *((8, _planned(steps, instead_of=8)) for steps in (10, 12)),
        (8, (*fewer(5, 6, 7), *kinds("widest", BOTH, *usual), *kinds("default", CLOCK2, *usual))),
        (20, (*fewer(10, 12), *_spaced(20, 3, 2, TREND, BEFORE, AFFINE, IDENTITY), *_early(20, 2, TREND, BEFORE))),
        (50, (*fewer(16, 13), *_early(50, 4, TREND, BEFORE), *_spaced(50, 5, 3, TREND, BEFORE, IDENTITY))),
        (8, (*fewer(4), *kinds("widest", INNER, *usual), *kinds("default", BOTH, *usual))),
        (20, (*_spaced(20, 2, 2, TREND, BEFORE, AFFINE, IDENTITY), *fewer(9))),
        (50, (*_spaced(50, 4, 3, TREND, IDENTITY), *fewer(19))),
        (8, (*fewer(3), *kinds("widest", OTHER, *usual), *kinds("default", INNER, *usual))),
    ]
    return [(steps, row) for steps, rows in plan for row in rows]


PLAN = _plan()


def key_of(steps: int, row: Row) -> str:
    """Group/label."""
    return f"edm-{steps}/{row.label}"


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Readable:
    """The share of pictures of which the demo's classifier reads every attribute: a scene, not half of one."""

    classifier: AttributeClassifier

    @property
    def better(self) -> Mapping[str, Better]:
        """Higher is better."""
        return {"readable": "higher"}

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor:
        """1 or 0 (B, 1)."""
        return torch.from_numpy((self.classifier.read(images) != UNREADABLE).all(1, keepdims=True))

    def score(self, rows: Tensor) -> dict[str, float]:
        """The share in percent."""
        return {"readable": 100 * float(rows.double().mean())}


@dataclass
class Judge:
    """Measures rows; noise and plain pictures stay on the device.

    Attributes:
        model: the second model.
        metrics: what judges pictures.
        pictures: of each seed of "judge", and of "choose".
        batch: sampled at once.
        seeds: of "judge".
        samples: that adaptors are calibrated on.
    """

    model: SecondModel
    metrics: tuple[Any, ...]
    pictures: int
    batch: int
    seeds: int
    samples: int
    _noise: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _plain: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    _regions: dict[str, ch.Region | None] = field(default_factory=dict)

    @classmethod
    def make(cls, options: argparse.Namespace, dtype: torch.dtype) -> Judge:
        """Load the model, the classifier and what it says about rendered scenes of the held-out combinations."""
        classifier = AttributeClassifier()
        load_module(classifier, WEIGHTS / "classifier" / "model.safetensors")
        classifier.eval().requires_grad_(False).to(options.device)
        drawn = 8192 if options.pictures > 1024 else max(options.pictures, 64)
        rendering: Any = SimpleNamespace(device=torch.device(options.device), classifier=classifier)
        reference = reference_statistics(rendering, drawn)
        metrics = (Frechet(classifier.features, reference), Readable(classifier), Paired())
        model = SecondModel.load(options.model, options.device, dtype)
        batch, samples = min(options.batch, options.pictures), min(options.calibration, 8 * options.pictures)
        return cls(model, metrics, options.pictures, batch, options.seeds, samples)

    def runs(self, part: str) -> list[tuple[int, int, int]]:
        """(pictures, seed of the noise, seed of the evaluation) of the batches of "judge" or "choose"."""
        sizes = [min(self.batch, self.pictures - at) for at in range(0, self.pictures, self.batch)]
        seeds = range(self.seeds) if part == "judge" else (self.seeds,)
        return [(size, seed * len(sizes) + k, seed) for seed in seeds for k, size in enumerate(sizes)]

    def noise(self, count: int, seed: int) -> Tensor:
        """Drawn once."""
        if (count, seed) not in self._noise:
            self._noise[count, seed] = self.model.noise(count, seed)
        return self._noise[count, seed]

    def plain(self, steps: int, part: str) -> list[Tensor]:
        """The plain pictures, batch by batch."""
        if (steps, part) not in self._plain:
            runs = self.runs(part)
            self._plain[steps, part] = [self.model.pictures(self.noise(n, seed), steps) for n, seed, _ in runs]
        return self._plain[steps, part]

    def region(self, name: str) -> ch.Region | None:
        """The default region or the widest one, found for calls of this batch; None where it holds too little."""
        if name not in self._regions:
            weight = self.model.weight
            call = (self.noise(self.batch, 0).to(weight.dtype), weight.new_zeros(self.batch))
            region = ch.find_region(self.model.unet, *call)
            if name == "widest":
                region = ch.find_regions(self.model.unet, *call)[0]
            self._regions[name] = region if region.macs_share >= _SMALLEST else None
        return self._regions[name]

    def measure(self, steps: int, row: Row) -> dict[str, Any] | None:
        """All there is to say about a row; None where its region holds too little."""
        region = self.region(row.region)
        if row.kind is not None and region is None:
            return None
        adaptor, found = self.adaptor(steps, row)
        scores: dict[str, Any] = {}
        for part in ("choose", "judge"):
            scores[part], cost = self.scores(steps, row, adaptor, part)
        plan = json.loads(json.dumps(dataclasses.asdict(row)))
        return {**plan, **found, **cost, "scores": scores, "steps": steps, "region line": region and region.line}

    def adaptor(self, steps: int, row: Row) -> tuple[Any, dict[str, Any]]:
        """The calibrated adaptor of a row, and what its calibration says."""
        if row.kind in (None, IDENTITY):
            return row.kind, {}
        model, most, steps = self.model, min(row.captions, self.samples), row.taken or steps
        schedule = row.at or None  # None: for any steps
        batches = [(min(256, most - at), _SEED + at) for at in range(0, most, 256)]
        if steps > 20:  # several batches of a long sampler say more than enough
            batches = batches[:1]
        self._wait()
        adaptor = ch.calibrate(
            model.unet, lambda batch: model.sample(model.noise(*batch), steps), batches,
            schedule=schedule, region=self.region(row.region), kind=row.kind, log_snr=log_snr,
        )  # fmt: skip
        return adaptor, {"calibration": adaptor.report.to_dict()}

    @torch.no_grad()
    def scores(self, steps: int, row: Row, adaptor: Any, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Name of a score → one value a seed; and what a picture costs."""
        observed: dict[tuple[int, int], list[Tensor]] = {}
        plain, seconds, pictures = self.plain(steps, part), list[float](), 0
        with ch.wrap(self.model.unet, adaptor, schedule=ch.Schedule.at(row.at), region=self.region(row.region)) as cw:
            for (count, seed, number), reference in zip(self.runs(part), plain, strict=True):
                images = reference
                if not (row.label == "plain" and len(seconds) == 2):  # two batches tell what the plain ones cost
                    noise = self.noise(count, seed)
                    self._wait()
                    started = time.perf_counter()
                    with (
                        cw.trajectory()
                    ):  # a loop of our own says where one begins: no pass is full for want of certainty
                        images = self.model.pictures(noise, row.taken or steps)
                    self._wait()
                    seconds.append((time.perf_counter() - started) / count)
                    pictures += count
                if not bool(images.isfinite().all()):
                    raise FloatingPointError(f"{key_of(steps, row)}: a picture is not finite")
                for k, metric in enumerate(self.metrics):
                    observed.setdefault((k, number), []).append(metric.observe(images, reference, None))
            cost = {"macs_per_image": round(cw.stats.macs_run / pictures), "full": cw.stats.full_passes,
                    "adaptor": cw.stats.adaptor_passes, "reasons": dict(cw.stats.reasons)}  # fmt: skip
        values: dict[str, list[float]] = {}
        for (k, _), rows in sorted(observed.items()):
            whole = torch.cat([one.detach().double().cpu() for one in rows])
            for name, value in self.metrics[k].score(whole).items():
                values.setdefault(name, []).append(float(value))
        return values, {**cost, "seconds_per_image": statistics.median(seconds[1:] or seconds)}

    def _wait(self) -> None:
        if self.model.weight.is_cuda:
            torch.cuda.synchronize(self.model.weight.device)


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, the most important rows first."""
    started, path = time.monotonic(), options.out / RESULT.name
    source = next((one for one in (path, options.resume) if one is not None and one.exists()), None)
    data: dict[str, Any] = {"runs": [], "rows": {}} if source is None else load(source)
    cuda = str(options.device).startswith("cuda")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    wanted = [(steps, row) for steps, row in PLAN if re.search(options.match, key_of(steps, row))]
    left = [(steps, row) for steps, row in wanted if key_of(steps, row) not in data["rows"]]
    say(f"{len(left)} of {len(wanted)} rows to do")
    if not left:
        return 0
    dtype = getattr(torch, options.dtype or ("float16" if cuda else "float32"))
    judge = Judge.make(options, dtype)
    names = ("pictures", "calibration", "seeds", "batch")
    settings = {name: getattr(options, name) for name in names}
    model = {"shape": dataclasses.asdict(judge.model.shape), **judge.model.facts}
    data["runs"].append({**environment(str(options.device), 0), **settings, "dtype": str(dtype), "model": model})
    pace, missing = 0.0, 0
    for number, (steps, row) in enumerate(left):
        size = (row.taken or steps) + _JUDGING
        if time.monotonic() - started + pace * size > 60 * options.minutes:
            missing += 1  # a later row may take fewer steps
            continue
        begun = time.monotonic()
        result = judge.measure(steps, row)
        if result is None:
            say(f"{key_of(steps, row)}: no row, the {row.region} region holds less than {percent(_SMALLEST)}")
            continue
        seconds = time.monotonic() - begun
        pace = seconds / size if number < 2 else max(pace, seconds / size)  # the first row warms up
        data["rows"][key_of(steps, row)] = {**result, "run": len(data["runs"]) - 1}
        _write(path, data)
        distance = statistics.fmean(result["scores"]["judge"]["Fréchet"])
        say(f"{key_of(steps, row)}: Fréchet {distance:.1f} in {seconds:.1f} s")
    say(f"{missing} rows are not there yet" if missing else "all is there")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Ask `ch.plan` for the adaptor steps of least error, for each saving of `SAVINGS`."""
    cuda = str(options.device).startswith("cuda")
    model = SecondModel.load(options.model, options.device, torch.float16 if cuda else torch.float32)
    call = model.noise(options.noises, 0).to(model.weight.dtype), model.weight.new_zeros(options.noises)
    regions = {"default": ch.find_region(model.unet, *call), "widest": ch.find_regions(model.unet, *call)[0]}
    plans = list[dict[str, Any]]()
    for steps in options.steps:
        for saving in SAVINGS[steps]:
            started = time.monotonic()
            chosen = ch.plan(
                model.unet, lambda count, seed, steps=steps: model.sample(model.noise(count, seed), steps),
                [options.noises], min_saving=saving, regions=regions.values(), adaptor="calibrated", log_snr=log_snr,
                seeds=[_PLANNING], held_out_seeds=[_PLANNING + 1], probes=options.probes,
            )  # fmt: skip
            region = next(name for name, one in regions.items() if one.fingerprint == chosen.fingerprint)
            uniform = {o.kind: o.measured for o in chosen.options if chosen.chosen.region == o.region and o.measured}
            plans.append(
                {"steps": steps, "min_saving": saving, "region": region, "adaptor steps": list(chosen.chosen.steps),
                 "saved": chosen.chosen.saved, "rule": chosen.rule, "predicted": chosen.chosen.predicted,
                 "measured": chosen.chosen.measured, "held out": chosen.held_out, "others": uniform}
            )  # fmt: skip
            say(f"{steps} steps, {percent(saving)}: {region} {plans[-1]['adaptor steps']}, {percent(chosen.held_out)} "
                f"held out, in {time.monotonic() - started:.0f} s")  # fmt: skip
            _write(options.out / PLANNED.name, {**environment(str(options.device), 0), "plans": plans})
    return 0


def search(options: argparse.Namespace) -> int:
    """Move full steps by one or two places as long as pictures of noises that judge nothing come nearer to scenes.

    `ch.plan` goes by the distance to the plain latents. What is wrong with a picture's last details is little of that
    distance, and much of Fréchet's.
    """
    cuda = str(options.device).startswith("cuda")
    judge = Judge.make(options, torch.float16 if cuda else torch.float32)
    path = options.out / PLANNED.name
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"plans": []}
    steps, region = options.steps, judge.region("widest")
    any_steps = judge.adaptor(steps, Row(BEFORE, BEFORE, "widest", ()))[0]
    for full in options.full:
        until = time.monotonic() + options.seconds
        planned = [frozenset(one["adaptor steps"]) for one in data["plans"] if one["steps"] == steps]
        starts = [frozenset(range(1, steps + 1)) - one for one in planned if steps - len(one) == full]
        starts += [frozenset(1 + round(k * (steps - 1) / (full - 1)) for k in range(full))]
        tried: dict[frozenset[int], float] = {}

        def distance(chosen: frozenset[int], tried: dict[frozenset[int], float] = tried) -> float:
            if chosen not in tried:
                at = tuple(step for step in range(1, steps + 1) if step not in chosen)
                row = Row(BEFORE, BEFORE, "widest", at)
                tried[chosen] = judge.scores(steps, row, any_steps, "choose")[0]["Fréchet"][0]
            return tried[chosen]

        best, better = min(starts, key=distance), True
        first = distance(best)
        while better and time.monotonic() < until:
            better = False
            for moved in _moves(best, steps):
                if time.monotonic() >= until:
                    break
                if moved not in tried and distance(moved) < distance(best):
                    best, better = moved, True
                    say(f"{distance(best):.1f} after {len(tried)} sets: {' '.join(map(str, sorted(best)))}")
                    break
        at = [step for step in range(1, steps + 1) if step not in best]
        data.setdefault("searches", []).append(
            {"steps": steps, "region": "widest", "adaptor steps": at, "kind": BEFORE, "pictures": options.pictures,
             "sets tried": len(tried), "Fréchet at first": first, "Fréchet": distance(best),
             "MACs of the region": region and region.macs_share, **environment(str(options.device), _PLANNING)}
        )  # fmt: skip
        _write(path, data)
    return 0


def _moves(full: frozenset[int], steps: int) -> Iterator[frozenset[int]]:
    """One full step, all but the first, one or two places earlier or later."""
    for step in sorted(full - {1}, reverse=True):
        for by in (1, -1, 2, -2):
            if 1 < step + by <= steps and step + by not in full:
                yield full - {step} | {step + by}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


# -- the page --------------------------------------------------------------------------------------------------------


def groups_of(data: Mapping[str, Any]) -> list[str]:
    """The groups whose plain row is there."""
    groups = dict.fromkeys(key_of(steps, row).split("/")[0] for steps, row in PLAN)
    return [group for group in groups if f"{group}/plain" in data["rows"]]


def markdown(data: Mapping[str, Any]) -> str:
    """A table a number of steps, in the order of the plan."""
    parts, rows = [], Rows(data)
    for group in groups_of(data):
        plain, cells = f"{group}/plain", []
        keys = [key for key in (key_of(steps, row) for steps, row in PLAN) if key in data["rows"]]
        for key in (key for key in keys if key.split("/")[0] == group):
            judged = rows.row(key)["scores"]["judge"]
            cells.append(
                (
                    key.split("/", 1)[1],
                    percent(rows.saved(key)),
                    f"{rows.mean(key):.1f}",
                    "" if key == plain else interval(rows.gap(key, plain)),
                    f"{statistics.fmean(judged['readable']):.2f}%",
                    "" if key == plain else f"{statistics.fmean(judged['PSNR']):.1f}",
                    f"{rows.mean(key, 'choose'):.1f}",
                )
            )
        heads = ("row", ">MACs saved", ">Fréchet", ">less plain's", ">readable", ">PSNR", ">Fréchet, to choose by")
        parts.append(table(group, heads, cells).to_markdown())
    return "\n\n".join(parts)


def verdicts(data: Mapping[str, Any]) -> list[str]:
    """What the rows say: of calibrated and identity at the same steps, of the best row, and of fewer plain steps."""
    rows, lines = Rows(data), []
    for group in groups_of(data):
        steps = group.split("-")[1]
        lines += [line for line in (_kinds(rows, group, steps), _best(rows, group, steps)) if line]
        lines += _fewer(rows, group, steps)
    return lines


_NAMED = 3  # rows at most; of more their number is enough, and all_rows() has each


def _kinds(rows: Rows, group: str, steps: str) -> str:
    """Affine and exit+entry+before against the identity at the same region and steps."""
    better, others = 0, []
    for key, row in rows.data["rows"].items():
        same = f"{group}/{IDENTITY}, {key.split(', ', 1)[-1]}"
        if key.split("/")[0] != group or row["kind"] in (None, IDENTITY) or same not in rows.data["rows"]:
            continue
        gap = rows.gap(key, same)
        if statistics.fmean(gap) + half(gap) < 0:
            better += 1
        else:
            others.append(f"`{key.split('/')[1]}`")
    if not better + len(others):
        return ""
    text = (
        f"- {steps} steps, calibrated against the identity at the same region and steps: nearer to rendered scenes in "
    )
    named = f"; not in {', '.join(others)}" if 0 < len(others) <= _NAMED else ""
    return f"{text}{better} of {better + len(others)} rows{named}."


def _best(rows: Rows, group: str, steps: str) -> str:
    """The calibrated row that the other noises choose, of those that save 40%, 50% or 60%."""
    saved = {"8": 0.4, "20": 0.5}.get(steps, 0.6)
    key = rows.calibrated(group, saved)
    if key is None:
        return ""
    gap = rows.gap(key, f"{group}/plain")
    means = f"Fréchet {rows.mean(key):.1f}, plain {rows.mean(f'{group}/plain'):.1f}: {interval(gap)}"
    label = f"`{key.split('/')[1]}`, {percent(rows.saved(key))}"
    return f"- {steps} steps, at least {percent(saved)} fewer MACs: {label}, {means}."


def _fewer(rows: Rows, group: str, steps: str) -> list[str]:
    """Plain sampling with fewer steps against the calibrated row, of any steps, that saves at least as much."""
    beaten, others = [], []
    for peer in peers(rows, group):
        if peer.calibrated is None:
            continue
        label = f"{rows.row(peer.key)['taken']} ({percent(rows.saved(peer.key))}; `{peer.calibrated.split('/')[1]}`, "
        text = f"{label}{percent(rows.saved(peer.calibrated))}: {interval(rows.gap(peer.calibrated, peer.key))})"
        (beaten if peer.beaten else others).append(text)
    lines = [f"- {steps} steps, plain sampling with fewer steps is beaten at equal MACs: {'; '.join(beaten)}."]
    lines += [f"- {steps} steps, plain sampling with fewer steps is **not beaten**: {'; '.join(others)}."]
    return [line for line, texts in zip(lines, (beaten, others), strict=True) if texts]


def page(data: Mapping[str, Any]) -> str:
    """The section of docs/calibration.md."""
    run, model = data["runs"][-1], data["runs"][-1]["model"]
    shape, regions = model["shape"], dict.fromkeys(row["region line"] for row in data["rows"].values() if row["kind"])
    macs = data["rows"]["edm-8/plain"]["macs_per_image"] / 8 if "edm-8/plain" in data["rows"] else 0
    before = model.get("before") or {"minutes": 0, "iterations": 0}
    minutes, iterations = f"{model['minutes'] + before['minutes']:g}", model["iterations"] + before["iterations"]
    text = f"""\
The model is of another code base: denoising-diffusion-pytorch's `Unet` (dim {shape["dim"]}, multipliers \
{", ".join(map(str, shape["dim_mults"]))};
{model["parameters"] / 1e6:.1f}M parameters, {macs / 1e9:.2f} GMACs a pass), unconditional, with EDM's \
preconditioning (arXiv 2206.00364).
It was trained on the demo's scenes for {minutes} minutes ({iterations:,} iterations of {model["batch"]}, \
{model["device"]}). The sampler is DPM++ 2M
over Karras' σ from {SIGMA_MAX:g} to {SIGMA_MIN:g}, without guidance.

Rows ([all of them](calibration_tables.md#a-second-model)) as above: {run["pictures"]:,} noises to choose by \
(one seed), others to judge on ({run["seeds"]} seeds).
Adaptors are calibrated on {run["calibration"]} samples from other noises (at most 256 at 50 steps). There is no row of
DeepCache, whose package knows diffusers' UNets only.

{run["device"]}, {run["dtype"].removeprefix("torch.")}, torch {run["versions"]["torch"]}, python {run["python"]}; by
`python -m benchmarks.second_model train`, then `run`: each command is in `benchmarks/results/second_model.json`.
Regions:

{chr(10).join(f"- {line}" for line in regions)}"""
    return "\n\n".join(["## Measured on a second model", text, "\n".join(verdicts(data))])


def all_rows(data: Mapping[str, Any]) -> str:
    """The section of docs/calibration_tables.md."""
    how = (
        "How rows are measured: [calibration](calibration.md#measured-on-a-second-model). *readable*: the share of "
        "pictures of which the demo's classifier reads every attribute."
    )
    parts = ["## A second model", how, markdown(data)]
    missing = [key for key in (key_of(steps, row) for steps, row in PLAN) if key not in data["rows"]]
    if missing:
        counts = Counter(key.split("/")[0] for key in missing)
        groups = ", ".join(f"{count} of {group}" for group, count in counts.items())
        parts.append(f"Planned, not measured: {groups} (`PLAN` in `benchmarks/second_model.py` names them).")
    return "\n\n".join(part for part in parts if part)


def show(options: argparse.Namespace) -> int:
    """Print a file as Markdown tables."""
    data = load(options.file)
    print("\n\n".join(["\n".join(verdicts(data)), markdown(data)]))
    return 0


def render(options: argparse.Namespace) -> int:
    """Write the sections of both pages, from benchmarks/results/second_model.json or a file that becomes it."""
    rewrite(RESULT, options.file, BEGIN, END, page)
    return rewrite(RESULT, None, BEGIN_ROWS, END_ROWS, all_rows, page=TABLES)


# -- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shape: dict[str, Any] = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = commands.add_parser("train", help=train.__doc__, **shape)
    one.set_defaults(act=train)
    one.add_argument("--out", type=Path, required=True, help="folder of the weights, the loss curve and pictures")
    one.add_argument("--start", type=Path, help="weights of an earlier training to go on from")
    one.add_argument("--minutes", type=float, default=5.0, help="of training, preparation included")
    one.add_argument("--device", default=device, help="where to run")
    one.add_argument("--batch", type=int, default=512, help="scenes an iteration")
    one.add_argument("--seed", type=int, default=0, help="of the weights, the scenes and the noise")
    one.add_argument("--dim", type=int, default=48, help="channels of the highest level")
    one.add_argument("--pool", type=int, default=262_144, help="rendered scenes held ready")
    one.add_argument("--rate", type=float, default=8e-4, help="peak learning rate of AdamW")
    one.add_argument("--decay", type=float, default=0.999, help="of the moving average of the weights")
    one.add_argument("--compile", action="store_true", help="torch.compile the UNet, if it works")
    one.add_argument("--log-every", type=int, default=25, help="iterations between two points of the loss curve")
    one.add_argument("--shown", type=int, default=64, help="pictures drawn at the end")
    four = commands.add_parser("plan", help=plan.__doc__, **shape)
    four.set_defaults(act=plan)
    four.add_argument("--model", type=Path, required=True, help="weights that `train` wrote")
    four.add_argument("--out", type=Path, default=RESULT.parent, help=f"folder of {PLANNED.name}")
    four.add_argument(
        "--steps", type=int, nargs="+", default=list(SAVINGS), choices=list(SAVINGS), help="of the sampler"
    )
    four.add_argument("--noises", type=int, default=32, help="pictures to plan with")
    four.add_argument("--probes", type=int, default=12, help="adaptor steps that are tried alone, at each region")
    four.add_argument("--device", default=device, help="where to run")
    five = commands.add_parser("search", help=search.__doc__, **shape)
    five.set_defaults(act=search, captions=0, seeds=_PLANNING)
    five.add_argument("--model", type=Path, required=True, help="weights that `train` wrote")
    five.add_argument("--out", type=Path, default=RESULT.parent, help=f"folder of {PLANNED.name}")
    five.add_argument("--steps", type=int, default=20, help="of the sampler")
    five.add_argument("--full", type=int, nargs="+", default=[10, 8], help="full steps")
    five.add_argument(
        "--seconds", type=float, default=100, help="begin no trial after these, for each number of full steps"
    )
    five.add_argument("--pictures", type=int, default=2048, help="that sets are tried on")
    five.add_argument("--calibration", type=int, default=512, help="samples to calibrate on, at most")
    five.add_argument("--batch", type=int, default=1024, help="pictures sampled at once")
    five.add_argument("--device", default=device, help="where to run")
    two = commands.add_parser("run", help=run.__doc__, **shape)
    two.set_defaults(act=run)
    two.add_argument("--out", type=Path, required=True, help="folder of second_model.json")
    two.add_argument("--model", type=Path, required=True, help="weights that `train` wrote")
    two.add_argument("--resume", type=Path, help="rows of an earlier run")
    two.add_argument("--minutes", type=float, default=4.0, help="begin no row that may not end within these")
    two.add_argument("--pictures", type=int, default=5120, help="of each seed")
    two.add_argument("--calibration", type=int, default=512, help="samples to calibrate on, at most")
    two.add_argument("--seeds", type=int, default=3, help="evaluation seeds")
    two.add_argument("--batch", type=int, default=1024, help="pictures sampled at once")
    two.add_argument("--device", default=device, help="where to run")
    two.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="float16 on a GPU, else float32")
    two.add_argument("--match", default="", help="only rows whose group/label has this, a regular expression")
    three = commands.add_parser("table", help=show.__doc__)
    three.set_defaults(act=show)
    three.add_argument("file", type=Path)
    usual = commands.add_parser("render", help=render.__doc__)
    usual.set_defaults(act=render)
    usual.add_argument("file", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a calibrated adaptor was asked for a position outside")
        return int(options.act(options))


if __name__ == "__main__":
    sys.exit(main())

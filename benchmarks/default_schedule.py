"""Where a clock's full steps do most good: the paper's places, or others of the same number.

    python -m benchmarks.default_schedule --out DIR                # on a CPU, an hour; every row is written at once
    python -m benchmarks.default_schedule --out DIR --steps 4 --clock 2 --captions 2 --calibration 2    # in miniature
    python -m benchmarks.default_schedule --out DIR --steps 20 --steps 50 --captions 5120 --batch 1024 --seconds 90
                                                                   # on a GPU, with Fréchet distances
    python -m benchmarks.default_schedule --table DIR/default_schedule.json

Relative L2 error of the pictures to the plain sampler's, from the same noise, on held-out captions; adaptors are
calibrated once, at all steps, on training captions. Of each clock n: `every(n)`; `spread(n)`, which has as many full
steps, so that it costs the same; and `every(n, first_full=2, last_full=1)`, whose MACs stand beside its error.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from benchmarks.fidelity_bench import Judged
from benchmarks.harness import Results, environment
from clockwork_hooks._numbers import percent
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.sampling import relative_error
from clockwork_hooks.demo.evaluate import held_out_prompts, reference_statistics
from clockwork_hooks.demo.model import GUIDANCE, DemoModel, load_demo, to_images
from clockwork_hooks.demo.recipe import Recipe
from clockwork_hooks.metrics import Frechet
from clockwork_hooks.reports.tables import table

KINDS = ("identity", "affine", "exit+entry")
ENOUGH = 1024  # captions, for a Fréchet distance


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for default_schedule.json")
    parser.add_argument("--table", type=Path, help="print this file as Markdown, and measure nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, action="append", help="repeatable; 8, 20 and 50 unless said")
    parser.add_argument("--clock", type=int, action="append", help="repeatable; 2 and 3 unless said")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; identity and affine unless said")
    parser.add_argument("--widest", action="store_true", help="the widest region in the place of the default one")
    parser.add_argument("--captions", type=int, default=32, help="held-out captions")
    parser.add_argument("--calibration", type=int, default=32, help="training captions")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=7200, help="begin no row after these")
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    if str(options.device).startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    settings = {name: getattr(options, name) for name in ("captions", "calibration", "batch", "widest")}
    results = Results(options.out / "default_schedule.json", {**environment(options.device, 0), **settings})
    measure(options, results)
    return 0


def measure(options: argparse.Namespace, results: Results) -> None:
    """All rows, until the time is over."""
    started = time.monotonic()
    model = load_demo(options.device, torch.float16 if str(options.device).startswith("cuda") else torch.float32)
    prompts = held_out_prompts(options.captions)
    batches = [tuple(prompts[at : at + options.batch]) for at in range(0, len(prompts), options.batch)]
    training = Recipe.of(captions=options.calibration, seed=11).captions
    judges: list[Any] = [Judged(model.classifier)]
    if options.captions >= ENOUGH:
        judges.append(Frechet(model.classifier.features, reference_statistics(model, 8192)))
    region = region_of(model, batches[0], widest=options.widest)
    for steps in options.steps or (8, 20, 50):
        plain = [sample(model, batch, seed, steps) for seed, batch in enumerate(batches)]
        results.add("rows", steps=steps, rule="plain", **scores(judges, plain, plain, batches))
        for kind in options.kind or KINDS[:2]:
            adaptor = None if kind == "identity" else calibrated(model, training, steps, region, kind)
            seen = set[tuple[int, ...]]()
            for clock in options.clock or (2, 3):
                rules = (ch.Schedule.every(clock), ch.Schedule.spread(clock))
                for rule in (*rules, ch.Schedule.every(clock, first_full=2, last_full=1)):
                    at = rule.adaptor_steps(steps)
                    if at in seen or not at or time.monotonic() - started > options.seconds:
                        continue
                    seen.add(at)
                    with ch.wrap(model.unet, adaptor, schedule=ch.Schedule.at(at), region=region) as cw:
                        images = []
                        for seed, batch in enumerate(batches):
                            with cw.trajectory(steps=steps):
                                images.append(sample(model, batch, seed, steps))
                    found = scores(judges, images, plain, batches)
                    results.add("rows", steps=steps, rule=str(rule), kind=kind, saved=cw.stats.saving, **found)


def scores(judges: Sequence[Any], images: list[Tensor], plain: list[Tensor], batches: Any) -> dict[str, float]:
    """Error with its standard error, and what the judges say."""
    errors = torch.cat([relative_error(one, other) for one, other in zip(images, plain, strict=True)])
    found = {"error": float(errors.mean()), "standard error": float(errors.std() / len(errors) ** 0.5)}
    for judge in judges:
        rows = [judge.observe(*group) for group in zip(images, plain, batches, strict=True)]
        found |= {name: float(value) for name, value in judge.score(torch.cat(rows).double().cpu()).items()}
    return found


def sample(model: DemoModel, prompts: Sequence[str], seed: int, steps: int) -> Tensor:
    """Pictures of a batch."""
    return to_images(model.denoise(model.noise(len(prompts), seed), model.encode_prompts(prompts), steps=steps))


def region_of(model: DemoModel, prompts: Sequence[str], *, widest: bool) -> ch.Region:
    """The default region, or the widest one."""
    noise = model.noise(2 * len(prompts), 0).to(model.text_encoder.norm.weight.dtype)
    call, hidden = (noise, torch.tensor(1, device=model.device)), model.encode_prompts(prompts)
    unet: nn.Module = model.unet
    if widest:
        return ch.find_regions(unet, *call, encoder_hidden_states=hidden)[0]
    return ch.find_region(unet, *call, encoder_hidden_states=hidden)


def calibrated(
    model: DemoModel, prompts: Sequence[str], steps: int, region: ch.Region, kind: str
) -> ch.CalibratedAdaptor:
    """An adaptor for all steps."""
    return calibrate(
        model.unet, lambda batch: sample(model, batch, 1_000_000, steps), [prompts], guidance=GUIDANCE, region=region,
        kind=kind, log_snr=model.scheduler("dpm++"),
    )  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    """A row a schedule, a column a kind of adaptor."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for row in data["rows"]:
        if row["rule"] != "plain":
            rows.setdefault((row["steps"], row["rule"]), {})[row["kind"]] = row
    kinds = list(dict.fromkeys(row["kind"] for row in data["rows"] if "kind" in row))
    cells = [
        (str(steps), rule, percent(next(iter(made.values()))["saved"]), *(_error(made.get(kind)) for kind in kinds))
        for (steps, rule), made in rows.items()
    ]
    return table(
        "Where full steps are", (">steps", "schedule", ">MACs saved", *(f">{k}" for k in kinds)), cells
    ).to_markdown()


def _error(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    frechet = f" · {row['Fréchet']:.1f}" if "Fréchet" in row else ""
    return f"{row['error']:.3f} ± {row['standard error']:.3f}{frechet}"


if __name__ == "__main__":
    raise SystemExit(main())

"""Robustness, drift and plans of the demo model: the numbers and figures of docs/analysis.md.

python -m benchmarks.analysis_demo            (all parts; half an hour on one thread)
python -m benchmarks.analysis_demo plan-20    (one part; the others' results are kept)
python -m benchmarks.analysis_tables          (then: tables and plots of the pages)

compare-N takes what plan-N has planned, and runs it on prompts and noise that were not planned with.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from benchmarks.harness import environment
from clockwork_hooks.analysis.sampling import Candidate, Runs, candidates, first_call
from clockwork_hooks.demo import DEMO_PROMPTS, load_demo
from clockwork_hooks.demo.weights import WEIGHTS

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results/analysis_demo.json", ROOT / "docs"
PROMPTS, HELD_OUT, STEPS = DEMO_PROMPTS[:4], DEMO_PROMPTS[4:8], 8
HELD_OUT_SEED = 1_000_003
ADAPTOR = os.path.relpath(WEIGHTS / "adaptor")
CLOCKS, WIDE = (2, 3, 4), 0.9  # regions with more than this share are nearly the whole UNet


class Demo:
    """The demo model and its sampler; loaded once.

    Args:
        steps: no part takes more.
        prompts: how many.
        results: of the parts that were run before.
    """

    def __init__(self, steps: int, prompts: int, results: dict[str, Any]) -> None:
        self.model, self.most, self.results = load_demo(), steps, results
        self.steps, self.prompts, self.held_out = min(STEPS, steps), list(PROMPTS[:prompts]), list(HELD_OUT[:prompts])

    def sampler(self, steps: int) -> Callable[[Any, int], torch.Tensor]:
        """`generate(captions, seed)`: pictures after so many DPM++ steps."""
        return lambda batch, seed: self.model.sample(batch, steps=steps, seed=seed)

    def candidates(self, adaptors: list[str | None]) -> tuple[Candidate, ...]:
        """All nested regions that leave something to run, each with these adaptors where they fit."""
        trace = first_call(self.model.unet, self.sampler(2), self.prompts, 0)
        found = candidates(trace, self.model.unet, None, adaptors)
        return tuple(one for one in found if one.region.macs_share < WIDE)


Part = Callable[[Demo, Path], dict[str, Any]]


def robustness(demo: Demo, figures: Path) -> dict[str, Any]:
    """Disturb each map from each step on."""
    found = ch.measure_robustness(
        demo.model.unet, demo.sampler(demo.steps), [demo.prompts], starts=range(1, demo.steps + 1, 2)
    )
    found.plot_grid(figures / "analysis-grid.png")
    shrink(figures / "analysis-grid.png", 0.6, 64)
    return found.to_dict()


def shrink(path: Path, share: float, colours: int | None = None) -> None:
    """Fewer pixels and, for pictures of noise, which does not compress, fewer colours."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.LANCZOS)
    (small.quantize(colours) if colours else small).save(path, optimize=True)


def drift(demo: Demo, figures: Path) -> dict[str, Any]:
    """How the exits of all regions change, and what the identity and the adaptor that ships are off by."""
    found = ch.measure_drift(demo.model.unet, demo.sampler(demo.steps), [demo.prompts], adaptor=[None, ADAPTOR])
    return found.to_dict()


def planned(steps: int, probes: int, levels: tuple[int, ...], adaptors: list[str | None]) -> Part:
    """The least error at the saving of clock 2, in regions below these levels; clocks and adaptive schedules too."""

    def part(demo: Demo, figures: Path) -> dict[str, Any]:
        own = min(steps, demo.most)
        regions = [one.region for one in demo.candidates([None]) if one.region.level in levels]
        found = ch.plan(
            demo.model.unet,
            demo.sampler(own),
            [demo.prompts],
            min_saving=regions[0].macs_share * (own // 2) / own - 1e-6,
            regions=regions,
            adaptor=adaptors,
            probes=probes,
            adaptive=True,
            held_out=[demo.held_out],
        )
        return found.to_dict()

    return part


def compared(steps: int) -> Part:
    """Every clock from every start, and what was planned for each one's MACs, on held-out prompts and noise."""

    def part(demo: Demo, figures: Path) -> dict[str, Any]:
        plan = ch.Plan.from_json(json.dumps(demo.results[f"plan-{steps}"]))
        runs = Runs(demo.model.unet, demo.sampler(plan.steps), [(demo.held_out, HELD_OUT_SEED)])
        rows = []
        for one in demo.candidates([None, ADAPTOR]):
            mine = [option for option in plan.options if option.region == one.name]
            if not mine:
                continue
            clocks = [(f"clock {n}", ch.Schedule.every(n, start=start)) for n in CLOCKS for start in range(1, n + 1)]
            sizes = {plan.steps - schedule.full_steps(plan.steps) for _, schedule in clocks}
            planned = [o for o in mine if o.kind == "planned" and len(o.steps) in sizes]
            others = [(o.kind, o.schedule) for o in mine if o.kind == "adaptive"] + clocks
            schedules = {(kind, str(schedule)): schedule for kind, schedule in others}
            schedules |= {(o.kind, str(o.schedule)): o.schedule for o in planned}
            for (kind, name), schedule in schedules.items():
                found = runs.outcome(one, schedule)
                rows.append(
                    {"region": one.name, "kind": kind, "schedule": name, "saved": found.saved, "error": found.error}
                )
        return {"steps": plan.steps, "rows": rows, "held out": demo.held_out, "seed": HELD_OUT_SEED}

    return part


PARTS: dict[str, Part] = {
    "robustness": robustness,
    "drift": drift,
    "plan-8": planned(8, 7, (1,), [None, ADAPTOR]),
    "compare-8": compared(8),
    "plan-20": planned(20, 8, (1,), [None]),
    "compare-20": compared(20),
    "plan-50": planned(50, 7, (1,), [None]),
    "compare-50": compared(50),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts; each is saved when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the PNGs")
    parser.add_argument("--steps", type=int, default=50, help="no part takes more; for trying it")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    given = parser.parse_args(arguments)
    wrong = [name for name in given.parts if name not in PARTS]
    if wrong:
        parser.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    data = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    demo = Demo(given.steps, given.prompts, data)
    size = ["--steps", str(given.steps), "--prompts", str(given.prompts)]
    for name in given.parts or PARTS:
        begun = time.perf_counter()
        made = PARTS[name](demo, given.figures)
        data[name] = made | {
            "seconds": round(time.perf_counter() - begun, 1),
            "command": shlex.join(["python", "-m", "benchmarks.analysis_demo", name, *size]),
            "environment": environment("cpu", 0) | {"threads": torch.get_num_threads()},
            "prompts": demo.prompts,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {data[name]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

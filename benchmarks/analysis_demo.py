"""Robustness, drift, plans and edits of the demo model: the numbers and figures of docs/analysis.md and editing.md.

python -m benchmarks.analysis_demo            (all parts; some minutes on two cores)
python -m benchmarks.analysis_demo plan-20    (one part; the others' results are kept)
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from benchmarks.harness import environment
from clockwork_hooks.demo import DEMO_PROMPTS, load_demo
from clockwork_hooks.demo.edits import edit_scenes

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results/analysis_demo.json", ROOT / "docs"
PROMPTS, HELD_OUT, STEPS = DEMO_PROMPTS[:4], DEMO_PROMPTS[4:8], 8
EDIT_STEPS = ((20, 20), (50, 20), (100, 50))


class Demo:
    """The demo model and its sampler; loaded once."""

    def __init__(self, steps: int, prompts: int) -> None:
        self.model, self.steps, self.prompts = load_demo(), steps, list(PROMPTS[:prompts])

    def sampler(self, steps: int) -> Callable[[Any, int], torch.Tensor]:
        """`generate(captions, seed)`: pictures after so many DPM++ steps."""
        return lambda batch, seed: self.model.sample(batch, steps=steps, seed=seed)


def robustness(demo: Demo, figures: Path) -> dict[str, Any]:
    """Disturb each map from each step on."""
    found = ch.measure_robustness(
        demo.model.unet, demo.sampler(demo.steps), [demo.prompts], starts=range(1, demo.steps + 1, 2)
    )
    found.plot(figures / "analysis-robustness.png")
    found.plot_grid(figures / "analysis-grid.png")
    _shrink(figures / "analysis-grid.png", 0.6, 64)
    return found.to_dict()


def _shrink(path: Path, share: float, colours: int | None = None) -> None:
    """Fewer pixels and, for pictures of noise, which does not compress, fewer colours."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.LANCZOS)
    (small.quantize(colours) if colours else small).save(path, optimize=True)


def drift(demo: Demo, figures: Path) -> dict[str, Any]:
    """How the exits of all regions change."""
    found = ch.measure_drift(demo.model.unet, demo.sampler(demo.steps), [demo.prompts])
    found.plot(figures / "analysis-drift.png")
    return found.to_dict()


def planned(steps: int, probes: int) -> Callable[[Demo, Path], dict[str, Any]]:
    """The least error at the saving of clock 2, in all regions below the highest level."""

    def part(demo: Demo, figures: Path) -> dict[str, Any]:
        model, own = demo.model, steps or demo.steps
        hidden = model.encode_prompts(demo.prompts)
        latents = torch.cat([model.noise(len(demo.prompts), 0)] * 2)
        region = ch.find_region(model.unet, latents, torch.tensor(5), encoder_hidden_states=hidden)
        saving = region.macs_share * (own // 2) / own
        found = ch.plan(
            model.unet,
            demo.sampler(own),
            [demo.prompts],
            min_saving=saving - 1e-6,
            regions=[region],
            probes=probes,
            clocks=(2, 3, 4),
            held_out=[list(HELD_OUT[: len(demo.prompts)])],
        )
        found.plot(figures / f"analysis-plan-{own}.png")
        return json.loads(found.to_json()) | {"fresh": _fresh(demo, own, region, found)}

    return part


def _fresh(demo: Demo, steps: int, region: ch.Region, found: Any) -> dict[str, float]:
    """The plan and the uniform clocks on held-out prompts and another seed."""
    prompts, errors = list(HELD_OUT[: len(demo.prompts)]), {}
    generate = demo.sampler(steps)
    plain = generate(prompts, 1_000_003)
    schedules = {f"clock {n}": ch.Schedule.every(n) for n in (2, 3, 4)}
    for name, schedule in {"planned": found.schedule, **schedules}.items():
        with ch.wrap(demo.model.unet, region=region, schedule=schedule):
            made = generate(prompts, 1_000_003)
        each = (made - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        errors[name] = float(each.mean())
    return errors


def edits(demo: Demo, figures: Path) -> dict[str, Any]:
    """The same edits at several numbers of steps."""
    rows = []
    for inversion_steps, steps in EDIT_STEPS:
        found = edit_scenes(inversion_steps=inversion_steps, steps=steps, model=demo.model)
        if (inversion_steps, steps) == (100, 50):
            found.plot(figures / "editing.png")
            _shrink(figures / "editing.png", 0.8)
        rows.append(found.to_dict())
    return {"runs": rows}


PARTS: dict[str, Callable[[Demo, Path], dict[str, Any]]] = {
    "robustness": robustness,
    "drift": drift,
    "plan-8": planned(0, 7),
    "plan-20": planned(20, 10),
    "edits": edits,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts; each is saved when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the PNGs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    given = parser.parse_args(arguments)
    wrong = [name for name in given.parts if name not in PARTS]
    if wrong:
        parser.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    data = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    demo = Demo(given.steps, given.prompts)
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
